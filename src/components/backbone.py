"""A language model: embedding, ``depth`` blocks, final norm, head.

    h = E[ids];   h = block_i(h), i = 0..depth-1;   logits = W norm(h)

The mixer of each block comes from a short pattern string tiled over the depth: ``pattern: T`` is a transformer,
``GGGT`` three G blocks to one T. Letters are the keys of ``mixers``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from src.components.block import Block
from src.components.cache import Cache
from src.components.canon import Canon, CanonConfig
from src.components.feedforward import FeedForward
from src.components.initialization import Initialization, Initializer
from src.components.mixers.base import Mixer, State
from src.components.mixture_of_experts import MixtureOfExperts
from src.components.norm import RMSNorm
from src.components.tensor_parallel import TensorGroup


class Backbone(nn.Module):
    """Maps token ids ``[B, T]`` to logits ``[B, T, vocab_size]``.

    Args:
        vocab_size: rows V of the embedding and of the head.
        dim: model width.
        depth: number of blocks.
        pattern: letters naming the mixer of each block, tiled over the depth.
        mixers: for each letter, what builds its mixer when called with ``dim``, ``canon`` and ``layer``.
        feedforward: what builds a block's feed-forward when called likewise, or None for blocks without one.
        canon: where Canon layers go, and of which kind.
        norm_eps: epsilon of the RMSNorms.
        tie_embeddings: the head uses the embedding's weights.
        initialization: how matrices and embeddings start.
        seed: of the initial weights; each parameter has its own stream, see ``initialization.py``.

    Raises:
        ValueError: for sizes below 1, an empty pattern, or a letter of the pattern that names no mixer.
    """

    config_name = "backbone"

    @staticmethod
    def one_form(arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments that describe the same model, alike, and no mixer that no block has: what ``config/identity.py`` hashes."""
        mixers, pattern = arguments.get("mixers"), arguments.get("pattern", "T")
        if not isinstance(mixers, dict) or not isinstance(pattern, str):
            return arguments
        return arguments | {"mixers": {letter: mixer for letter, mixer in mixers.items() if letter in pattern}}

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        depth: int,
        mixers: Mapping[str, Callable[..., Mixer]],
        feedforward: Callable[..., FeedForward | MixtureOfExperts] | None = FeedForward,
        pattern: str = "T",
        canon: CanonConfig | None = None,
        norm_eps: float = 1e-5,
        tie_embeddings: bool = False,
        initialization: Initialization | None = None,
        seed: int = 0,
    ):
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("dim", dim), ("depth", depth)):
            if value < 1:
                raise ValueError(f"model.{name}={value}: at least 1")
        if not pattern or any(letter not in mixers for letter in pattern):
            raise ValueError(f"model.pattern={pattern!r}: one or more of the letters {', '.join(sorted(mixers))}")
        self.vocab_size, self.dim, self.depth, self.pattern = vocab_size, dim, depth, pattern
        self.tie_embeddings, self.seed = tie_embeddings, seed
        self.canon, self.initialization = canon or CanonConfig(), initialization or Initialization()

        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList()
        for layer in range(depth):
            parts: dict[str, Any] = {"dim": dim, "canon": self.canon, "layer": layer}
            mixer = mixers[pattern[layer % len(pattern)]](**parts)
            self.blocks.append(
                Block(dim, mixer, None if feedforward is None else feedforward(**parts), self.canon, norm_eps)
            )
        self._warn_of_idle_letters()
        self.norm = RMSNorm(dim, norm_eps)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self.init_weights()

    def _warn_of_idle_letters(self) -> None:
        """A Canon point that no block has is no error, so that one word fits many models, but it should be no surprise."""
        used = {module.point for module in self.modules() if isinstance(module, Canon)}
        idle = "".join(letter for letter in self.canon.positions if letter not in used)
        if idle:
            warnings.warn(
                f"canon.positions={self.canon.positions!r}: no block of this model has point {', '.join(idle)}; it is ignored",
                stacklevel=3,
            )

    def init_weights(self) -> None:
        """(Re)initialises every parameter; does nothing to those on the meta device."""
        init = Initializer(self, self.seed, self.initialization, self.dim, self.depth)
        init.embedding(self.embedding.weight, self.dim)
        if not self.tie_embeddings:
            init.matrix(self.head.weight, self.dim)
        for module in self.modules():
            if module is not self and hasattr(module, "init_weights"):
                module.init_weights(init)  # type: ignore[operator]

    def forward(
        self,
        ids: Tensor,
        *,
        segments: Tensor | None = None,
        state: Cache | None = None,
        select: Tensor | None = None,
        head: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """Predicts the token after each position.

        Args:
            ids: ``[B, T]`` int64.
            segments: ``[B, T]`` document numbers; nothing passes from one document to another. Negative numbers mark padding, whose
                logits mean nothing. None: one document, number 0, without padding.
            state: ``initial_state()`` to begin decoding, or what the previous call returned.
            select: ``[B, T]`` bool; logits only at these N positions, ``[N, V]`` (a head over 10,000 words is most of
                a small model's work, and synthetic tasks score a few tokens of a window).
            head: what to make of the last features ``[..., dim]`` and the head's weight ``[V, dim]`` in place of logits, such
                as a loss that never holds all logits at once.

        Returns:
            Logits ``[B, T, V]`` (or ``[N, V]``, or what ``head`` returned), and the new state if one was given.

        Raises:
            ValueError: for ids that are no batch, or a state that belongs to another model or another number of rows.
            TypeError: for a state that is no Cache.
        """
        if ids.ndim != 2:
            raise ValueError(f"ids must be [B, T]; got shape {tuple(ids.shape)}")
        if state is not None and not isinstance(state, Cache):
            raise TypeError(f"state must be a Cache, net.initial_state() at the start; got {type(state).__name__}")
        if state is not None:
            state.check(self.depth, ids.shape[0])
        h = self.embedding(ids)
        new_states: list[State] = []
        for layer, block in enumerate(self.blocks):
            h, block_state = block(h, segments, None if state is None else state[layer])
            new_states.append(block_state)
        if select is not None:
            h = h[select]
        h = self.norm(h)
        logits = self.head(h) if head is None else head(h, self.head.weight)
        return logits if state is None else (logits, state.advanced(new_states, ids.shape[1], segments))

    def initial_state(self) -> Cache:
        """The state before the first token."""
        return Cache([{} for _ in self.blocks])

    def compile_blocks(self, **options: Any) -> None:
        """Compiles every block in place (parameter names stay as they are)."""
        for block in self.blocks:
            block.compile(**options)

    def recompute_blocks(self, what: str) -> None:
        """Keeps less for the backward pass and computes it again there, bit for bit (Chen et al. 2016).

        Args:
            what: ``block``: all but the input of each block; ``selective``: all but the results of matrix products and of attention,
                which cost most to compute.

        Raises:
            ValueError: for another word.
        """
        if what not in ("block", "selective"):
            raise ValueError(f"activation_checkpointing={what!r}: choose none, block or selective")
        options = {"context_fn": partial(create_selective_checkpoint_contexts, _kept)} if what == "selective" else {}
        for block in self.blocks:
            block.forward = partial(_recomputed, block.forward, options)

    def split_over(self, split: TensorGroup) -> None:
        """Has each process of a group compute its share of every block.

        Raises:
            ValueError: a mixer or feed-forward of this model cannot be split so.
        """
        for block in self._blocks():
            block.mixer.split_over(split)
            if block.feedforward is not None:
                if not isinstance(block.feedforward, FeedForward):
                    raise ValueError(
                        f"{type(block.feedforward).__name__} cannot be split among processes (tensor_parallel={split.size}). Use "
                        "trainer=fsdp"
                    )
                block.feedforward.split_over(split)

    def count_parameters(self) -> int:
        """Number of parameters, by formula (tested equal to the sum over ``parameters()``)."""
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return embeddings + self.dim + sum(block.count_parameters() for block in self._blocks())

    def flops_per_token(self, seq_len: int) -> int:
        """Forward floating-point operations per token in matrices, mixers and Canon layers; training costs about three times that.

        A multiply-add counts as two, and attention over all ``seq_len`` keys (PaLM, appendix B).
        """
        return 2 * self.vocab_size * self.dim + sum(block.flops_per_token(seq_len) for block in self._blocks())

    def state_size(self, seq_len: int) -> int:
        """Numbers carried per sequence after ``seq_len`` tokens."""
        return sum(block.state_size(seq_len) for block in self._blocks())

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]


# What is worth keeping: PyTorch's products and its attention. (A fused kernel of another library is computed again.)
_DEAR = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "_flash_attention", "_efficient_attention")


def _kept(_context: Any, operation: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    _, name, overload = [*str(operation).split("."), "", ""][:3]
    # A product that is written into a part of something else is changed by the next one.
    dear = overload != "out" and (
        name in _DEAR or any(name.startswith(prefix) for prefix in _DEAR if prefix.startswith("_"))
    )
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def _recomputed(forward: Callable[..., Any], options: dict[str, Any], *arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
