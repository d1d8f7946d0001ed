"""A model writes: whole batches at once, or one text token by token.

    texts = generate(net, prompts, Sampling(stop=2, max_new_tokens=100))                    # greedy
    texts = generate(net, prompts, Sampling(temperature=0.8, top_p=0.9), seed=0)

    decoder = Decoder(net, Sampling(stop=2))
    decoder.feed(question)
    for token in decoder: ...                  # until the text ends
    decoder.feed(next_question)                # it remembers both, and what it has written

Prompts of unequal length are padded on the left with document number -1, which attention, recurrences, convolutions and Canon ignore.
Each text has random numbers of its own, so what is written does not depend on which prompts share a batch. What is written, and what is
fed, is document 0.

Sampling: logits are divided by the temperature; of the ``top_k`` most probable tokens, the fewest are kept that together have at least
the probability ``top_p`` (Holtzman et al. 2020); among these the cumulative distribution, in the order of token ids, is inverted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.components.cache import Cache

if TYPE_CHECKING:
    from src.components.backbone import Backbone

Tokens = NDArray[np.int64]
LogProbs = NDArray[np.float64]
# A list, an array or a tensor of token ids.
AnyTokens = Sequence[int] | NDArray[Any] | Tensor

# Compiled blocks run as they were written: every step has another shape, and would be compiled over and over.
_eagerly = torch.compiler.set_stance("force_eager")


@dataclass(frozen=True)
class Sampling:
    """How a model writes.

    Args:
        temperature: 0 takes the most probable token; else logits are divided by it.
        top_k: sample among this many most probable tokens (of equally probable ones, those of lower id); None: all.
        top_p: sample among the fewest most probable tokens that together have at least this probability; 1: all.
        stop: the token that ends a text, or several tokens or sequences of tokens: ``2``, ``[2, 3]``, ``[2, [7, 7]]``. What ends a text
            belongs to it; a sequence counts once the model has written all of it.
        max_new_tokens: a text ends after this many tokens at the latest.

    Raises:
        ValueError: for a value that makes no sense, naming it.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    stop: int | Sequence[int | Sequence[int]] = ()
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature}: 0 for the most probable token, or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: at least 1, or None for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: a probability in (0, 1]")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: at least 1")
        if any(not end or min(end) < 0 for end in self.ends):
            raise ValueError(f"stop={self.stop!r}: token ids of at least 0, or sequences of at least one")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            warnings.warn("top_k and top_p do nothing at temperature=0", stacklevel=3)

    @property
    def ends(self) -> list[tuple[int, ...]]:
        """The sequences that end a text."""
        stop = [self.stop] if isinstance(self.stop, (int, np.integer)) else self.stop
        return [(int(end),) if isinstance(end, (int, np.integer)) else tuple(map(int, end)) for end in stop]


@overload
def generate(
    net: Backbone,
    prompts: Sequence[AnyTokens] | NDArray[Any] | Tensor,
    settings: Sampling | None = None,
    streams: Sequence[Sequence[int]] | None = None,
    *,
    seed: int | None = None,
    cache: Cache | None = None,
    log_probs: Literal[False] = False,
    **options: Any,
) -> list[Tokens]: ...


@overload
def generate(
    net: Backbone,
    prompts: Sequence[AnyTokens] | NDArray[Any] | Tensor,
    settings: Sampling | None = None,
    streams: Sequence[Sequence[int]] | None = None,
    *,
    seed: int | None = None,
    cache: Cache | None = None,
    log_probs: Literal[True],
    **options: Any,
) -> tuple[list[Tokens], list[LogProbs]]: ...


@torch.no_grad()
@_eagerly
def generate(
    net: Backbone,
    prompts: Sequence[AnyTokens] | NDArray[Any] | Tensor,
    settings: Sampling | None = None,
    streams: Sequence[Sequence[int]] | None = None,
    *,
    seed: int | None = None,
    cache: Cache | None = None,
    log_probs: bool = False,
    **options: Any,
) -> list[Tokens] | tuple[list[Tokens], list[LogProbs]]:
    """Continues every prompt until one of ``settings.stop`` (included) or ``settings.max_new_tokens``.

    Args:
        net: the model, on whichever device.
        prompts: token ids, at least one each; lists, arrays or tensors.
        settings: how to write; or give its fields as keywords.
        streams: a key (integers) of each prompt's random numbers, in place of ``seed``: so a text does not depend on its place among
            the prompts.
        seed: of the random numbers, when sampling: prompt i has those of ``(seed, i)``.
        cache: what came before: row i is continued by prompt i. ``cache.select([0] * n)`` gives n prompts one past. It is left as it was.
        log_probs: also return how probable the model held what was written.

    Returns:
        The continuations, without the prompts; with ``log_probs`` also the natural logarithm of each written token's probability
        (before temperature, top_k and top_p).

    Raises:
        ValueError: for an empty prompt, a token that the model does not have, a cache of other rows, or sampling without ``seed`` or
            ``streams``.
    """
    settings = _settings(settings, options)
    rows_of_tokens = [_tokens(prompt, net) for prompt in prompts]
    if settings.temperature > 0:
        streams = _streams(settings.temperature, seed, streams, len(rows_of_tokens))
    if not rows_of_tokens:
        return ([], []) if log_probs else []
    draws = None
    if settings.temperature > 0 and streams is not None:
        draws = np.stack([_random(key).random(settings.max_new_tokens) for key in streams])
    with _in_eval_mode(net):
        state = net.initial_state() if cache is None else cache
        written, found = _write(net, rows_of_tokens, settings, draws, state, log_probs)
    texts = [row[row >= 0] for row in written]
    if not log_probs:
        return texts
    return texts, [row[: len(text)] for row, text in zip(found, texts, strict=True)]


def _streams(
    temperature: float, seed: int | None, streams: Sequence[Sequence[int]] | None, prompts: int
) -> Sequence[Sequence[int]]:
    if streams is None and seed is not None:
        return [(seed, i) for i in range(prompts)]
    if streams is None or seed is not None:
        raise ValueError(
            f"temperature={temperature}: sampling needs random numbers; give seed=0 (or streams=, a key for each prompt, instead)"
        )
    if len(streams) != prompts:
        raise ValueError(f"streams: {len(streams)} keys for {prompts} prompts; one for each")
    return streams


def _write(
    net: Backbone,
    prompts: list[Tokens],
    settings: Sampling,
    draws: NDArray[np.float64] | None,
    state: Cache,
    log_probs: bool,
) -> tuple[Tokens, LogProbs]:
    """Tokens ``[B, max_new_tokens]``, -1 behind the end of a text, and their log-probabilities; ``draws`` has the same shape."""
    device = next(net.parameters()).device
    written = np.full((len(prompts), settings.max_new_tokens), -1, dtype=np.int64)
    found = np.zeros(written.shape)
    rows = np.arange(len(written))  # whose texts are still being written
    ids, segments = left_padded(prompts)
    alike = bool((segments == 0).all())  # no row is padded
    logits, state = _last_logits(net, ids.to(device), None if alike else segments.to(device), state)
    for step in range(settings.max_new_tokens):
        noise = None if draws is None else torch.as_tensor(draws[rows, step], device=device)
        chosen = choose(logits, settings.temperature, noise, settings.top_k, settings.top_p)
        if log_probs:
            found[rows, step] = _log_probs_of(logits, chosen)
        written[rows, step] = chosen.cpu().numpy()
        going = ~_ended(written[rows, : step + 1], settings)
        if step + 1 == settings.max_new_tokens or not going.any():
            break
        if not going.all():
            kept = torch.as_tensor(np.flatnonzero(going), device=device)
            rows, chosen, state = rows[going], chosen[kept], state.select(kept)
        logits, state = _last_logits(net, chosen[:, None], None, state)
    return written, found


class Decoder:
    """Writes one text token by token, and remembers everything that it was fed and has written.

        decoder = Decoder(net, Sampling(stop=END, temperature=0.7), stream=(seed,))
        decoder.feed(question)
        answer = list(decoder)            # up to END, or max_new_tokens
        decoder.feed(next_question)       # begins the next turn
        token = decoder.next()            # or a token at a time, for as long as one likes
        other = Decoder(net, settings, cache=decoder.cache)        # goes on from here too

    A written token enters the model's memory when the next one is asked for, when something is fed, or when ``cache`` is read. The
    tokens of one turn are those that ``generate`` writes with the same settings, stream and cache; the random numbers of the next turn go
    on where this one stopped.

    Args:
        net: the model, on whichever device.
        settings: how to write; ``stop`` and ``max_new_tokens`` hold for each turn, which ``feed`` begins.
        stream: key (integers) of the random numbers; needed when sampling.
        cache: what came before, of one row. It is left as it was.

    Raises:
        ValueError: for sampling without ``stream``, or a cache of several rows.
    """

    def __init__(
        self,
        net: Backbone,
        settings: Sampling | None = None,
        *,
        stream: Sequence[int] | None = None,
        cache: Cache | None = None,
    ):
        self.net, self.settings = net, settings or Sampling()
        if self.settings.temperature > 0 and stream is None:
            raise ValueError(
                f"temperature={self.settings.temperature}: sampling needs random numbers; give a key for them, stream=(0,)"
            )
        self._random = None if stream is None else _random(stream)
        self._cache = net.initial_state() if cache is None else cache
        self._cache.check(len(self._cache), 1)
        self._logits: Tensor | None = None  # of the next token, [1, V]
        self._pending: list[int] = []  # written, but not yet remembered
        self._turn: list[int] = []

    def feed(self, tokens: AnyTokens) -> None:
        """Lets the model read tokens, after those that it has written; what it then writes is a new turn.

        Raises:
            ValueError: when there are none, or one that the model does not have.
        """
        self._read([*self._pending, *_tokens(tokens, self.net).tolist()])
        self._turn = []

    def next(self) -> int:
        """Writes one more token, even behind the end of the turn.

        Raises:
            ValueError: when nothing has been fed yet.
        """
        if self._pending:
            self._read(self._pending)
        if self._logits is None:
            raise ValueError("feed at least one token first")
        noise = None
        if self.settings.temperature > 0 and self._random is not None:
            noise = torch.as_tensor(self._random.random(1), device=self._logits.device)
        settings = self.settings
        token = int(choose(self._logits, settings.temperature, noise, settings.top_k, settings.top_p))
        self._pending = [token]
        self._turn.append(token)
        return token

    def __iter__(self) -> Iterator[int]:
        """The tokens up to the end of the turn."""
        while not self.finished:
            yield self.next()

    @property
    def finished(self) -> bool:
        """Whether what was written since the last ``feed`` ends with a stop, or has ``max_new_tokens``."""
        written = np.array([self._turn], dtype=np.int64)
        return len(self._turn) >= self.settings.max_new_tokens or bool(_ended(written, self.settings)[0])

    @property
    def cache(self) -> Cache:
        """What the model remembers, everything fed and written included."""
        if self._pending:
            self._read(self._pending)
        return self._cache

    @torch.no_grad()
    @_eagerly
    def _read(self, tokens: list[int]) -> None:
        ids = torch.tensor([tokens], device=next(self.net.parameters()).device)
        with _in_eval_mode(self.net):
            self._logits, self._cache = _last_logits(self.net, ids, None, self._cache)
        self._pending = []


def stream(
    net: Backbone,
    prompt: AnyTokens,
    settings: Sampling | None = None,
    *,
    key: Sequence[int] | None = None,
    cache: Cache | None = None,
    **options: Any,
) -> Decoder:
    """A ``Decoder`` that has been fed a prompt: ``for token in stream(net, prompt, stop=2): ...``.

    Arguments as in ``generate``, for one prompt; ``key`` is that of its random numbers.
    """
    decoder = Decoder(net, _settings(settings, options), stream=key, cache=cache)
    decoder.feed(prompt)
    return decoder


def left_padded(prompts: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Token ids ``[B, T]`` with zeros on the left, and document numbers ``[B, T]``: -1 on padding, else 0."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    segments = torch.full_like(ids, -1)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        segments[row, longest - len(prompt) :] = 0
    return ids, segments


def choose(
    logits: Tensor,
    temperature: float,
    uniform: Tensor | None = None,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Tensor:
    """The next token of each row ``[B]`` from ``[B, V]`` logits.

    Args:
        logits: ``[B, V]``.
        temperature: 0 for the most probable token.
        uniform: ``[B]`` numbers in [0, 1) at which the cumulative distribution is inverted; needed when sampling.
        top_k: see ``Sampling``.
        top_p: see ``Sampling``.
    """
    if temperature == 0 or uniform is None:
        return logits.argmax(dim=-1)
    probabilities = (logits.double() / temperature).softmax(dim=-1)
    if (top_k is not None and top_k < logits.shape[-1]) or top_p < 1:
        probabilities = _nucleus(probabilities, top_k, top_p)
    cumulative = probabilities.cumsum(dim=-1)
    # The last sum may fall short of 1 by rounding.
    total = cumulative[:, -1:]
    point = (uniform[:, None].double() * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(1)


def _nucleus(probabilities: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Probabilities ``[B, V]`` (not normalised) with those of all other tokens set to zero."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered, order = ordered[:, :top_k], order[:, :top_k]
    cumulative = ordered.cumsum(dim=-1)
    # A token stays if those before it have not reached the mark, which before the first are none.
    kept = cumulative - ordered < top_p * cumulative[:, -1:]
    return torch.zeros_like(probabilities).scatter(1, order, ordered.where(kept, 0.0))


def _ended(written: NDArray[np.int64], settings: Sampling) -> NDArray[np.bool_]:
    """Which rows ``[B, n]`` end with one of the stops."""
    ended = np.zeros(len(written), dtype=bool)
    for end in settings.ends:
        if len(end) <= written.shape[1]:
            ended |= (written[:, written.shape[1] - len(end) :] == end).all(axis=1)
    return ended


def _last_logits(net: Backbone, ids: Tensor, segments: Tensor | None, state: Cache) -> tuple[Tensor, Cache]:
    """Logits after the last token of each row ``[B, V]``, and the new state."""
    last = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    last[:, -1] = True
    return net(ids, segments=segments, state=state, select=last)


def _log_probs_of(logits: Tensor, chosen: Tensor) -> LogProbs:
    return logits.double().log_softmax(dim=-1).gather(1, chosen[:, None]).squeeze(1).cpu().numpy()


def _settings(settings: Sampling | None, options: dict[str, Any]) -> Sampling:
    if settings is not None and options:
        raise TypeError(f"give either settings or {', '.join(options)}, not both")
    return Sampling(**options) if settings is None else settings


def _tokens(tokens: AnyTokens, net: Backbone) -> Tokens:
    array = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    if array.ndim != 1 or len(array) == 0 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"a prompt needs at least one token, integers in one dimension; got {array.dtype} {array.shape}"
        )
    if array.min() < 0 or array.max() >= net.vocab_size:
        bad = array[(array < 0) | (array >= net.vocab_size)][0]
        raise ValueError(f"a prompt holds token {bad}; the model has 0 .. {net.vocab_size - 1}")
    return array.astype(np.int64)


def _random(key: Sequence[int]) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key))))


@contextmanager
def _in_eval_mode(net: Backbone) -> Iterator[None]:
    training = [module for module in net.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
