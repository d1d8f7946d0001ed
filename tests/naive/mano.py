"""Mano as one would write it down first: plain Python, recursion, the ``random`` module."""

from __future__ import annotations

import random
from functools import lru_cache

from src.datamodules.tasks import Mano
from tests.naive.packing import Packed, pack


def expression(task: Mano, rng: random.Random, operators: int, tokens: list[int]) -> int:
    """Writes an expression in prefix notation to the end of ``tokens``; returns its value."""
    names = ids(task)
    if operators == 0:
        value = rng.randrange(task.modulus)
        tokens.append(names["value"][value])
        return value
    op = rng.randrange(3)
    inside = rng.randrange(operators)
    tokens.append(names["operator"][synonym(task, rng)][op])
    left = expression(task, rng, inside, tokens)
    right = expression(task, rng, operators - 1 - inside, tokens)
    if op == 0:
        return (left + right) % task.modulus
    return (left - right if op == 1 else left * right) % task.modulus


@lru_cache(maxsize=1)
def ids(task: Mano) -> dict[str, list]:
    """The task's token ids as plain lists."""
    return {kind: rows.tolist() for kind, rows in task.ids.items()}


def synonym(task: Mano, rng: random.Random) -> int:
    """Which of a token's two names."""
    return rng.randrange(2) if task.synonyms else 0


def example(task: Mano, rng: random.Random, test: bool = False) -> tuple[list[int], list[bool]]:
    """One example: tokens and target-aligned mask."""
    operators = task.L if test else rng.randint(1, task.L)
    names = ids(task)
    tokens = [names["bos"][synonym(task, rng)], names["length"][synonym(task, rng)][operators]]
    value = expression(task, rng, operators, tokens)
    tokens += [names["ans"][synonym(task, rng)][operators], names["value"][value]]
    return tokens, [task.loss == "all"] * (len(tokens) - 1) + [True]


def windows(task: Mano, rng: random.Random, count: int, length: int) -> Packed:
    """Training windows: tokens, masks and segments."""
    return pack(lambda: example(task, rng), count, length)
