import json
import pickle

import numpy as np
import pytest

from src.datamodules.corpora import (
    SPLITS,
    Corpus,
    CorpusError,
    TextFiles,
    TokenizerOptions,
    TokenStream,
    prepare,
    training_indices,
    training_windows,
)


@pytest.fixture
def corpus(folder, tmp_path) -> Corpus:
    return prepare(TextFiles(folder), TokenizerOptions("bytes"), tmp_path / "cache", val_share=0.2, test_share=0.2)


class TestWindows:
    @pytest.mark.parametrize("split", SPLITS)
    @pytest.mark.parametrize("length", [1, 7, 64, 1000])
    def test_every_token_is_a_target_once(self, corpus, split, length):
        stream = corpus.split(split)
        count = stream.num_windows(length)
        assert count == (stream.num_tokens - 1) // length
        windows = stream.windows(np.arange(count), length)
        assert windows.dtype == np.int64
        assert windows.shape == (count, length + 1)
        assert np.array_equal(windows[:, 1:].ravel(), stream.tokens[1 : count * length + 1])
        assert np.array_equal(windows[:, :-1].ravel(), stream.tokens[: count * length])
        assert np.array_equal(windows[:-1, -1], windows[1:, 0])

    def test_exact_fit(self, corpus):
        stream = corpus.split("val")
        assert stream.num_windows(stream.num_tokens - 1) == 1
        assert np.array_equal(stream.windows(np.array([0]), stream.num_tokens - 1)[0], stream.tokens)

    def test_any_order(self, corpus):
        stream = corpus.split("train")
        indices = np.array([5, 0, 5, 3])
        assert np.array_equal(stream.windows(indices, 10), stream.windows(np.arange(6), 10)[indices])
        assert stream.windows(np.array([], dtype=np.int64), 10).shape == (0, 11)

    def test_split_shorter_than_a_window(self, corpus):
        stream = corpus.split("val")
        expected = rf"val split .* {stream.num_tokens} tokens.* {stream.num_tokens + 1} of one window"
        for call in (stream.num_windows, lambda n: stream.windows(np.array([0]), n)):
            with pytest.raises(CorpusError, match=expected):
                call(stream.num_tokens)
        with pytest.raises(CorpusError, match="train split"):
            training_windows(corpus, 0, 0, 1, 10**6)

    def test_window_outside(self, corpus):
        stream = corpus.split("test")
        for index in (-1, stream.num_windows(10)):
            with pytest.raises(IndexError, match=f"test split, which has {stream.num_windows(10)} of length 10"):
                stream.windows(np.array([0, index]), 10)

    def test_bad_arguments(self, corpus):
        with pytest.raises(CorpusError, match="length 0"):
            corpus.split("train").num_windows(0)
        with pytest.raises(IndexError, match="shape"):
            corpus.split("train").windows(np.zeros((2, 2), dtype=np.int64), 4)
        with pytest.raises(CorpusError, match=r"'valid'.*train, val, test"):
            corpus.split("valid")


@pytest.mark.parametrize("length", [1, 9, 500])
def test_segments(corpus, length):
    stream = corpus.split("train")
    count = stream.num_windows(length)
    indices = np.arange(count)[::-1]
    segments = stream.segments(indices, length)
    assert segments.dtype == np.int32
    tokens = stream.windows(indices, length)
    assert segments.shape == tokens.shape
    starts = np.cumsum(tokens[:, 1:] == corpus.tokenizer.bos_id, axis=1)  # each document opens with BOS
    assert (segments[:, 0] == 0).all()
    assert np.array_equal(segments[:, 1:], starts)


class TestTrainingOrder:
    def test_each_epoch_is_a_permutation(self):
        order = training_indices(50, seed=3, start=0, count=150).reshape(3, 50)
        assert all(np.array_equal(np.sort(epoch), np.arange(50)) for epoch in order)
        assert not np.array_equal(order[0], order[1])
        assert not np.array_equal(order[1], order[2])

    def test_is_a_pure_function_of_seed_and_position(self, corpus):
        length = 100
        epoch = corpus.split("train").num_windows(length)
        whole = training_windows(corpus, 5, 0, 3 * epoch, length)
        for start, count in [(0, 1), (epoch - 1, 2), (epoch - 3, epoch + 6), (2 * epoch, epoch), (7, 0)]:
            part = training_windows(corpus, 5, start, count, length)
            assert np.array_equal(part, whole[start : start + count])
        assert not np.array_equal(training_windows(corpus, 6, 0, epoch, length), whole[:epoch])

    def test_reads_the_train_split(self, corpus):
        stream = corpus.split("train")
        indices = training_indices(stream.num_windows(20), 1, 4, 6)
        assert np.array_equal(training_windows(corpus, 1, 4, 6, 20), stream.windows(indices, 20))

    def test_golden_order(self):
        """A change here makes earlier runs impossible to repeat."""
        assert training_indices(10, seed=42, start=7, count=6).tolist() == [4, 5, 3, 1, 9, 6]

    def test_distant_positions(self):
        assert training_indices(10**9, seed=0, start=10**15, count=3).shape == (3,)

    def test_negative_position(self):
        with pytest.raises(ValueError, match="start=-1"):
            training_indices(10, 0, -1, 5)


class TestOpening:
    def test_needs_no_source(self, corpus, folder):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        opened = Corpus(corpus.path)
        assert np.array_equal(opened.split("train").tokens, corpus.split("train").tokens)
        assert (opened.name, opened.vocab_size, opened.tokenizer.bos_id) == ("texts", 258, 256)

    def test_tokens_are_read_only_and_mapped(self, corpus):
        tokens = corpus.split("train").tokens
        assert isinstance(tokens.base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            tokens[0] = 1

    def test_pickles_as_a_path(self, corpus):
        stream = corpus.split("train")
        expected = stream.windows(np.arange(4), 50)
        data = pickle.dumps(stream)
        assert len(data) < 1000
        copy = pickle.loads(data)
        assert isinstance(copy, TokenStream)
        assert np.array_equal(copy.windows(np.arange(4), 50), expected)
        again = pickle.loads(pickle.dumps(corpus))
        assert np.array_equal(again.split("train").windows(np.arange(4), 50), expected)

    def test_incomplete_folder(self, corpus, tmp_path):
        with pytest.raises(CorpusError, match=r"not a complete corpus: .*meta.json"):
            Corpus(tmp_path)
        (corpus.path / "val.tokens.npy").unlink()
        with pytest.raises(CorpusError, match=r"val\.tokens\.npy"):
            Corpus(corpus.path)

    def test_other_format(self, corpus):
        meta = corpus.path / "meta.json"
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 99}))
        with pytest.raises(CorpusError, match="format is 99"):
            Corpus(corpus.path)
