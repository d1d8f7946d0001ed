"""A model writes: batched generation with caches, greedy or sampled.

Prompts of unequal length are padded on the left with document number -1, which attention, convolutions and Canon ignore. Each prompt has
random numbers of its own, so what is written does not depend on which prompts share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only

from src.components.backbone import Backbone
from src.datamodules.tasks.base import Generation

Tokens = NDArray[np.int64]


@torch.no_grad()
@torch.compiler.set_stance(
    "force_eager"
)  # every step has another shape: compiled blocks would be compiled over and over
def generate(
    net: Backbone, prompts: Sequence[Tokens], settings: Generation, streams: Sequence[Sequence[int]] | None = None
) -> list[Tokens]:
    """Continues every prompt until ``settings.stop`` (included) or ``settings.max_new_tokens``.

    Args:
        net: the model, on whichever device.
        prompts: token arrays, each of at least one token.
        settings: when to stop, and the temperature; 0 takes the most probable token.
        streams: a key (integers) of each prompt's random numbers; needed when sampling.

    Returns:
        The continuations, without the prompts.

    Raises:
        ValueError: for an empty prompt, or sampling without ``streams``.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt needs at least one token")
    if settings.temperature > 0 and streams is None:
        raise ValueError(f"temperature={settings.temperature} needs a random stream for every prompt")
    if not prompts:
        return []
    device = next(net.parameters()).device
    ids, segments = (part.to(device) for part in left_padded(prompts))
    written = np.full((len(prompts), settings.max_new_tokens), -1, dtype=np.int64)
    rows = np.arange(len(prompts))  # whose continuations are still being written
    state = net.initial_state()
    last = torch.zeros(ids.shape, dtype=torch.bool, device=device)
    last[:, -1] = True
    logits, state = net(ids, segments=segments, state=state, select=last)
    draws = None if streams is None else np.stack([_uniforms(key, settings.max_new_tokens) for key in streams])
    for step in range(settings.max_new_tokens):
        noise = None if draws is None else torch.as_tensor(draws[rows, step], device=device)
        chosen = choose(logits, settings.temperature, noise)
        tokens = chosen.cpu().numpy()
        written[rows, step] = tokens
        going = tokens != settings.stop
        if not going.any():
            break
        if not going.all():
            rows = rows[going]
            kept = torch.as_tensor(np.flatnonzero(going), device=device)
            chosen = chosen[kept]
            state = tree_map_only(Tensor, lambda tensor, kept=kept: tensor[kept], state)
        zeros = torch.zeros(len(rows), 1, dtype=torch.long, device=device)
        logits, state = net(chosen[:, None], segments=zeros, state=state, select=zeros == 0)
    return [row[row >= 0] for row in written]


def left_padded(prompts: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Token ids ``[B, T]`` with zeros on the left, and document numbers ``[B, T]``: -1 on padding, else 0."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    segments = torch.full_like(ids, -1)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        segments[row, longest - len(prompt) :] = 0
    return ids, segments


def choose(logits: Tensor, temperature: float, uniform: Tensor | None = None) -> Tensor:
    """The next token of each row ``[B]`` from ``[B, V]`` logits.

    Args:
        logits: ``[B, V]``.
        temperature: 0 for the most probable token.
        uniform: ``[B]`` numbers in [0, 1) at which the cumulative distribution is inverted; needed when sampling.
    """
    if temperature == 0 or uniform is None:
        return logits.argmax(dim=-1)
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    # The last sum may fall short of 1 by rounding.
    point = uniform[:, None].double() * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def _uniforms(key: Sequence[int], count: int) -> NDArray[np.float64]:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key)))).random(count)
