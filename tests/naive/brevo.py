"""Brevo as one would write it down first: plain Python, lists, the ``random`` module."""

from __future__ import annotations

import random
from functools import cache
from itertools import accumulate

from src.datamodules.tasks import Brevo
from tests.naive.packing import Packed, pack


def example(task: Brevo, rng: random.Random, test: bool = False) -> tuple[list[int], list[bool]]:
    """One example: tokens and target-aligned mask."""
    sizes, cumulative = law_of_n(task)
    n = task.N if test else rng.choices(sizes, cum_weights=cumulative)[0]
    parents = graph(rng, n)
    query = n - 1 if task.query == "last" else rng.randrange(3 * n // 4, n)
    edges = [(parent, child) for child in range(n) for parent in parents[child]]
    rng.shuffle(edges)
    answer = ancestors(rng, parents, query)

    names = name_nodes(task, rng, n, {node for edge in edges for node in edge})
    question = [task.bos_id]
    for parent, child in edges:
        question += names[parent] + names[child]
    question += [task.query_id] + names[query]
    solution = [task.ans_id]
    for node in answer:
        solution += names[node]
    solution.append(task.eos_id)
    return question + solution, [False] * len(question) + [True] * len(solution)


@cache
def law_of_n(task: Brevo) -> tuple[list[int], list[float]]:
    """Training sizes and their cumulative weights."""
    sizes = list(range(3, task.N + 1))
    return sizes, list(accumulate(1 / (size + task.N**0.5) for size in sizes))


def graph(rng: random.Random, n: int) -> list[list[int]]:
    """The parents of each node."""
    leaves = rng.randint(1, (n - 1) // 4 + 1)
    parents: list[list[int]] = [[] for _ in range(n)]
    children = [0] * n
    candidates = list(range(leaves))
    for i in range(leaves, n):
        parents[i] = rng.sample(candidates, rng.randint(1, min(len(candidates), 4)))
        for parent in parents[i]:
            children[parent] += 1
            if children[parent] == 4:
                candidates.remove(parent)
        candidates.append(i)
    return parents


def ancestors(rng: random.Random, parents: list[list[int]], query: int) -> list[int]:
    """The query and all that it depends on, peeled off from the query, parents first."""
    needed, todo = {query}, [query]
    while todo:
        for parent in parents[todo.pop()]:
            if parent not in needed:
                needed.add(parent)
                todo.append(parent)
    waiting = dict.fromkeys(needed, 0)
    for node in needed:
        for parent in parents[node]:
            waiting[parent] += 1
    pool, order = [query], []
    while pool:
        node = pool.pop(rng.randrange(len(pool)))
        order.append(node)
        for parent in parents[node]:
            waiting[parent] -= 1
            if waiting[parent] == 0:
                pool.append(parent)
    return order[::-1]


def name_nodes(task: Brevo, rng: random.Random, n: int, listed: set[int]) -> dict[int, list[int]]:
    """The tokens of each node that an edge mentions."""
    if not task.multi_token:
        return dict(enumerate([token] for token in rng.sample(range(1, task.N + 1), n)))
    words: set[tuple[int, ...]] = set()
    while len(words) < len(listed):
        word = [rng.randint(1, task.mini_vocab) for _ in range(rng.randint(*task.word_length))]
        word[-1] += task.mini_vocab
        words.add(tuple(word))
    shuffled = sorted(words)
    rng.shuffle(shuffled)
    return {node: list(word) for node, word in zip(sorted(listed), shuffled, strict=True)}


def windows(task: Brevo, rng: random.Random, count: int, length: int) -> Packed:
    """Training windows: tokens, masks and segments."""
    return pack(lambda: example(task, rng), count, length)
