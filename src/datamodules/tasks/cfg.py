"""Layered context-free grammars: what they are, where they come from, and what can be said about their sentences exactly.

    layer 0          the root
    layer 1 .. D-1   non-terminals
    layer D          terminals 1..V

Every rule turns a symbol of one layer into one to three symbols of the next, so every leaf of a derivation tree has depth D.
A sentence is drawn from the root down: each symbol picks one of its rules uniformly, in pre-order. No probabilities are stored.

Ids, as in the release: terminals 1..V; V+1 end of sentence, V+2 mask, V+3 separator (reserved); non-terminals from V+4, the lowest
layer first and the root last. cfg3b, 3f, 3g, 3h, 3i (D = 6) and 3j, 3k (D = 7) are the published tables, as readable files in
``grammars/``:

    {"name": "cfg3k", "about": "...", "terminals": 3,
     "layers": [{"25": "22 23 | 24 24 | 24 23"}, {"22": "21 19 | 21 20 20 | 21 21 | 19 21", "23": ...}, ...]}

cfg3e1 and cfg3e2 have layers of up to 81 symbols. Their published tables are not at hand, so these two files hold what the random
builder needs to make a grammar of the same layers and nearly the same lengths and entropy: *of the family, not the same grammars*.

    {"name": "cfg3e1", "about": "...", "builder": {"sizes": [1, 3, 9, 27, 81, 27, 9], "rules": [3, 3], "length": [2, 3], "seed": 8882}}

Moments follow from the rules by recursion from the terminals up. With A -> X1 .. Xr one of n_A equally likely rules,

    E[A] = mean_r sum E[X]       H[A] = log2 n_A + mean_r sum H[X]       N[A] = sum_r prod N[X]       (length, entropy, derivations)
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from src.datamodules.tasks.rng import below, seed_stream, stream_key

Rule = tuple[int, ...]

RESERVED = 3  # ids between the terminals and the non-terminals
LONGEST_RULE = 3
LONGEST_SENTENCE = 16_384
MOST_SYMBOLS = 65_536  # terminals, and non-terminals; a file may be a stranger's, and each of them takes memory
MOST_RULES = 2**20
DEEPEST = 256  # the longest sentence may be 3 to the power of this, before it is found too long
LARGEST_FILE = 2**24
_FOLDER = Path(__file__).parent / "grammars"


class Tables(NamedTuple):
    """A grammar as arrays for compiled code; S is one more than the largest id, R the number of rules."""

    root: int
    terminals: int  # V
    lowest: int  # the first non-terminal; all from here to the root are, lower layers first
    upper: int  # the first non-terminal whose children are not terminals
    first_rule: NDArray[np.int64]  # [S + 1]; the rules of symbol s are first_rule[s] .. first_rule[s + 1] - 1
    size: NDArray[np.int64]  # [R], symbols in a rule
    children: NDArray[np.int64]  # [R, 3], zeros behind
    stacked: NDArray[np.int64]  # [R, 3], the children from last to first, zeros behind
    shortest: NDArray[np.int64]  # [S], fewest tokens that a symbol becomes
    deepest: int  # a bound of the symbols that wait while a sentence is written


@dataclass(frozen=True)
class Grammar:
    """A layered grammar; see the head of this file.

    Args:
        name: what it is called.
        sizes: symbols in each layer, root first, terminals last.
        rules: ``rules[k]`` are the rules of symbol ``first_id + k``; symbols are written as ids.

    Raises:
        ValueError: when this is not a layered grammar.
    """

    name: str
    sizes: tuple[int, ...]
    rules: tuple[tuple[Rule, ...], ...]

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or self.sizes[0] != 1 or min(self.sizes) < 1:
            raise ValueError(
                f"{self.label}: layer sizes {_short(self.sizes)}: one root, then at least one symbol in each of one or more layers"
            )
        _check_sizes(self.label, self.sizes)
        if len(self.rules) != sum(self.sizes[:-1]):
            raise ValueError(
                f"{self.label}: rules for {len(self.rules)} symbols, but {sum(self.sizes[:-1])} non-terminals"
            )
        for layer, (symbols, below_it) in enumerate(zip(self.layers, self.layers[1:], strict=False)):
            for symbol in symbols:
                if not self.rules_of(symbol):
                    raise ValueError(f"{self.label}: symbol {symbol} of layer {layer} has no rules")
                for rule in self.rules_of(symbol):
                    if not 1 <= len(rule) <= LONGEST_RULE or any(child not in below_it for child in rule):
                        raise ValueError(
                            f"{self.label}: rule {symbol} -> {_short(' '.join(map(str, rule)))}: one to {LONGEST_RULE} symbols of the "
                            f"next layer, {below_it.start}..{below_it.stop - 1}"
                        )
        if self.max_length > LONGEST_SENTENCE:
            raise ValueError(f"{self.label}: sentences of up to {self.max_length} tokens; at most {LONGEST_SENTENCE}")

    # ---- where grammars come from ------------------------------------------------------------------------------------

    @classmethod
    def load(cls, name: str) -> Grammar:
        """A shipped grammar by name, or one of your own by the path of its file."""
        path = Path(name) if name.endswith(".json") else _FOLDER / f"{name}.json"
        if not _is_file(path):
            raise ValueError(
                f"grammar={name!r}: choose {', '.join(cls.shipped())}, or the path of a .json file that exists"
            )
        try:
            with path.open("rb") as file:
                data = file.read(LARGEST_FILE + 1)
            if len(data) > LARGEST_FILE:
                raise ValueError(f"larger than {LARGEST_FILE} bytes")
            return cls.from_dict(json.loads(data.decode()))
        except RecursionError:
            raise ValueError(f"grammar={name!r}: nested too deep") from None
        except (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            raise ValueError(f"grammar={name!r}: {error}") from error

    @classmethod
    def shipped(cls) -> tuple[str, ...]:
        """Names of the grammars that come with the project."""
        return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Grammar:
        """What a grammar file holds: rules by layer, or what the builder needs."""
        if not isinstance(content, Mapping) or not (
            {"name", "builder"} <= set(content) or {"name", "terminals", "layers"} <= set(content)
        ):
            raise ValueError("a grammar file has a name, and either terminals, layers, or a builder")
        if not isinstance(content["name"], str):
            raise ValueError(f"its name is a {type(content['name']).__name__}, not a string")
        if "builder" in content:
            _only_keys(content, {"name", "about", "builder"})
            _only_keys(content["builder"], {"sizes", "rules", "length", "seed", "distinct_symbols", "distinct_rules"})
            if not isinstance(content["builder"].get("seed", 0), int):
                raise ValueError("the seed of a builder is an integer")
            return cls.random(name=content["name"], **content["builder"])
        _only_keys(content, {"name", "about", "terminals", "layers"})
        if not isinstance(content["terminals"], int):
            raise ValueError(f"terminals={_short(content['terminals'])!r}: their number")
        if not isinstance(content["layers"], list) or not all(isinstance(layer, dict) for layer in content["layers"]):
            raise ValueError("layers are a list of objects, each with the rules of its symbols")
        sizes = (*(len(layer) for layer in content["layers"]), content["terminals"])
        _check_sizes("layers", sizes)
        texts = [text for layer in reversed(content["layers"]) for text in layer.values()]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError('the rules of a symbol are a string such as "22 23 | 24 24"')
        if (found := sum(text.count("|") + 1 for text in texts)) > MOST_RULES:
            raise ValueError(f"{found} rules; at most {MOST_RULES}")
        # Not by symbol in a dictionary: symbols that nobody has numbered so can be chosen such that it takes hours to fill.
        ids = [int(symbol) for layer in reversed(content["layers"]) for symbol in layer]
        first = sizes[-1] + RESERVED + 1
        if ids != list(range(first, first + len(ids))):
            raise ValueError(
                f"non-terminals are numbered from {first}, the lowest layer first and the root last; found {_short(ids[:100])}"
            )
        # One more than may be is enough to see that it is too long.
        rules = tuple(
            tuple(
                tuple(map(int, rule.split(maxsplit=LONGEST_RULE + 1)[: LONGEST_RULE + 1])) for rule in text.split("|")
            )
            for text in texts
        )
        return cls(content["name"], sizes, rules)

    @classmethod
    def random(
        cls,
        sizes: Sequence[int],
        rules: tuple[int, int],
        length: tuple[int, int],
        *,
        seed: int,
        distinct_symbols: bool = False,
        distinct_rules: bool = True,
        name: str = "random",
    ) -> Grammar:
        """A random grammar, drawn from the root down.

        Args:
            sizes: symbols in each layer, root first, terminals last.
            rules: fewest and most rules of a symbol; their number is uniform in between.
            length: fewest and most symbols in a rule; likewise.
            seed: of the draws; the grammar is a pure function of the arguments.
            distinct_symbols: no symbol twice in a rule.
            distinct_rules: no rule twice in a layer (drawn again until new).
            name: what it is called.
        """
        _check_builder(sizes, rules, length, distinct_symbols, distinct_rules)
        stream = np.empty(2, dtype=np.uint64)
        seed_stream(stream, stream_key("grammar", seed), 0)

        def between(bounds: tuple[int, int]) -> int:
            return bounds[0] + int(below(stream, bounds[1] - bounds[0] + 1))

        starts = _layer_starts(sizes)
        layers: list[tuple[tuple[Rule, ...], ...]] = []
        for size, width, start in zip(sizes, sizes[1:], starts[1:], strict=False):
            seen: set[Rule] = set()
            symbols: list[tuple[Rule, ...]] = []
            for _ in range(size):
                own: list[Rule] = []
                for _ in range(between(rules)):
                    rule: Rule = ()
                    while (
                        not rule
                        or (distinct_rules and rule in seen)
                        or (distinct_symbols and len(set(rule)) < len(rule))
                    ):
                        rule = tuple(start + int(below(stream, width)) for _ in range(between(length)))
                    seen.add(rule)
                    own.append(rule)
                symbols.append(tuple(own))
            layers.append(tuple(symbols))
        return cls(name, tuple(sizes), tuple(symbol for layer in reversed(layers) for symbol in layer))

    def lowest(self, levels: int) -> Grammar:
        """The grammar of the lowest ``levels`` layers, rooted at the first symbol of the layer above them."""
        if not 1 <= levels <= self.depth:
            raise ValueError(f"levels={levels}: {self.label} has 1..{self.depth}")
        sizes = (1, *self.sizes[self.depth - levels + 1 :])
        return Grammar(f"{self.name}, {levels} levels", sizes, self.rules[: sum(sizes[:-1])])

    # ---- symbols -----------------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """The name as it may be printed: what a terminal would obey is written in escapes."""
        return _short(self.name if self.name.isprintable() else repr(self.name))

    @property
    def depth(self) -> int:
        """D: rules between the root and a terminal."""
        return len(self.sizes) - 1

    @property
    def terminals(self) -> int:
        """V: terminals are 1..V."""
        return self.sizes[-1]

    @property
    def root(self) -> int:
        """Id of the root, the largest."""
        return self.terminals + RESERVED + len(self.rules)

    @cached_property
    def layers(self) -> tuple[range, ...]:
        """Ids by layer, root first."""
        return tuple(
            range(start, start + size) for start, size in zip(_layer_starts(self.sizes), self.sizes, strict=True)
        )

    def rules_of(self, symbol: int) -> tuple[Rule, ...]:
        """The rules of a non-terminal."""
        return self.rules[symbol - self.terminals - RESERVED - 1]

    @cached_property
    def tables(self) -> Tables:
        """This grammar for compiled code."""
        symbols = self.root + 1
        counts = np.zeros(symbols, dtype=np.int64)
        counts[self.terminals + RESERVED + 1 :] = [len(rules) for rules in self.rules]
        flat = [rule for rules in self.rules for rule in rules]
        padding = [0] * LONGEST_RULE
        shortest = np.zeros(symbols, dtype=np.int64)
        for symbol, tokens in self._fold(1, lambda rules: min(map(sum, rules))).items():
            shortest[symbol] = tokens
        return Tables(
            root=self.root,
            terminals=self.terminals,
            lowest=self.layers[-2].start,
            upper=self.layers[-2].stop,
            first_rule=np.concatenate(([0], np.cumsum(counts))),
            size=np.array([len(rule) for rule in flat], dtype=np.int64),
            children=np.array([[*rule, *padding[len(rule) :]] for rule in flat], dtype=np.int64),
            stacked=np.array([[*reversed(rule), *padding[len(rule) :]] for rule in flat], dtype=np.int64),
            shortest=shortest,
            deepest=LONGEST_RULE * self.depth + 1,
        )

    # ---- what is known exactly ---------------------------------------------------------------------------------------

    def _fold(self, leaf: Any, combine: Callable[[list[list[Any]]], Any]) -> dict[int, Any]:
        """A value for every symbol from its rules' children's values, terminals up."""
        values = dict.fromkeys(self.layers[-1], leaf)
        for symbol in range(self.layers[-2].start, self.root + 1):
            values[symbol] = combine([[values[child] for child in rule] for rule in self.rules_of(symbol)])
        return values

    @cached_property
    def min_length(self) -> int:
        """Tokens in the shortest sentence."""
        return self._fold(1, lambda rules: min(map(sum, rules)))[self.root]

    @cached_property
    def max_length(self) -> int:
        """Tokens in the longest sentence."""
        return self._fold(1, lambda rules: max(map(sum, rules)))[self.root]

    @cached_property
    def mean_length(self) -> float:
        """Expected number of tokens."""
        return self._length_moments[0]

    @cached_property
    def sd_length(self) -> float:
        """Standard deviation of the number of tokens."""
        return math.sqrt(self._length_moments[1])

    @cached_property
    def _length_moments(self) -> tuple[float, float]:
        def combine(rules: list[list[tuple[float, float]]]) -> tuple[float, float]:
            means = [math.fsum(mean for mean, _ in rule) for rule in rules]
            centre = math.fsum(means) / len(rules)
            within = math.fsum(variance for rule in rules for _, variance in rule) / len(rules)
            return centre, within + math.fsum((mean - centre) ** 2 for mean in means) / len(rules)

        return self._fold((1.0, 0.0), combine)[self.root]

    @cached_property
    def length_distribution(self) -> NDArray[np.float64]:
        """``P(length = n)`` for n = 0 .. ``max_length``."""

        def combine(rules: list[list[NDArray[np.float64]]]) -> NDArray[np.float64]:
            laws = []
            for first, *others in rules:
                law = first
                for other in others:
                    law = np.convolve(law, other)
                laws.append(law)
            total = np.zeros(max(map(len, laws)))
            for law in laws:
                total[: len(law)] += law / len(laws)
            return total

        return self._fold(np.array([0.0, 1.0]), combine)[self.root]

    def length_quantile(self, share: float) -> int:
        """The length that a ``share`` of sentences does not exceed."""
        return min(int(np.searchsorted(np.cumsum(self.length_distribution), share)), self.max_length)

    @cached_property
    def num_derivations(self) -> int:
        """Derivation trees of the root."""
        return self._fold(1, lambda rules: sum(math.prod(rule) for rule in rules))[self.root]

    @property
    def log2_derivations(self) -> float:
        """``log2 num_derivations``."""
        return math.log2(self.num_derivations)

    @cached_property
    def derivation_entropy(self) -> float:
        """Bits in the choice of a derivation tree; of a sentence too, where no sentence has two trees."""
        return self._fold(0.0, lambda rules: math.log2(len(rules)) + math.fsum(map(math.fsum, rules)) / len(rules))[
            self.root
        ]

    def __str__(self) -> str:
        lines = [
            f"{self.label}: sentences of {self.min_length}..{self.max_length} tokens, {self.mean_length:.1f} on average"
        ]
        for ids in self.layers[:-1]:
            texts = (" | ".join(" ".join(map(str, rule)) for rule in self.rules_of(symbol)) for symbol in ids)
            lines.append("   ".join(f"{symbol} -> {text} ;" for symbol, text in zip(ids, texts, strict=True)))
        return "\n".join(lines)


def _layer_starts(sizes: Sequence[int]) -> list[int]:
    """The first id of every layer, root first."""
    starts, at = [1], sizes[-1] + RESERVED + 1
    for size in reversed(sizes[:-1]):
        starts.append(at)
        at += size
    return starts[::-1]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long
        return False


def _short(value: Any) -> str:
    """A value for a message, of which nobody reads more."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _check_sizes(name: str, sizes: Sequence[int]) -> None:
    """Refuses more symbols than memory is set aside for."""
    if len(sizes) - 1 > DEEPEST:
        raise ValueError(f"{name}: {len(sizes) - 1} layers of rules; at most {DEEPEST}")
    for what, found in (("terminals", sizes[-1]), ("non-terminals", sum(sizes[:-1]))):
        if found > MOST_SYMBOLS:
            raise ValueError(f"{name}: {_short(found)} {what}; at most {MOST_SYMBOLS}")


def _only_keys(content: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(content) - known)
    if unknown:
        raise ValueError(f"unknown key {_short(repr(unknown[0]))}: choose {', '.join(sorted(known))}")


def _check_builder(sizes: Sequence[int], rules: Any, length: Any, distinct_symbols: bool, distinct_rules: bool) -> None:
    """Refuses bounds that make no sense, and rules that would run out."""
    for key, bounds, most in (("rules", rules, 2**16), ("length", length, LONGEST_RULE)):
        if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= most:
            raise ValueError(f"{key}={tuple(bounds)}: two numbers, 1 <= fewest <= most <= {most}")
    if len(sizes) < 2 or sizes[0] != 1 or min(sizes) < 1:
        raise ValueError(
            f"sizes={_short(tuple(sizes))}: one root, then at least one symbol in each of one or more layers"
        )
    _check_sizes("sizes", sizes)
    if sum(sizes[:-1]) * rules[1] > MOST_RULES:
        raise ValueError(f"rules={tuple(rules)}: up to {sum(sizes[:-1]) * rules[1]} in all; at most {MOST_RULES}")
    for size, width in itertools.pairwise(sizes):
        if distinct_symbols and width < length[1]:
            raise ValueError(
                f"sizes={_short(tuple(sizes))}: {length[1]} distinct symbols do not exist in a layer of {width}"
            )
        ways = math.perm if distinct_symbols else pow
        exist = sum(ways(width, symbols) for symbols in range(length[0], length[1] + 1))
        if distinct_rules and exist < size * rules[1]:
            raise ValueError(
                f"rules={tuple(rules)}: {size} symbols may need {size * rules[1]} different rules, but only {exist} exist into a "
                f"layer of {width}; lower rules, raise sizes or set distinct_rules=false"
            )
