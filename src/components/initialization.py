"""Weight initialisation: one random stream per parameter, keyed by (seed, parameter name).

A parameter's values depend on nothing but the seed and its own name and shape. Two models that differ in one
component (say, with and without Canon layers) therefore start from *identical* values wherever they share a parameter,
and building on the meta device first gives the same weights as building directly.

Three schemes, as the official release starts its families:

``fan_in``   truncated normal, std = width^-1/2, cut at three standard deviations (Llama, training tree)
``normal``   N(0, 0.02^2) for every matrix and embedding (GLA5, GDN2, and the Hugging Face tree of Llama)
``uniform``  U(-1/sqrt(n), 1/sqrt(n)) for a matrix with n inputs, PyTorch's default (Mamba2)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Scheme = Literal["fan_in", "normal", "uniform"]
DepthScaling = Literal["disabled", "current_depth", "global_depth", "dim_ratio"]


@dataclass(frozen=True)
class Initialization:
    """How matrices and embeddings start. Canon layers and other special parameters look after themselves.

    Args:
        scheme: ``fan_in``, ``normal`` or ``uniform`` (see the head of this file).
        std: overrides the scheme's standard deviation. ``normal`` takes 0.02 when it is None.
        embedding_std: the embedding starts as N(0, embedding_std^2); None: as the matrices do.
        depth_scaling: divides the std of the two matrices that write into the residual stream by
            sqrt(2 (layer + 1)) ``current_depth``, sqrt(2 (depth + 1)) ``global_depth`` or dim / 4096 ``dim_ratio``.
    """

    config_name = "initialization"

    scheme: Scheme = "fan_in"
    std: float | None = None
    embedding_std: float | None = None
    depth_scaling: DepthScaling = "disabled"

    def __post_init__(self) -> None:
        if self.scheme not in ("fan_in", "normal", "uniform"):
            raise ValueError(f"initialization.scheme={self.scheme!r}: choose 'fan_in', 'normal' or 'uniform'")
        if self.depth_scaling not in ("disabled", "current_depth", "global_depth", "dim_ratio"):
            raise ValueError(
                f"initialization.depth_scaling={self.depth_scaling!r}: choose 'disabled', 'current_depth', "
                "'global_depth' or 'dim_ratio'"
            )
        for name, std in (("std", self.std), ("embedding_std", self.embedding_std)):
            if std is not None and std <= 0:
                raise ValueError(f"initialization.{name}={std}: must be positive")


class Initializer:
    """Fills the parameters of one model. Handed to every module's ``init_weights``.

    Args:
        module: the model; its parameter names key the random streams.
        seed: one number for the whole model.
        config: the scheme.
        dim: model width, for ``dim_ratio``.
        depth: number of blocks, for ``global_depth``.
    """

    def __init__(
        self, module: nn.Module, seed: int, config: Initialization | None = None, dim: int = 1, depth: int = 1
    ):
        self.config, self.seed, self.dim, self.depth = config or Initialization(), seed, dim, depth
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}

    def generator(self, parameter: Tensor) -> torch.Generator:
        """The random stream that belongs to this parameter."""
        digest = hashlib.sha256(f"{self.seed}/{self._names[id(parameter)]}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def matrix(
        self, weight: Tensor, width: int, *, residual_layer: int | None = None, cut_before_scaling: bool = False
    ) -> None:
        """Initialises a weight matrix or an embedding table in place.

        Args:
            weight: the parameter.
            width: ``fan_in`` uses std = width^-1/2; ``uniform`` reads the number of inputs off the matrix itself.
            residual_layer: index of the block when this matrix writes into the residual stream, else None.
            cut_before_scaling: truncate at three *unscaled* standard deviations (the release does so for the
                attention's output matrix, and scales the cut of the feed-forward's).
        """
        base = self._std(weight.shape[1] if self.config.scheme == "uniform" else width)
        std = base / self._depth_divisor(residual_layer)
        if self.config.scheme == "uniform":
            self.uniform(weight, 3**0.5 * std)
        elif self.config.scheme == "normal":
            self.normal(weight, std)
        else:
            cut = 3 * (base if cut_before_scaling else std)
            self.fill(weight, lambda w, g: truncated_normal_(w, std, cut, g))

    def embedding(self, weight: Tensor, width: int) -> None:
        """Initialises an embedding table in place: by ``embedding_std``, or as a matrix."""
        if self.config.embedding_std is None:
            self.matrix(weight, width)
        else:
            self.normal(weight, self.config.embedding_std)

    def factor(self, weight: Tensor, width: int, rank: int) -> None:
        """Initialises one of the two factors of a matrix of low rank, in place.

        N(0, s / sqrt(rank)), where s is the standard deviation that the scheme gives a whole matrix of ``width`` inputs; elements
        of the product of two such factors have standard deviation s. (The release: s = 0.02, hence 0.0707 for rank 16.)
        """
        self.normal(weight, self._std(width) ** 0.5 / rank**0.25)

    def uniform(self, weight: Tensor, bound: float) -> None:
        """Fills the parameter from U(-bound, bound), in place."""
        self.fill(weight, lambda w, g: w.uniform_(-bound, bound, generator=g))

    def normal(self, weight: Tensor, std: float) -> None:
        """Fills the parameter from N(0, std^2), in place."""
        self.fill(weight, lambda w, g: w.normal_(0.0, std, generator=g))

    def constant(self, weight: Tensor, value: float) -> None:
        """Fills the parameter with one value, in place."""
        self.fill(weight, lambda w, _: w.fill_(value))

    def fill(self, parameter: Tensor, draw: Callable[[Tensor, torch.Generator], object]) -> None:
        """Fills the parameter in place by a function of its own.

        Args:
            parameter: of the model; nothing happens on the meta device.
            draw: called with an empty float32 CPU tensor of the parameter's shape, to be filled in place, and the random stream
                that belongs to the parameter.
        """
        if parameter.is_meta:
            return
        with torch.no_grad():
            # Drawn on the CPU in float32, so that the values do not depend on the device or the dtype.
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            draw(values, self.generator(parameter))
            if isinstance(parameter, DTensor):
                # Every process draws the whole and keeps its shard: nothing is sent.
                mesh, placements = parameter.device_mesh, parameter.placements
                values = values.to(mesh.device_type)
                parameter.copy_(distribute_tensor(values, mesh, placements, src_data_rank=None))
            else:
                parameter.copy_(values)

    def _std(self, width: int) -> float:
        if self.config.std is not None:
            return self.config.std
        return {"normal": 0.02, "fan_in": width**-0.5, "uniform": (3 * width) ** -0.5}[self.config.scheme]

    def _depth_divisor(self, layer: int | None) -> float:
        if layer is None or self.config.depth_scaling == "disabled":
            return 1.0
        return {
            "current_depth": (2 * (layer + 1)) ** 0.5,
            "global_depth": (2 * (self.depth + 1)) ** 0.5,
            "dim_ratio": self.dim / 4096,
        }[self.config.depth_scaling]


def truncated_normal_(values: Tensor, std: float, cut: float, generator: torch.Generator) -> Tensor:
    """Draws N(0, std^2) conditioned on |value| <= cut, in place."""
    return nn.init.trunc_normal_(values, 0.0, std, -cut, cut, generator=generator)
