"""Brevo: reasoning breadth. List everything a node depends on, parents before children.  (Part 4.1, section 2.1 and appendix A.2)

An example lists the edges of a random directed acyclic graph in random order, asks for one node, and answers with all its ancestors
and itself, in an order in which every node comes behind all of its parents:

    <bos> p1 c1 p2 c2 ... pE cE  <query> q  <ans> a1 a2 ... am <eos>            edge p -> c, "c depends on p";  am = q

Worked example, N = 5, one token a node:

    tokens   <bos> | 2 5 | 4 3 | 4 2 | 1 2 | 2 3 | 1 3 | <query> 5 <ans> 4 1 2 5 <eos>
    graph    2 -> 5,  4 -> 3,  4 -> 2,  1 -> 2,  2 -> 3,  1 -> 3          (3 is a distractor; 1 4 2 5 is right as well)
    learnt   <ans>, the answer and <eos>

The graph: n nodes in random order, the first L without parents, L uniform in 1..floor((n-1)/4)+1; each later node gets 1 to 4 parents
(uniform, at most as many as there are candidates) among the earlier ones that have fewer than 4 children.
The answer is one of many: nodes are peeled off from the query, each time a random one of those whose children are all gone.

    train       n in 3..N with probability proportional to 1/(n + sqrt N)
    val, test   n = N

Brevo1: N = 70/90/110, node = one token of 1..N. Brevo2 (``multi_token``): N = 30/40/50, node = word of two to four tokens, of which
the last is from V+1..2V and the others from 1..V, V = 4.

A model is scored on what it writes by itself behind <ans> (greedily, until <eos>); any valid order is right, and nothing less than a whole
valid answer. ``strict`` (the accuracy) also wants the query last, nothing twice and nothing unfinished; ``official`` accepts what the
release's checkers accept: the right *set*, with every node behind its parents.

Where the paper and the release disagree:

    ``query``        the paper draws the query from the last quarter of the nodes; the release computes that quarter and then always
                     takes the ``last`` node. Default is the release's, which made the published numbers; ``last_quarter`` is the paper's
    ``eos``          the release ends with the id of <ans>, and its own checkers then reject every example; they demand the id of <bos>.
                     Default ``bos``; ``ans`` is the release to the letter; ``own`` a fourth special token, as the paper says
    ``compact_ids``  numbers the special tokens right behind the nodes instead of 9997 and up, for small models
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from src.datamodules.tasks.base import Generation, Score, Split, Task, Windows, check_split
from src.datamodules.tasks.brevo_sampling import MAX_DEGREE, MAX_NODES, Params, fill, write_example
from src.datamodules.tasks.rng import stream_key

DEEPEST_GROUP = 6
SMALL = 11  # nodes, below which guessing is worth reckoning with
BLIND_EXAMPLES = 4000  # from which it is estimated

Word = tuple[int, ...]


class Graph(NamedTuple):
    """An example read back; nodes are words, tuples of tokens."""

    edges: list[tuple[Word, Word]]  # parent, child
    query: Word
    answer: list[Word]
    whole: bool  # the answer ends with a whole word

    def parents(self) -> dict[Word, list[Word]]:
        """The parents of every node that has any."""
        found: dict[Word, list[Word]] = {}
        for parent, child in self.edges:
            found.setdefault(child, []).append(parent)
        return found

    def required(self) -> set[Word]:
        """The query and all its ancestors."""
        parents, found, todo = self.parents(), {self.query}, [self.query]
        while todo:
            for parent in parents.get(todo.pop(), []):
                if parent not in found:
                    found.add(parent)
                    todo.append(parent)
        return found

    def depth(self) -> int:
        """Fewest edges from the query back to a node without parents."""
        parents, level, depth = self.parents(), {self.query}, 0
        seen = set(level)
        while level and all(node in parents for node in level):
            level = {parent for node in level for parent in parents[node]} - seen
            seen |= level
            depth += 1
        return depth

    def num_orders(self) -> int:
        """Number of valid answers: orders of the query's ancestors. Exponential in their number."""
        parents, required = self.parents(), frozenset(self.required())

        @cache
        def count(placed: frozenset[Word]) -> int:
            ready = [node for node in required - placed if placed.issuperset(parents.get(node, []))]
            return sum(count(placed | {node}) for node in ready) if placed != required else 1

        return count(frozenset())

    def is_right(self, strict: bool = True) -> bool:
        """Whether the answer is valid; see the head of this file for ``strict``."""
        parents, seen = self.parents(), set()
        for node in self.answer:
            if any(parent not in seen for parent in parents.get(node, [])):
                return False
            seen.add(node)
        if seen != self.required():
            return False
        tidy = self.whole and len(seen) == len(self.answer) and self.answer[-1] == self.query
        return tidy or not strict


@dataclass(frozen=True)
class Brevo(Task):
    """Ancestors of a node in a random DAG; see the head of this file.

    Args:
        N: most nodes in an example, at least 3.
        multi_token: nodes are words of several tokens (Brevo2).
        mini_vocab: V, inner tokens of words; another V end them. Only with ``multi_token``.
        word_length: fewest and most tokens in a word. Only with ``multi_token``.
        query: the ``last`` node, or one of the ``last_quarter``.
        eos: id that ends the answer: that of ``bos``, of ``ans``, or its ``own``.
        compact_ids: number special tokens right behind the nodes.

    Raises:
        ValueError: for parameters out of range, or when there are not N different words.
    """

    config_name = "brevo"

    N: int = 110
    multi_token: bool = False
    mini_vocab: int = 4
    word_length: tuple[int, int] = (2, 4)
    query: Literal["last", "last_quarter"] = "last"
    eos: Literal["bos", "ans", "own"] = "bos"
    compact_ids: bool = False

    name: ClassVar[str] = "brevo"

    def __post_init__(self) -> None:
        object.__setattr__(self, "word_length", tuple(self.word_length))
        if not 3 <= self.N <= MAX_NODES:
            raise ValueError(f"Brevo.N={self.N}: between 3 and {MAX_NODES}")
        for key, choices in (("query", ("last", "last_quarter")), ("eos", ("bos", "ans", "own"))):
            if getattr(self, key) not in choices:
                raise ValueError(f"Brevo.{key}={getattr(self, key)!r}: choose one of {', '.join(choices)}")
        self._check_words()
        if not self.compact_ids and self._node_ids > 9990:
            raise ValueError(
                f"Brevo: N={self.N} and mini_vocab={self.mini_vocab} reach the special ids at 9996; set compact_ids=true"
            )

    def _check_words(self) -> None:
        if self.mini_vocab < 1:
            raise ValueError(f"Brevo.mini_vocab={self.mini_vocab}: at least 1")
        if len(self.word_length) != 2 or not 1 <= self.word_length[0] <= self.word_length[1] <= 16:
            raise ValueError(f"Brevo.word_length={self.word_length}: two numbers, 1 <= shortest <= longest <= 16")
        words = sum(self.mini_vocab**length for length in range(self.word_length[0], self.word_length[1] + 1))
        if self.multi_token and words < self.N:
            raise ValueError(
                f"Brevo.N={self.N}: only {words} different words exist with mini_vocab={self.mini_vocab} and "
                f"word_length={self.word_length}; raise one of these or lower N"
            )
        if (self.mini_vocab + 1) ** self.word_length[1] >= 2**62:
            raise ValueError(f"Brevo.word_length={self.word_length} is too long for mini_vocab={self.mini_vocab}")

    # ---- vocabulary ------------------------------------------------------------------------------------------------

    @property
    def _node_ids(self) -> int:
        return 2 * self.mini_vocab if self.multi_token else self.N

    @property
    def query_id(self) -> int:
        """Id of <query>."""
        return self._node_ids + 1 if self.compact_ids else 9997

    @property
    def ans_id(self) -> int:
        """Id of <ans>."""
        return self._node_ids + 2 if self.compact_ids else 9998

    @property
    def bos_id(self) -> int:
        """Id of <bos>; 0 is free in the compact numbering."""
        return 0 if self.compact_ids else 9999

    @property
    def eos_id(self) -> int:
        """Id of <eos>."""
        own = self._node_ids + 3 if self.compact_ids else 9996
        return {"bos": self.bos_id, "ans": self.ans_id, "own": own}[self.eos]

    @property
    def vocab_size(self) -> int:
        """10,000 with the release's ids."""
        return self._node_ids + 4 if self.compact_ids else 10_000

    def vocabulary(self) -> dict[str, Any]:
        """See ``Task.vocabulary``."""
        inner = self.mini_vocab if self.multi_token else None
        return {"mini_vocab": inner, "query": self.query_id, "ans": self.ans_id, "bos": self.bos_id, "eos": self.eos_id}

    # ---- laws ------------------------------------------------------------------------------------------------------

    @cached_property
    def length_probabilities(self) -> NDArray[np.float64]:
        """P(n) in training for n = 3..N."""
        weights = 1.0 / (np.arange(3, self.N + 1) + self.N**0.5 + 1e-12)
        return weights / weights.sum()

    @property
    def groups(self) -> tuple[str, ...]:
        """``depth1`` ... ``depth6+``: fewest edges from the query back to a node without parents."""
        deepest = min(self.N - 1, DEEPEST_GROUP)
        return tuple(f"depth{d}{'+' if d == DEEPEST_GROUP else ''}" for d in range(1, deepest + 1))

    @property
    def extras(self) -> tuple[str, ...]:
        """``official``: answers that the release's checkers accept."""
        return ("official",)

    def chance(self, group: str) -> float:
        """How often the best guess that ignores the edges is right at this depth; called 0 from N = 11 on, where it is below 0.3%."""
        return self._blind_guess.get(group, 0.0) if self.N < SMALL else 0.0

    def overall_chance(self) -> float:
        """The same over all depths."""
        return self._blind_guess["all"] if self.N < SMALL else 0.0

    @cached_property
    def _blind_guess(self) -> dict[str, float]:
        """A guess is m - 1 of the other nodes, at random and in random order, and the query last: for the m that is best over all.

        Of (n - 1)! / (n - m)! such guesses those are right that are an order of the answer's own nodes. Means over examples.
        """
        right = np.zeros((len(self.groups), self.N + 1))
        examples = np.zeros(len(self.groups))
        for index in range(BLIND_EXAMPLES):
            graph = self.parse(self.example(0, "test", index)[0])
            listed = len({node for edge in graph.edges for node in edge})
            m, depth = len(graph.answer), min(graph.depth(), len(self.groups)) - 1
            right[depth, m] += graph.num_orders() / math.perm(listed - 1, m - 1)
            examples[depth] += 1
        best = right.sum(axis=0).argmax()
        found = {group: float(right[d, best] / max(examples[d], 1)) for d, group in enumerate(self.groups)}
        return found | {"all": float(right[:, best].sum() / BLIND_EXAMPLES)}

    @property
    def generation(self) -> Generation:
        """Greedy, with room for a quarter more words than there are nodes."""
        longest = self.word_length[1] if self.multi_token else 1
        return Generation(stop=self.eos_id, max_new_tokens=(self.N + self.N // 4) * longest + 1)

    # ---- generation ------------------------------------------------------------------------------------------------

    def _params(self, split: Split) -> Params:
        check_split(split)
        return Params(
            n_max=self.N,
            cumulative=np.cumsum(self.length_probabilities) if split == "train" else np.empty(0),
            multi_token=self.multi_token,
            inner=self.mini_vocab,
            shortest=self.word_length[0] if self.multi_token else 1,
            longest=self.word_length[1] if self.multi_token else 1,
            last_quarter=self.query == "last_quarter",
            bos=self.bos_id,
            query=self.query_id,
            ans=self.ans_id,
            eos=self.eos_id,
        )

    @property
    def max_length(self) -> int:
        """Tokens in the longest possible example: every node but the first has four parents."""
        longest = self.word_length[1] if self.multi_token else 1
        return 4 + (2 * MAX_DEGREE * (self.N - 1) + 1 + self.N) * longest

    @property
    def min_window(self) -> int:
        """Holds an example of N nodes with the mean number of parents and words of mean length, and a fifth more.

        Longer ones are rare, and cost nothing but a cut: answers are written example by example.
        """
        mean = (self.word_length[0] + self.word_length[1]) / 2 if self.multi_token else 1
        return int(1.2 * (4 + (2 * 2.25 * self.N + 0.5 * self.N) * mean))

    def example(self, seed: int, split: Split, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """See ``Task.example``."""
        # Words are written with their whole rows: the last one's surplus needs room.
        tokens = np.empty(self.max_length + self.word_length[1], dtype=np.int64)
        mask = np.empty(self.max_length, dtype=np.bool_)
        size = write_example(self._params(split), stream_key(self.name, seed, split), index, tokens, mask)
        return tokens[:size].copy(), mask[:size].copy()

    def examples_per_window(self, split: Split, length: int) -> int:
        """See ``Task.examples_per_window``: as many as the shortest examples would take."""
        # Two edges among n >= 3 nodes, or n - L of them; the query; an answer of two words.
        edges = 2 if split == "train" else self.N - (self.N - 1) // MAX_DEGREE - 1
        shortest = 4 + (2 * edges + 1 + 2) * (self.word_length[0] if self.multi_token else 1)
        return -(-length // shortest)

    def windows(self, seed: int, split: Split, first: int, count: int, length: int) -> Windows:
        """See ``Task.windows``."""
        params = self._params(split)
        per_window = self.examples_per_window(split, length)
        found, key = Windows.empty(count, length), stream_key(self.name, seed, split)
        fill(params, key, first, per_window, self.max_length, found.tokens, found.loss_mask, found.segments)
        return found

    # ---- reading ---------------------------------------------------------------------------------------------------

    def prompt_length(self, tokens: NDArray[np.int64]) -> int:
        """Everything up to and including <ans>."""
        return int(np.argmax(tokens == self.ans_id)) + 1

    def words(self, tokens: NDArray[np.int64]) -> tuple[list[Word], bool]:
        """Cuts tokens into words; the second value says whether the last one is whole (an unfinished one is dropped)."""
        if not self.multi_token:
            return [(int(token),) for token in tokens], True
        found, word = [], []
        for token in tokens:
            word.append(int(token))
            if self.mini_vocab < token <= 2 * self.mini_vocab:
                found.append(tuple(word))
                word = []
        return found, not word

    def parse(self, tokens: NDArray[np.int64]) -> Graph:
        """Reads one example back, as given or as written by a model.

        Raises:
            ValueError: when it is not <bos> edges <query> node <ans> answer <eos>.
        """
        tokens = np.asarray(tokens)
        if len(tokens) < 2 or tokens[0] != self.bos_id or tokens[-1] != self.eos_id:
            raise ValueError("an example starts with <bos> and ends with <eos>")
        asked = np.flatnonzero(tokens == self.query_id)
        answered = np.flatnonzero(tokens[:-1] == self.ans_id)
        if not len(asked) or not len(answered) or asked[0] > answered[0]:
            raise ValueError("an example has <query>, and behind it <ans>")
        nodes, _ = self.words(tokens[1 : asked[0]])
        query, _ = self.words(tokens[asked[0] + 1 : answered[0]])
        answer, whole = self.words(tokens[answered[0] + 1 : -1])
        if len(nodes) % 2 or len(query) != 1:
            raise ValueError(f"{len(nodes)} nodes in the edges, an even number expected; {len(query)} nodes asked for")
        return Graph(list(zip(nodes[::2], nodes[1::2], strict=True)), query[0], answer, whole)

    def score(self, tokens: NDArray[np.int64], predictions: NDArray[np.int64]) -> Score:
        """Valid answers by depth of the query. An answer cut by the window's end does not count; one that is padded instead is wrong."""
        counts: dict[str, tuple[int, int]] = dict.fromkeys(self.groups, (0, 0))
        official = (0, 0)
        for row, predicted in zip(np.asarray(tokens), np.asarray(predictions), strict=True):
            for start, ans, end in self._examples(row):
                written = np.concatenate((row[start : ans + 1], predicted[ans + 1 : end]))
                graph = self.parse(np.append(row[start : ans + 1], self.eos_id))
                group = self.groups[min(graph.depth(), len(self.groups)) - 1]
                counts[group] = (counts[group][0] + self.is_valid(written), counts[group][1] + 1)
                official = (official[0] + self.is_valid(written, strict=False), official[1] + 1)
        return Score(counts, {"official": official})

    def _examples(self, row: NDArray[np.int64]) -> list[tuple[int, int, int]]:
        """Start, position of <ans> and end of every example of a row whose end is in sight."""
        found, start = [], 0
        while start < len(row) and row[start] == self.bos_id:
            answered = np.flatnonzero(row[start:] == self.ans_id)
            if not len(answered):
                break
            ans = start + int(answered[0])
            ends = np.flatnonzero((row[ans + 1 :] == self.eos_id) | (row[ans + 1 :] < 0))
            if not len(ends):
                break
            end = ans + 1 + int(ends[0])
            found.append((start, ans, end + 1))
            start = end + 1
        return found

    def is_valid(self, written: NDArray[np.int64], strict: bool = True) -> bool:
        """Whether a whole example, <bos> to <eos>, has a valid answer; see the head of this file for ``strict``."""
        try:
            return self.parse(written).is_right(strict)
        except ValueError:
            return False

    def describe(self, tokens: NDArray[np.int64]) -> str:
        """The edges, the question, what is needed for it, and the answer, in words."""
        graph = self.parse(tokens)
        names = {node: ".".join(map(str, node)) for edge in graph.edges for node in edge}
        parents, required = graph.parents(), graph.required()
        lines = [
            "edges     " + "  ".join(f"{names[parent]}->{names[child]}" for parent, child in graph.edges),
            f"question  all that {names[graph.query]} depends on, parents first ({graph.depth()} deep)",
        ]
        lines += [
            f"          {names[node]} needs {', '.join(names[p] for p in parents[node])}"
            for node in graph.answer
            if node in parents
        ]
        idle = sorted(node for node in names if node not in required)
        lines.append(f"idle      {', '.join(names[node] for node in idle) or 'none'}")
        lines.append(f"answer    {' '.join(names.get(node, str(node)) for node in graph.answer)}")
        return "\n".join(lines)
