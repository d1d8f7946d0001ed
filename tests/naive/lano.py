"""Lano written plainly: a reference for what `Lano.windows` draws, and for how fast it is."""

import random

from src.datamodules.tasks.lano import Lano
from tests.naive.packing import Packed, pack


def sentence(rules: dict[int, tuple], root: int, rng: random.Random) -> list[int]:
    """The terminals of a random derivation: one uniform draw for each symbol, parents before children, left before right."""
    written: list[int] = []

    def expand(symbol: int) -> None:
        if symbol not in rules:
            written.append(symbol)
            return
        for child in rng.choice(rules[symbol]):
            expand(child)

    expand(root)
    return written


def windows(task: Lano, rng: random.Random, count: int, length: int) -> Packed:
    """``count`` windows of ``length``: tokens, loss mask and number of the example, as lists of lists."""
    grammar = task.language
    rules = {symbol: grammar.rules_of(symbol) for layer in grammar.layers[:-1] for symbol in layer}

    def example() -> tuple[list[int], list[bool]]:
        tokens = [task.bos_id, *sentence(rules, grammar.root, rng)]
        if task.terminator == "eos":
            tokens.append(task.eos_id)
        return tokens, [True] * len(tokens)

    return pack(example, count, length)
