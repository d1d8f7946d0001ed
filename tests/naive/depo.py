"""Depo in plain Python, as one would first write it: slow, short, and the yardstick for the law and the speed of the real one."""

from __future__ import annotations

import random

from src.datamodules.tasks import Depo

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


def windows(
    task: Depo, rng: random.Random, count: int, length: int
) -> tuple[list[list[int]], list[list[bool]], list[list[int]]]:
    """``count`` training windows of ``length`` tokens: tokens, loss masks and numbers of examples."""
    sizes = range(3, task.N + 1)
    weights = [1 / (n + task.N**0.5) if task.length_law == "weighted" else 1 for n in sizes]
    all_tokens, all_masks, all_segments = [], [], []
    for _ in range(count):
        tokens: list[int] = []
        mask: list[bool] = []
        segments: list[int] = []
        number = 0
        while len(tokens) < length:
            own_tokens, own_mask = example(task, rng, rng.choices(sizes, weights)[0])
            tokens += own_tokens
            mask += own_mask
            segments += [number] * len(own_tokens)
            number += 1
        all_tokens.append(tokens[:length])
        all_masks.append(mask[:length])
        all_segments.append(segments[:length])
    return all_tokens, all_masks, all_segments
