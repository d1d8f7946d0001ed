"""Where Canon layers go, and of which kind: the one place that knows the letters.

x + mixer(A(norm(x)))        A  after the mixer's norm, before all its projections      width d
                             B  on the projected q, k, v together, inside the mixer      mixer's own
                             b  the architecture's own short convolution, where it has one; without the letter it is left out
x + feedforward(C(norm(x)))  C  after the feed-forward's norm                           width d
                             D  on gate and up projections, before the activation       width 2 I (I if ungated)

A letter means nothing to a part that lacks the point: attention has no b, a block without a feed-forward neither C nor D. Mixed stacks
need that ("AbCD" of Gated DeltaNet and attention), so it is no error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from src.components.canon.layer import Canon
from src.components.kernels.causal_conv import check_backend

POINTS = {
    "A": "after the mixer's norm",
    "B": "on the mixer's projections",
    "b": "the mixer's own short convolution",
    "C": "after the feed-forward's norm",
    "D": "on the feed-forward's pre-activation",
}


SHORT_CONVOLUTION_TAPS = 4


@dataclass(frozen=True)
class CanonConfig:
    """One description of all Canon layers of a model.

    The ``b`` convolutions belong to their architecture and not to this description: of what follows only ``positions`` and ``backend``
    concern them (see ``short_convolution``).

    Args:
        positions: letters out of ``A b B C D`` in any order, ``""`` for none; duplicates are ignored.
        kernel_size: taps, the current token's included.
        residual: add the input to the convolution's output.
        activation: None, or ``silu`` on the convolution's output (before the residual).
        bias: a zero-initialised bias on the convolution's output.
        init: ``uniform`` U(-1/sqrt(k), 1/sqrt(k)) (the paper's), ``normal`` N(0, 0.02^2), ``zeros`` (the layer starts as the
            identity when residual), or ``identity`` (it does when not residual).
        trainable: False freezes the weights at their initial values (the paper's "cst-Canon").
        backend: kernel of the convolution; ``auto`` takes the fastest that can run.
    """

    config_name = "canon"

    @staticmethod
    def one_form(arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments that describe the same layers, alike: what ``config/identity.py`` takes the hash of."""
        letters = arguments.get("positions")
        if letters is None or letters == "":
            return {}  # of no layers nothing more is to be said
        if not isinstance(letters, str) or not set(letters) <= set(POINTS):
            return arguments
        ordered = arguments | {"positions": "".join(letter for letter in POINTS if letter in letters)}
        # Of the convolutions of point b alone little of the description is about (see above).
        return (
            ordered
            if ordered["positions"] != "b"
            else {k: v for k, v in ordered.items() if k in ("positions", "backend")}
        )

    positions: str = ""
    kernel_size: int = 4
    residual: bool = True
    activation: Literal["silu"] | None = None
    bias: bool = False
    init: Literal["uniform", "normal", "zeros", "identity"] = "uniform"
    trainable: bool = True
    backend: str = "auto"

    def __post_init__(self) -> None:
        letters = self.positions or ""
        unknown = sorted(set(letters) - set(POINTS))
        if unknown:
            known = "; ".join(f"{letter} {where}" for letter, where in POINTS.items())
            raise ValueError(f"canon.positions={letters!r}: no such point {', '.join(unknown)}. Points: {known}")
        # A canonical order without duplicates, so that "AbbCD" and "DCbA" name one and the same model.
        object.__setattr__(self, "positions", "".join(letter for letter in POINTS if letter in letters))
        Canon.check(self.kernel_size, self.activation, self.init)
        check_backend(self.backend)

    def at(self, point: str, width: int) -> Canon | None:
        """The Canon layer of an insertion point other than ``b``, or None where this configuration has none."""
        points = [letter for letter in POINTS if letter != "b"]
        if point not in points:
            raise ValueError(
                f"no Canon layer at point {point!r}; there are {', '.join(points)}, and short_convolution for b"
            )
        if point not in self.positions:
            return None
        layer = Canon(
            width,
            kernel_size=self.kernel_size,
            residual=self.residual,
            activation=self.activation,
            bias=self.bias,
            init=self.init,
            trainable=self.trainable,
            backend=self.backend,
        )
        layer.point = point
        return layer

    def short_convolution(
        self,
        width: int,
        *,
        bias: bool = False,
        init: Literal["uniform", "normal", "zeros", "identity"] = "normal",
        bias_init: Literal["zeros", "uniform"] = "zeros",
    ) -> Canon | None:
        """The mixer's own convolution, point ``b``, or None where this configuration leaves it out.

        Four taps, SiLU and no residual, and always trained: ``kernel_size``, ``residual``, ``activation``, ``bias``, ``init`` and
        ``trainable`` of this configuration describe Canon layers, as in the release.
        """
        if "b" not in self.positions:
            return None
        layer = Canon(
            width,
            kernel_size=SHORT_CONVOLUTION_TAPS,
            residual=False,
            activation="silu",
            bias=bias,
            init=init,
            bias_init=bias_init,
            backend=self.backend,
        )
        layer.point = "b"
        return layer
