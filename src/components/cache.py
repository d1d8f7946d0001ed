"""What a model remembers between calls: one object for every mixer and every Canon point.

    cache = net.initial_state()
    logits, cache = net(prompt, state=cache)          # prefill
    logits, cache = net(token, state=cache)           # one more token
    two = cache.select([0, 0])                        # the same past twice, to try two continuations

A cache is never changed: each call returns a new one, and the old one can be used again. To make that cheap, the long parts (keys and
values of attention) share buffers with spare room, see ``Growing``.

Legend: B batch, S tokens remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.components.kernels.causal_conv import ConvState
from src.components.kernels.recurrence import RecurrentState
from src.components.mixers.base import State


class _Buffer:
    """Room for ``[B, capacity, ...]``, of which the first ``used`` columns belong to somebody."""

    def __init__(self, tensor: Tensor, used: int):
        self.tensor, self.used = tensor, used


class Growing:
    """A history ``[B, S, ...]`` that grows along S. Like a tuple it never changes: ``append`` returns a longer one.

    Both stand in one buffer with spare room, in which nobody's columns are ever written twice: whoever appends first takes the room behind
    them, and a second continuation of the same history gets a buffer of its own. A full buffer is replaced by one of twice the length, so
    that S tokens appended one by one cost at most 2 S copies. While gradients are recorded, nothing is written in place.

    Attributes:
        total: columns appended so far, those that ``last`` has dropped included.
    """

    def __init__(self, buffer: _Buffer, start: int, stop: int, total: int):
        self._buffer, self._start, self._stop, self.total = buffer, start, stop, total

    @classmethod
    def of(cls, tensor: Tensor, total: int | None = None) -> Growing:
        """The history that ``tensor`` ``[B, S, ...]`` is; it must not be written to afterwards."""
        length = tensor.shape[1]
        return cls(_Buffer(tensor, length), 0, length, length if total is None else total)

    @property
    def tensor(self) -> Tensor:
        """``[B, S, ...]``, a view to read from."""
        return self._buffer.tensor[:, self._start : self._stop]

    def __len__(self) -> int:
        """S."""
        return self._stop - self._start

    def append(self, x: Tensor) -> Growing:
        """The history with x ``[B, T, ...]`` behind it, in this history's dtype."""
        x, total = x.to(self._buffer.tensor.dtype), self.total + x.shape[1]
        if torch.is_grad_enabled():
            return Growing.of(torch.cat((self.tensor, x), dim=1), total)
        buffer, stop = self._buffer, self._stop + x.shape[1]
        writable = buffer.tensor.is_inference() == torch.is_inference_mode_enabled()
        if writable and buffer.used == self._stop and stop <= buffer.tensor.shape[1]:
            buffer.tensor[:, self._stop : stop] = x
            buffer.used = stop
            return Growing(buffer, self._start, stop, total)
        past = self.tensor
        length = past.shape[1] + x.shape[1]
        room = past.new_empty(past.shape[0], max(length, 2 * past.shape[1]), *past.shape[2:])
        room[:, : past.shape[1]] = past
        room[:, past.shape[1] : length] = x
        return Growing(_Buffer(room, length), 0, length, total)

    def last(self, count: int) -> Growing:
        """The last ``count`` columns; a buffer much longer than that is let go."""
        if len(self) <= count:
            return self
        if self._buffer.tensor.shape[1] <= 3 * count:
            return Growing(self._buffer, self._stop - count, self._stop, self.total)
        return Growing.of(self.tensor[:, len(self) - count :].clone(), self.total)

    def map(self, function: Callable[[Tensor], Tensor]) -> Growing:
        """The history with ``function`` applied to its tensor, which may change all but S."""
        tensor = self.tensor
        changed = function(tensor)
        return self if changed is tensor else Growing.of(changed, self.total)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, its spare room included."""
        return self._buffer.tensor.nbytes

    # Counted like a tensor, by what it holds and not by the room that it has.

    def numel(self) -> int:
        """Numbers held."""
        return self.tensor.numel()

    def is_floating_point(self) -> bool:
        """Whether they are floating point."""
        return self._buffer.tensor.is_floating_point()


# Named tuples that mixers may keep in their state, under the names that they have in a stored cache.
TUPLES: dict[str, type] = {"ConvState": ConvState, "RecurrentState": RecurrentState}

MOST_BLOCKS = 65_536
"""Blocks in a stored cache: the file may be a stranger's, and each takes memory."""


class Cache:
    """What a model remembers, one ``State`` per block: indexed and iterated over like a list of them.

    Leaves are tensors with the batch first, ``Growing`` histories, the named tuples of ``TUPLES``, and numbers that all rows share.

    Args:
        blocks: the blocks' states; ``{}`` before the first token.
        num_tokens: real tokens seen so far: one number while all rows have seen equally many, else ``[B]``.
    """

    def __init__(self, blocks: Iterable[State], num_tokens: int | Tensor = 0):
        self.blocks = list(blocks)
        self.num_tokens = num_tokens

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, block: int) -> State:
        return self.blocks[block]

    def __iter__(self) -> Iterator[State]:
        return iter(self.blocks)

    def __repr__(self) -> str:
        return f"Cache({len(self)} blocks, batch_size={self.batch_size}, num_tokens={self.num_tokens}, {self.nbytes:,} bytes)"

    @property
    def batch_size(self) -> int | None:
        """B, or None before the first token."""
        return next(
            (leaf.tensor.shape[0] if isinstance(leaf, Growing) else leaf.shape[0] for leaf in self._leaves()), None
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, spare room included; what several parts share counts once."""
        sizes: dict[int, int] = {}
        for leaf in self._leaves():
            buffer = leaf._buffer.tensor if isinstance(leaf, Growing) else leaf
            storage = buffer.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return sum(sizes.values())

    def numel(self) -> int:
        """Floating-point numbers held: B times the model's ``state_size``."""
        return sum(leaf.numel() for leaf in self._leaves() if leaf.is_floating_point())

    def check(self, depth: int, batch_size: int) -> None:
        """Raises a ValueError when this cache belongs to a model of another depth, or to another number of rows."""
        if len(self) != depth:
            raise ValueError(f"state has {len(self)} blocks but the model {depth}: it belongs to another model")
        if self.batch_size not in (None, batch_size):
            raise ValueError(
                f"state holds {self.batch_size} rows but ids {batch_size}; pick or repeat rows with state.select(rows)"
            )

    def advanced(self, blocks: Iterable[State], time: int, segments: Tensor | None) -> Cache:
        """The cache after a call of ``time`` tokens ``[B, T]`` with these document numbers, given the blocks' new states."""
        more = time if segments is None else (segments >= 0).sum(dim=1)
        return Cache(blocks, self.num_tokens + more)

    def select(self, rows: Tensor | NDArray[Any] | Sequence[int]) -> Cache:
        """Some of the rows, in any order and as often as wanted.

        Args:
            rows: row numbers ``[R]``, or ``[B]`` booleans.

        Raises:
            IndexError: for a row that does not exist.
        """
        chosen = rows if isinstance(rows, Tensor) else torch.from_numpy(np.asarray(rows))
        if chosen.dtype != torch.bool:
            chosen = chosen.long()
        return self._map(lambda tensor: tensor[chosen.to(tensor.device)])

    def detach(self) -> Cache:
        """The same, cut off from the graph of gradients (truncated backpropagation through time)."""
        return self._map(lambda tensor: tensor.detach() if tensor.requires_grad else tensor)

    def to(self, device: torch.device | str) -> Cache:
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers by name, without spare room; ``torch.load(weights_only=True)`` reads them back.

        Raises:
            TypeError: when a mixer keeps something else than what ``Cache`` lists.
        """
        count = self.num_tokens.detach().clone() if isinstance(self.num_tokens, Tensor) else self.num_tokens
        found: dict[str, Any] = {"num_blocks": len(self), "num_tokens": count}
        for number, block in enumerate(self.blocks):
            _flatten(block, str(number), found)
        return found

    @classmethod
    def from_state_dict(cls, stored: dict[str, Any]) -> Cache:
        """The reverse of ``state_dict``.

        Raises:
            ValueError: when that is not what ``stored`` is.
        """
        try:
            depth, num_tokens = stored["num_blocks"], stored["num_tokens"]
            # Blocks that remember nothing have no names: what is stored does not tell how many there are.
            if not _is_count(depth) or depth > MOST_BLOCKS:
                raise TypeError(f"num_blocks is {depth!r:.50}, not a number up to {MOST_BLOCKS}")
            if not (_is_count(num_tokens) or _are_counts(num_tokens)):
                raise TypeError("num_tokens is neither a number from 0 nor one for each row")
            blocks: list[State] = [{} for _ in range(depth)]
            for name, value in stored.items():
                if (
                    isinstance(value, Tensor)
                    and value.numel() * value.element_size() > value.untyped_storage().nbytes()
                ):
                    raise ValueError(f"{name!r:.200} is a view of less than it shows")
                if name not in ("num_blocks", "num_tokens"):
                    block, *path = name.split(".")
                    _insert(blocks[_block_number(block)], path, value)
            return cls([_rebuild(block) for block in blocks], num_tokens)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a stored cache: {error!r:.500}") from error

    def _map(self, function: Callable[[Tensor], Tensor]) -> Cache:
        count = self.num_tokens
        return Cache(
            [_map(block, function) for block in self.blocks], function(count) if isinstance(count, Tensor) else count
        )

    def _leaves(self) -> list[Any]:
        found: list[Any] = []
        for block in self.blocks:
            _collect(block, found)
        return found


def _map(node: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(node, Tensor):
        return function(node)
    if isinstance(node, Growing):
        return node.map(function)
    if isinstance(node, dict):
        return {name: _map(value, function) for name, value in node.items()}
    if isinstance(node, tuple):
        values = [_map(value, function) for value in node]
        return type(node)(*values) if hasattr(node, "_fields") else tuple(values)
    return node


def _collect(node: Any, found: list[Any]) -> None:
    if isinstance(node, (Tensor, Growing)):
        found.append(node)
    elif isinstance(node, (dict, tuple)):
        for value in node.values() if isinstance(node, dict) else node:
            _collect(value, found)


# A stored name is the path to a value. What is no dictionary says what it is: "0.mixer.keys:Growing.tensor", "0.A:ConvState.inputs".


def _flatten(node: Any, path: str, found: dict[str, Any]) -> None:
    if isinstance(node, Tensor):
        found[path] = node.detach().clone()  # a view would be stored with all that it is a view of
    elif isinstance(node, dict):
        for name, value in node.items():
            if not isinstance(name, str) or "." in name or ":" in name:
                raise TypeError(f"{path}: cannot store the name {name!r}; strings without . and : can be")
            _flatten(value, f"{path}.{name}", found)
    elif isinstance(node, Growing):
        _flatten({"tensor": node.tensor, "total": node.total}, f"{path}:Growing", found)
    elif type(node).__name__ in TUPLES and isinstance(node, tuple):
        _flatten(node._asdict(), f"{path}:{type(node).__name__}", found)  # type: ignore[attr-defined]
    elif node is None or isinstance(node, (bool, int, float, str)):
        found[path] = node
    else:
        kinds = f"tensors, Growing, {', '.join(TUPLES)}, dictionaries and numbers"
        raise TypeError(f"{path}: cannot store {type(node).__name__}; a mixer's state may hold {kinds}")


def _insert(node: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        node = node.setdefault(name, {})
    node[path[-1]] = value


def _rebuild(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    found = {}
    for stored_name, stored in node.items():
        name, _, kind = stored_name.partition(":")
        value = _rebuild(stored)
        if kind == "Growing":
            tensor, total = value["tensor"], value["total"]
            if not isinstance(tensor, Tensor) or tensor.ndim < 2 or not _is_count(total) or total < tensor.shape[1]:
                raise TypeError(f"{name} is no history [B, S, ...] of {total!r:.50} columns")
            value = Growing.of(tensor, total)
        elif kind:
            value = TUPLES[kind](**value)
            if not all(isinstance(field, Tensor) for field in value):
                raise TypeError(f"{name} is no {kind}: its fields are tensors")
        found[name] = value
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_counts(value: Any) -> bool:
    whole = isinstance(value, Tensor) and value.ndim == 1 and value.dtype in (torch.int64, torch.int32)
    return whole and not bool((value < 0).any())


def _block_number(name: str) -> int:
    # int() also reads "-1", which would be the last block.
    if not (name.isascii() and name.isdigit()):
        raise TypeError(f"{name!r:.50} is no number of a block")
    return int(name)
