"""A mixture of experts in place of the feed-forward (Shazeer et al. 2017; top-1 routing: Switch, Fedus et al. 2022).

    p   = softmax(W_r x)                                over E experts, in float32
    y   = sum over the k largest p_e of  p_e FFN_e(x)   FFN_e as in feedforward.py, without Canon-D
    L_b = E sum_e f_e P_e                               balance loss of a micro-batch; 1 when all experts are used alike

f_e is the share of choices that went to expert e and P_e the mean of p_e, both over the tokens that are not padding.

Point D does not exist here: it would mix the pre-activations of neighbouring tokens, which belong to different experts.
So the paper adds Canon-ABC to its mixtures (*Physics of Language Models, Part 4.1*, Result 5: 32 experts, top-1, capacity
factor 2). It does not give the experts' width; Part 3.3 speaks of 8.8 % of parameters at work, which is what ungated
experts d -> d -> d give: (4 + 2) d^2 of (4 + 64) d^2 a layer. Hence the defaults.

Capacity: with ``capacity_factor`` c, an expert takes in *training* at most ceil(c k T / E) of the T real tokens of a row, the
earliest; for the others it adds nothing. Counted by row rather than by micro-batch, as the paper's library does, so that
neither the number of ranks nor that of micro-batches changes what a token sees, and no token is displaced by a later one. In
evaluation nothing is dropped: a token's output depends on that token alone, so that decoding equals the full forward.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.components.canon import CanonConfig
from src.components.feedforward import ACTIVATIONS
from src.components.initialization import Initializer
from src.components.kernels.grouped_matmul import grouped_matmul
from src.components.mixers.base import State

ROUTER_STD = 0.02  # nearly uniform at the start, so that no expert is left out by chance


class MixtureOfExperts(nn.Module):
    """Position-wise feed-forward networks of which each token uses ``top_k``, ``[B, T, dim] -> [B, T, dim]``.

    After a forward in training mode, ``auxiliary_loss`` is the balance loss times its coefficient (None when that is 0 or in
    evaluation), to be added to the loss, and ``statistics`` holds detached numbers: ``balance_loss``, ``largest_load``
    (tokens of the busiest expert, in multiples of the mean), and with a capacity ``dropped`` (the share of choices).

    Args:
        dim: model width.
        canon: Canon configuration; this module has no point and refuses D.
        num_experts: E.
        top_k: experts of a token.
        hidden_dim: inner width of an expert; None: dim.
        gated: each expert multiplies its activated gate with a second projection.
        activation: ``silu``, ``relu2`` or ``gelu``.
        capacity_factor: None to drop nothing; else see the head of this file.
        balance_coefficient: of the balance loss.
        backend: kernel of the experts' products; ``auto`` takes the fastest that can run.
        layer: index of the block, for depth-scaled initialisation.

    Raises:
        ValueError: for Canon point D, an unknown activation, or a number out of range.
    """

    config_name = "mixture_of_experts"

    def __init__(
        self,
        dim: int,
        canon: CanonConfig,
        *,
        num_experts: int = 32,
        top_k: int = 1,
        hidden_dim: int | None = None,
        gated: bool = False,
        activation: Literal["silu", "relu2", "gelu"] = "silu",
        capacity_factor: float | None = None,
        balance_coefficient: float = 0.01,
        backend: str = "auto",
        layer: int = 0,
    ):
        super().__init__()
        hidden_dim = dim if hidden_dim is None else hidden_dim
        _check(canon, num_experts, top_k, hidden_dim, activation, capacity_factor, balance_coefficient)
        self.dim, self.hidden_dim, self.gated, self.layer = dim, hidden_dim, gated, layer
        self.num_experts, self.top_k, self.activation = num_experts, top_k, activation
        self.capacity_factor, self.balance_coefficient, self.backend = capacity_factor, balance_coefficient, backend
        self.in_width = 2 * hidden_dim if gated else hidden_dim
        self.router = nn.Linear(dim, num_experts, bias=False)
        # All experts in one tensor: none is ever a parameter without a gradient.
        self.in_proj = nn.Parameter(torch.empty(num_experts, self.in_width, dim))
        self.out_proj = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.auxiliary_loss: Tensor | None = None
        self.statistics: dict[str, Tensor] = {}

    def forward(
        self, x: Tensor, *, segments: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """Transforms x ``[B, T, dim]``. Of ``segments`` only padding (negative) matters: it uses no expert and gives zero."""
        (batch, time, dim), k = x.shape, self.top_k
        probabilities, gates, experts = self._route(x)  # [B, T, E], [B, T, k], [B, T, k]
        real = None if segments is None else segments >= 0

        # Choices sorted by expert, then row, then time; padding last. key: [B T k].
        rows = torch.arange(batch, device=x.device)[:, None, None]
        key = experts * batch + rows
        if real is not None:
            key = torch.where(real[..., None], key, self.num_experts * batch)
        key, order = key.flatten().sort(stable=True)
        ends = torch.searchsorted(key, torch.arange(1, self.num_experts + 1, device=x.device) * batch, out_int32=True)
        kept = self._kept(key, real, batch, time)
        self._observe(probabilities, ends, real, kept)

        choices = x.reshape(-1, 1, dim).expand(-1, k, dim).reshape(-1, dim)[order]
        if kept is not None:
            # A zero goes through every expert as a zero, and where() stops the gradient.
            choices = torch.where(kept[:, None], choices, 0.0)
            ends = torch.cat([ends[:-1], ends.new_full((1,), key.numel())])  # the last group takes in all padding
        y = self._apply_experts(choices, ends)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
        y = (y[place].view(batch, time, k, dim) * gates[..., None]).sum(dim=2).to(y.dtype)
        return y, None if state is None else dict(state)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities of all experts, and the ``top_k`` largest with the experts that they belong to."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            probabilities = F.linear(x.to(dtype), self.router.weight.to(dtype)).softmax(dim=-1)
        gates, experts = probabilities.topk(self.top_k, dim=-1)
        return probabilities, gates, experts

    def _kept(self, key: Tensor, real: Tensor | None, batch: int, time: int) -> Tensor | None:
        """Which of the sorted choices reach their expert; None for all."""
        is_real = None if real is None else key < self.num_experts * batch
        if self.capacity_factor is None or not self.training:
            return is_real
        lengths = key.new_full((batch,), time) if real is None else real.sum(dim=1)
        # In float64, and a little less, so that no rounding error lifts a whole number to the next.
        capacity = (lengths.double() * (self.capacity_factor * self.top_k / self.num_experts) - 1e-9).ceil()
        before = torch.arange(key.numel(), device=key.device) - torch.searchsorted(key, key)
        kept = before < capacity[key % batch]
        return kept if is_real is None else kept & is_real

    def _apply_experts(self, choices: Tensor, ends: Tensor) -> Tensor:
        h = grouped_matmul(choices, self.in_proj, ends, backend=self.backend)
        act = ACTIVATIONS[self.activation]
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            h = act(gate) * up
        else:
            h = act(h)
        return grouped_matmul(h, self.out_proj, ends, backend=self.backend)

    def _observe(self, probabilities: Tensor, ends: Tensor, real: Tensor | None, kept: Tensor | None) -> None:
        """Sets ``auxiliary_loss`` and ``statistics``."""
        self.auxiliary_loss, self.statistics = None, {}
        if not self.training:
            return
        choices = ends[-1].clamp(min=1).to(probabilities.dtype)
        share = ends.diff(prepend=ends.new_zeros(1)) / choices
        if real is not None:
            probabilities = torch.where(real[..., None], probabilities, 0.0)
        mean = probabilities.flatten(0, 1).sum(dim=0) * (self.top_k / choices)
        balance_loss = self.num_experts * (share * mean).sum()
        self.statistics["balance_loss"] = balance_loss.detach()
        self.statistics["largest_load"] = self.num_experts * share.max()
        if self.capacity_factor is not None and kept is not None:
            self.statistics["dropped"] = 1 - kept.sum() / choices
        if self.balance_coefficient:
            self.auxiliary_loss = self.balance_coefficient * balance_loss

    def init_weights(self, init: Initializer) -> None:
        """Each expert as a feed-forward, by its own fan-in; a router that begins almost undecided."""
        init.normal(self.router.weight, ROUTER_STD)
        init.matrix(self.in_proj, self.dim)
        init.matrix(self.out_proj, self.hidden_dim, residual_layer=self.layer)

    def count_parameters(self) -> int:
        """Router and all experts."""
        return self.num_experts * self.dim * (1 + self.in_width + self.hidden_dim)

    def flops_per_token(self) -> int:
        """Forward floating-point operations per token in the router and the experts that a token uses."""
        return 2 * self.dim * (self.num_experts + self.top_k * (self.in_width + self.hidden_dim))

    def state_size(self) -> int:
        """Numbers carried per sequence: none."""
        return 0


def _check(
    canon: CanonConfig,
    num_experts: int,
    top_k: int,
    hidden_dim: int,
    activation: str,
    capacity_factor: float | None,
    balance_coefficient: float,
) -> None:
    if "D" in canon.positions:
        without = canon.positions.replace("D", "")
        raise ValueError(
            f"canon.positions={canon.positions!r}: MixtureOfExperts has no point D, as neighbouring tokens use different "
            f"experts; use {without!r}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: choose {', '.join(ACTIVATIONS)}")
    for name, value in (("num_experts", num_experts), ("hidden_dim", hidden_dim)):
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k}: from 1 to num_experts={num_experts}")
    if capacity_factor is not None and not 0 < capacity_factor < float("inf"):
        raise ValueError(f"capacity_factor={capacity_factor}: a positive number, or null to drop nothing")
    if not 0 <= balance_coefficient < float("inf"):
        raise ValueError(f"balance_coefficient={balance_coefficient}: at least 0")
