"""Windows as one would pack them first: lists of lists."""

from __future__ import annotations

from collections.abc import Callable

Packed = tuple[list[list[int]], list[list[bool]], list[list[int]]]


def pack(draw: Callable[[], tuple[list[int], list[bool]]], count: int, length: int) -> Packed:
    """``count`` windows of ``length``: tokens, loss mask and number of the example. ``draw`` makes an example and its mask."""
    rows: Packed = ([], [], [])
    for _ in range(count):
        tokens: list[int] = []
        mask: list[bool] = []
        segments: list[int] = []
        number = 0
        while len(tokens) < length:
            own_tokens, own_mask = draw()
            tokens += own_tokens
            mask += own_mask
            segments += [number] * len(own_tokens)
            number += 1
        rows[0].append(tokens[:length])
        rows[1].append(mask[:length])
        rows[2].append(segments[:length])
    return rows
