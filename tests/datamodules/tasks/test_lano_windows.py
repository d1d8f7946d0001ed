"""Lano's examples and the windows that they are packed into."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.datamodules.tasks.lano import Lano, _one
from src.datamodules.tasks.rng import below, seed_stream, stream_key
from tests.datamodules.tasks.test_lano import task
from tests.naive import lano as naive


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["cfg3b", "cfg3e1", "cfg3f", "cfg3k"]),
    st.sampled_from([None, 1, 2, 5]),
    st.sampled_from(["bos", "eos"]),
    st.sampled_from(["train", "val", "test"]),
    st.integers(0, 2**31),
    st.integers(0, 2**40),
)
def test_every_example_is_a_sentence(grammar, levels, terminator, split, seed, index):
    lano = Lano(grammar, levels, terminator)
    tokens, mask = lano.example(seed, split, index)
    assert tokens[0] == lano.bos_id == 0
    inner = tokens[1:-1] if terminator == "eos" else tokens[1:]
    assert terminator == "bos" or tokens[-1] == lano.eos_id == lano.language.terminals + 1
    assert inner.min() >= 1
    assert inner.max() <= lano.language.terminals
    assert mask.all()
    assert len(mask) == len(tokens) <= lano.max_length
    assert lano.membership(inner)


class Stream(random.Random):
    """The draws of an example, for the reference implementation."""

    def __init__(self, key, index):
        super().__init__(0)
        self.stream = np.empty(2, dtype=np.uint64)
        seed_stream(self.stream, key, index)

    def choice(self, seq: Any) -> Any:
        return seq[below(self.stream, len(seq))]


@pytest.mark.parametrize("name", ["cfg3e1", "cfg3f", "cfg3k"])
def test_examples_are_what_the_plain_reference_writes_with_the_same_draws(name):
    grammar = task(name).language
    rules = {symbol: grammar.rules_of(symbol) for layer in grammar.layers[:-1] for symbol in layer}
    for index in range(5):
        written = naive.sentence(rules, grammar.root, Stream(stream_key("lano", 7, "train"), index))
        assert task(name).example(7, "train", index)[0].tolist() == [0, *written]


@pytest.mark.parametrize("terminator", ["bos", "eos"])
def test_windows_have_the_moments_of_the_plain_reference(terminator):
    lano = Lano("cfg3k", levels=3, terminator=terminator)
    length, count = 96, 1000
    windows = lano.windows(0, "train", 0, count, length)
    tokens, mask, segments = map(np.array, naive.windows(lano, random.Random(1), count, length))
    assert windows.tokens.shape == tokens.shape
    assert np.array_equal(windows.loss_mask, mask)

    def moments(tokens, segments):
        rows = [(tokens == t).sum(axis=1) for t in range(5)]
        rows += [segments.max(axis=1), ((tokens[:, 1:] == 1) & (tokens[:, :-1] == 3)).sum(axis=1), tokens[:, -1] == 0]
        return np.array(rows, dtype=float)

    ours, theirs = moments(windows.tokens, windows.segments), moments(tokens, segments)
    error = np.sqrt((ours.var(axis=1) + theirs.var(axis=1)) / count)
    assert (np.abs(ours.mean(axis=1) - theirs.mean(axis=1)) <= 4 * error).all()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 4]), st.sampled_from(["bos", "eos"]), st.sampled_from(["train", "test"]), st.integers(1, 150)
)
def test_windows_pack_consecutive_examples_and_start_with_a_whole_one(levels, terminator, split, length):
    lano = Lano("cfg3j", levels, terminator)
    windows = lano.windows(3, split, first=11, count=4, length=length)
    per_window = -(-length // (lano.language.min_length + 1 + (terminator == "eos")))
    for row in range(4):
        pieces = [lano.example(3, split, (11 + row) * per_window + i)[0] for i in range(per_window)]
        segments = np.concatenate([np.full(len(piece), i) for i, piece in enumerate(pieces)])
        assert np.array_equal(windows.tokens[row], np.concatenate(pieces)[:length])
        assert np.array_equal(windows.segments[row], segments[:length])
    assert windows.loss_mask.all()
    assert windows.loss_mask.shape == (4, length)


@pytest.mark.parametrize("eos", [-1, 4])
def test_nothing_is_written_behind_the_end_of_a_window(eos):
    tables = Lano("cfg3k", levels=3).language.tables
    whole = np.zeros(40, dtype=np.int64)
    size = _one(tables, eos, np.uint64(3), 0, whole)
    for length in range(1, 40):
        memory = np.full(48, -7)
        assert _one(tables, eos, np.uint64(3), 0, memory[:length]) == min(size, length)
        assert (memory[length:] == -7).all()
        assert np.array_equal(memory[: min(size, length)], whole[: min(size, length)])


def test_window_w_does_not_depend_on_which_batch_asks_for_it():
    together = task("cfg3f").windows(0, "train", 0, 6, 512).tokens
    assert np.array_equal(together[2:5], task("cfg3f").windows(0, "train", 2, 3, 512).tokens)


def test_examples_depend_on_seed_split_and_index_and_on_nothing_else():
    lano: Any = task("cfg3f")
    reference = lano.example(0, "train", 5)[0]
    assert np.array_equal(reference, Lano("cfg3f").example(0, "train", 5)[0])
    for other in [(1, "train", 5), (0, "val", 5), (0, "train", 6)]:
        assert not np.array_equal(reference, lano.example(*other)[0])


def test_examples_never_change():
    """Golden values: a change here changes everybody's data."""
    assert Lano("cfg3k", levels=3).example(42, "train", 7)[0].tolist() == GOLDEN
    assert Lano("cfg3f", levels=1, terminator="eos").example(0, "test", 1)[0].tolist() == GOLDEN_EOS


GOLDEN = [0, 3, 3, 2, 2, 3, 3, 2, 3, 3, 2, 3, 1, 3, 3, 1, 3, 1, 3, 2, 3]
GOLDEN_EOS = [0, 3, 2, 4]
