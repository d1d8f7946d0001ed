"""The contract of a sequence mixer: the part of a block that moves information between positions.

A mixer is one Python file and one YAML file. It takes the model width, the Canon configuration and its own options:

    class MyMixer(Mixer):
        def __init__(self, dim: int, canon: CanonConfig, *, layer: int = 0, my_option: int = 4): ...

Training, prefill and one-token decoding are the same ``forward``. Everything with memory honours ``segments``, so that
documents packed into one row cannot see each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from src.components.initialization import Initializer
from src.components.tensor_parallel import TensorGroup

# What a mixer or a block carries from one call to the next: tensors by name, the batch first, nested where a block holds its mixer's.
# What else a state may hold, `src/components/cache.py` lists. An empty dictionary is the state before the first token.
State = dict[str, Any]


class Mixer(nn.Module, ABC):
    """Mixes information along time: ``[B, T, dim] -> [B, T, dim]``."""

    @abstractmethod
    def forward(
        self, x: Tensor, *, segments: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """Mixes x.

        Args:
            x: ``[B, T, dim]``.
            segments: ``[B, T]`` document numbers, or None for one document; nothing may pass between two numbers. A negative number
                marks padding, which must change nothing for the tokens around it: it is not remembered, and where a ``state`` is given
                a document goes on behind it as if it were not there. Without a state it stands before, between or after documents,
                never inside one. What is returned at padding means nothing, but must be finite.
            state: None in training. ``{}`` to begin a sequence, or what the previous call returned; the call then
                continues that sequence and must give what one call over the whole of it would have given.

        Returns:
            ``[B, T, dim]`` and the new state (None if none was given). The given state is left as it was.
        """

    def split_over(self, split: TensorGroup) -> None:
        """Has each process of a group compute its share of the heads; a mixer that can do so overrides this.

        Raises:
            ValueError: this mixer cannot, or not with these heads.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be split among processes: trainer.strategy.tensor_parallel={split.size} is for models "
            "whose mixers are all attention. Use trainer=fsdp"
        )

    @abstractmethod
    def init_weights(self, init: Initializer) -> None:
        """Initialises this module's own parameters; Canon layers and norms inside it look after themselves."""

    @abstractmethod
    def count_parameters(self) -> int:
        """Number of parameters, by formula."""

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> int:
        """Forward floating-point operations per token in sequences of ``seq_len`` tokens; a multiply-add is two."""

    @abstractmethod
    def state_size(self, seq_len: int) -> int:
        """Numbers carried per sequence after ``seq_len`` tokens."""
