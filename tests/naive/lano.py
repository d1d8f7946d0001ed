"""Lano written plainly: a reference for what `Lano.windows` draws, and for how fast it is."""

import random

from src.datamodules.tasks.lano import Lano


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


def windows(task: Lano, rng: random.Random, count: int, length: int) -> tuple[list, list, list]:
    """``count`` windows of ``length``: tokens, loss mask and number of the example, as lists of lists."""
    grammar = task.language
    rules = {symbol: grammar.rules_of(symbol) for layer in grammar.layers[:-1] for symbol in layer}
    all_tokens, all_masks, all_segments = [], [], []
    for _ in range(count):
        tokens: list[int] = []
        segments: list[int] = []
        number = 0
        while len(tokens) < length:
            example = [task.bos_id, *sentence(rules, grammar.root, rng)]
            if task.terminator == "eos":
                example.append(task.eos_id)
            tokens += example
            segments += [number] * len(example)
            number += 1
        all_tokens.append(tokens[:length])
        all_masks.append([True] * length)
        all_segments.append(segments[:length])
    return all_tokens, all_masks, all_segments
