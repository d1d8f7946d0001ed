"""Optimizers, built from a module's named parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_SCALARS = ("step", "mu_product", "eta", "mu")  # one number a parameter: of all, of NAdam, of ASGD
_REDUCED = ("row_var", "col_var", "variance")  # of Adafactor, which keeps sums over rows and columns


def check_loaded(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """What of a stored state an optimizer takes over: tensors of the shapes of its parameters, and no settings.

    For ``register_load_state_dict_pre_hook``. A fused kernel goes through as many numbers of a moment as its parameter has, one after
    another, whether they are there or not; and rates and decays are those of this run, whose equality with the other's has been compared.

    Raises:
        ValueError: the state is that of other parameters.
    """
    groups, own = state["param_groups"], optimizer.param_groups
    parameters = [parameter for group in own for parameter in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own]:
        raise ValueError("the optimizer's groups have other numbers of parameters")
    of = dict(zip(numbers, parameters, strict=True))
    kept: dict[Any, dict[str, Any]] = {}
    for number, moments in state["state"].items():
        kept[number] = {}
        for name, value in moments.items():
            right = (value is None and name == "momentum_buffer") or (
                isinstance(value, Tensor)
                and number in of
                and (value.ndim == 0 if name in _SCALARS else name in _REDUCED or value.shape == of[number].shape)
            )
            if not right and not (name == "step" and type(value) in (int, float)):
                raise ValueError(f"the optimizer's {str(name)[:50]!r} is not of the shape of its parameter")
            kept[number][name] = _laid_out(value, of[number]) if isinstance(value, Tensor) else value
    settings = [{key: value for key, value in group.items() if key != "params"} for group in own]
    return state | {
        "state": kept,
        "param_groups": [mine | {"params": group["params"]} for mine, group in zip(settings, groups, strict=True)],
    }


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy whose numbers lie one after another as those of the parameter do, which a kernel takes for granted."""
    if isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.shape != parameter.shape:
        return value.detach().clone(memory_format=torch.contiguous_format)
    return torch.empty_like(parameter.detach(), dtype=value.dtype, device=value.device).copy_(value)


class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) with decoupled weight decay per parameter group.

    Args:
        named_parameters: from ``module.named_parameters()``; frozen ones are left out.
        lr: peak learning rate.
        betas: decay rates of the two moments. Part 4.1's synthetic runs: (0.9, 0.98); Part 4.2: (0.9, 0.95).
        eps: 1e-6 in Part 4.1's synthetic runs, 1e-8 in Part 4.2.
        weight_decay: of every parameter, norms, embeddings and Canon weights included, as in both recipes, except
        no_decay: shell patterns of parameter names that do not decay, such as ``*norm*`` or ``*canon*``.
        fused: one kernel for all parameters.

    Raises:
        ValueError: for a non-positive learning rate, or a pattern that matches no parameter.
    """

    config_name = "adamw"

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.03,
        no_decay: Sequence[str] = (),
        fused: bool = True,
    ):
        if not 0 < lr < float("inf"):
            raise ValueError(f"optimizer.lr={lr}: a positive number")
        if weight_decay < 0 or eps < 0:
            raise ValueError(f"optimizer.weight_decay={weight_decay}, optimizer.eps={eps}: at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"optimizer.betas={list(betas)}: two numbers in [0, 1)")
        named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        for pattern in no_decay:
            if not any(fnmatchcase(name, pattern) for name, _ in named):
                raise ValueError(f"optimizer.no_decay: {pattern!r} matches no parameter; one is called {named[0][0]!r}")
        exempt = [p for name, p in named if any(fnmatchcase(name, pattern) for pattern in no_decay)]
        decaying = [p for name, p in named if not any(fnmatchcase(name, pattern) for pattern in no_decay)]
        groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)
