"""The Canon layer: each token adds a learnt, per-channel weighted sum of itself and its k-1 predecessors.

    canon(h)_t = h_t + sum_{j=0..k-1} w_j * h_{t-(k-1)+j}          h_s = 0 for s < 0; k = 4

(*Physics of Language Models, Part 4.1*, eq. 4.1.) It is a causal depthwise convolution with a residual: no bias, no
activation, tap k-1 multiplies the current token. The weights start as U(-1/sqrt(k), 1/sqrt(k)), PyTorch's default for a
Conv1d with fan-in k; the 0.02 that most language models use everywhere would switch the layer off at the start.

Departure from the release: taps stop at document boundaries when ``segments`` are given, at every insertion point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from src.components.initialization import Initializer
from src.components.kernels.causal_conv import ConvState, causal_conv, causal_conv_state


class Canon(nn.Module):
    """A Canon layer, ``[B, T, width] -> [B, T, width]``.

    Args:
        width: channels; each has its own ``kernel_size`` weights.
        kernel_size: taps, the current token's included.
        residual: add the input to the convolution's output.
        activation: None or ``silu``, applied to the convolution's output before the residual.
        bias: a bias on the convolution's output.
        init: ``uniform`` (the paper's), ``normal`` (std 0.02), ``zeros``, or ``identity`` (the current token's tap 1, the others 0,
            so that the convolution passes its input through).
        trainable: False freezes the weights.
        backend: kernel name, see ``src/components/kernels``.
        bias_init: ``zeros``, or ``uniform`` as the weights (Mamba2's own convolution).

    Raises:
        ValueError: for a kernel size below 1, or an activation or init that does not exist.
    """

    # The letter of the insertion point, where a CanonConfig has placed the layer.
    point: str | None = None

    def __init__(
        self,
        width: int,
        kernel_size: int = 4,
        residual: bool = True,
        activation: Literal["silu"] | None = None,
        bias: bool = False,
        init: Literal["uniform", "normal", "zeros", "identity"] = "uniform",
        trainable: bool = True,
        backend: str = "auto",
        bias_init: Literal["zeros", "uniform"] = "zeros",
    ):
        super().__init__()
        self.check(kernel_size, activation, init)
        self.width, self.kernel_size = width, kernel_size
        self.activation: Literal["silu"] | None = activation
        self.residual, self.init, self.bias_init, self.backend = residual, init, bias_init, backend
        # Shaped like the weight of a depthwise Conv1d, as in the release.
        self.weight = nn.Parameter(torch.empty(width, 1, kernel_size), requires_grad=trainable)
        self.bias = nn.Parameter(torch.empty(width), requires_grad=trainable) if bias else None
        self.reset_parameters()

    @staticmethod
    def check(kernel_size: int, activation: str | None, init: str) -> None:
        """Raises a ValueError that names the first argument that makes no sense."""
        if kernel_size < 1:
            raise ValueError(f"canon.kernel_size={kernel_size}: at least 1 (the current token)")
        if activation not in (None, "silu"):
            raise ValueError(f"canon.activation={activation!r}: choose null or silu")
        if init not in ("uniform", "normal", "zeros", "identity"):
            raise ValueError(f"canon.init={init!r}: choose uniform, normal, zeros or identity")

    def reset_parameters(self) -> None:
        """Initialises from torch's global random state, for use outside a Backbone."""
        self.init_weights(Initializer(self, seed=int(torch.randint(2**62, (), device="cpu"))))

    def init_weights(self, init: Initializer) -> None:
        """Sets the weights as ``init`` says, whatever the rest of the model does."""
        if self.init == "uniform":
            init.uniform(self.weight, self.kernel_size**-0.5)
        elif self.init == "normal":
            init.normal(self.weight, 0.02)
        elif self.init == "identity":
            init.fill(self.weight, lambda w, _: w.zero_()[..., -1].fill_(1.0))
        else:
            init.constant(self.weight, 0.0)
        if self.bias is not None and self.bias_init == "uniform":
            init.uniform(self.bias, self.kernel_size**-0.5)
        elif self.bias is not None:
            init.constant(self.bias, 0.0)

    def forward(
        self,
        x: Tensor,
        *,
        segments: Tensor | None = None,
        state: ConvState | None = None,
        own: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, ConvState]:
        """Mixes each token with its predecessors.

        Args:
            x: ``[B, T, width]``.
            segments: ``[B, T]`` document numbers; a tap that would reach into another document counts as zero.
            state: the last k-1 inputs of what came before; start with ``initial_state``.
            own: which rows of the weights belong to the channels of x, where x has only some of them (tensor parallelism).

        Returns:
            ``[B, T, width]``, and the new state if one was given.
        """
        weight, bias = self.weight, self.bias
        if own is not None:
            weight, bias = own(weight), None if bias is None else own(bias)
        y, new_state = causal_conv(
            x,
            weight.squeeze(1),
            bias=bias,
            activation=self.activation,
            residual=self.residual,
            segments=segments,
            state=state,
            backend=self.backend,
        )
        return y if new_state is None else (y, new_state)

    def initial_state(self, x: Tensor) -> ConvState:
        """The state before the first token of a batch shaped, typed and placed like x ``[B, T, width]``."""
        return causal_conv_state(x.shape[0], x.shape[-1], self.kernel_size, dtype=x.dtype, device=x.device)

    def count_parameters(self) -> int:
        """``kernel_size`` weights per channel, and the biases."""
        return self.width * (self.kernel_size + (self.bias is not None))

    def state_size(self) -> int:
        """Numbers carried per sequence: the last k-1 inputs."""
        return self.width * (self.kernel_size - 1)

    def flops_per_token(self) -> int:
        """Forward floating-point operations per token; a multiply-add counts as two."""
        return 2 * self.kernel_size * self.width

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        parts = [f"{self.width}, kernel_size={self.kernel_size}"]
        parts += [] if self.residual else ["residual=False"]
        parts += [f"activation={self.activation}"] if self.activation else []
        return ", ".join(parts)


def canon_at(
    point: str,
    canon: Canon | None,
    x: Tensor,
    segments: Tensor | None,
    state: dict | None,
    own: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Applies the Canon layer of one insertion point, if there is one.

    Args:
        point: the letter, under which the layer's state is kept.
        canon: the layer, or None.
        x: ``[B, T, width]``.
        segments: ``[B, T]`` document numbers or None.
        state: the block's or mixer's state, updated in place; None in training.
        own: as in ``Canon.forward``.
    """
    if canon is None:
        return x
    if state is None:
        y = canon(x, segments=segments, own=own)
    else:
        before = state.get(point, None) or canon.initial_state(x)
        y, state[point] = canon(x, segments=segments, state=before, own=own)
    return y
