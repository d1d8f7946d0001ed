"""One block: x + mixer(A(norm(x))), then x + feedforward(C(norm(x))).

B (or b) lives inside the mixer and D inside the feed-forward. Without a feed-forward (Mamba2 alone) the second half, its
norm and points C and D do not exist.
"""

from __future__ import annotations

from torch import Tensor, nn

from src.components.canon import CanonConfig, canon_at
from src.components.feedforward import FeedForward
from src.components.mixers.base import Mixer, State
from src.components.mixture_of_experts import MixtureOfExperts
from src.components.norm import RMSNorm


class Block(nn.Module):
    """A residual block, ``[B, T, dim] -> [B, T, dim]``.

    Args:
        dim: model width.
        mixer: moves information along time.
        feedforward: transforms each position, or None.
        canon: Canon configuration; the block itself has points A and C.
        norm_eps: epsilon of both RMSNorms.
    """

    def __init__(
        self,
        dim: int,
        mixer: Mixer,
        feedforward: FeedForward | MixtureOfExperts | None,
        canon: CanonConfig,
        norm_eps: float,
    ):
        super().__init__()
        self.dim = dim
        self.mixer_norm = RMSNorm(dim, norm_eps)
        self.canon_a = canon.at("A", dim)
        self.mixer = mixer
        self.feedforward = feedforward
        if feedforward is not None:
            self.feedforward_norm = RMSNorm(dim, norm_eps)
            self.canon_c = canon.at("C", dim)

    def forward(
        self, x: Tensor, segments: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """Transforms x ``[B, T, dim]``; ``segments`` and ``state`` as in ``Mixer.forward``."""
        state = None if state is None else dict(state)
        h = canon_at("A", self.canon_a, self.mixer_norm(x), segments, state)
        h, mixer_state = self.mixer(h, segments=segments, state=_part(state, "mixer"))
        x = x + h
        if self.feedforward is not None:
            h = canon_at("C", self.canon_c, self.feedforward_norm(x), segments, state)
            h, feedforward_state = self.feedforward(h, segments=segments, state=_part(state, "feedforward"))
            x = x + h
            if state is not None:
                state["feedforward"] = feedforward_state
        if state is not None:
            state["mixer"] = mixer_state
        return x, state

    def count_parameters(self) -> int:
        """Norms, Canon layers, mixer and feed-forward."""
        halves = [self.mixer] if self.feedforward is None else [self.mixer, self.feedforward]
        own = sum(canon.count_parameters() for canon in self._canons())
        return own + sum(self.dim + half.count_parameters() for half in halves)

    def flops_per_token(self, seq_len: int) -> int:
        """Forward floating-point operations per token, norms and residuals not counted."""
        feedforward = self.feedforward.flops_per_token() if self.feedforward is not None else 0
        own = sum(canon.flops_per_token() for canon in self._canons())
        return own + self.mixer.flops_per_token(seq_len) + feedforward

    def state_size(self, seq_len: int) -> int:
        """Numbers carried per sequence after ``seq_len`` tokens."""
        feedforward = self.feedforward.state_size() if self.feedforward is not None else 0
        own = sum(canon.state_size() for canon in self._canons())
        return own + self.mixer.state_size(seq_len) + feedforward

    def _canons(self) -> list:
        second = [self.canon_c] if self.feedforward is not None else []
        return [canon for canon in [self.canon_a, *second] if canon is not None]


def _part(state: State | None, name: str) -> State | None:
    return None if state is None else state.get(name) or {}
