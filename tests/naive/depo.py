"""Depo in plain Python, as one would first write it: slow, short, and the yardstick for the law and the speed of the real one."""

from __future__ import annotations

import random
from itertools import accumulate

from src.datamodules.tasks import Depo
from tests.naive.packing import Packed, pack

Word = tuple[int, ...]


def draw_words(task: Depo, rng: random.Random, n: int) -> list[Word]:
    """``n`` distinct words in random order."""
    words: set[Word] = set()
    while len(words) < n:
        size = rng.randint(*task.word_length)
        word = [rng.randint(1, task.mini_vocab) for _ in range(size)]
        word[-1] += task.mini_vocab
        words.add(tuple(word))
    shuffled = list(words)
    rng.shuffle(shuffled)
    return shuffled


def example(task: Depo, rng: random.Random, n: int) -> tuple[list[int], list[bool]]:
    """One training example over ``n`` words: tokens and target-aligned loss mask."""
    cycle = draw_words(task, rng, n)
    tokens, mask = [task.bos_id], [False]
    for i in rng.sample(range(n), n):
        edge = [task.separator_id] if task.separator else []
        edge += [*cycle[i], *cycle[(i + 1) % n]]
        tokens += edge
        mask += [False] * len(edge)
    for i in rng.sample(range(n), min(n, task.questions)):
        k = rng.randint(1, task.K)
        question = [task.query_id + k, *cycle[i]]
        answer = [task.ans_id, *cycle[(i + k) % n]]
        tokens += question + answer
        mask += [False] * len(question) + [True] * len(answer)
    return tokens, mask


def windows(task: Depo, rng: random.Random, count: int, length: int) -> Packed:
    """``count`` training windows of ``length`` tokens: tokens, loss masks and numbers of examples."""
    sizes = range(3, task.N + 1)
    weights = list(accumulate(1 / (n + task.N**0.5) if task.length_law == "weighted" else 1 for n in sizes))
    return pack(lambda: example(task, rng, rng.choices(sizes, cum_weights=weights)[0]), count, length)
