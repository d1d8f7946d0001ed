import pickle
from typing import Any

import numpy as np
import pytest

from src.datamodules.corpora import TextFiles
from src.datamodules.text import TextDataModule


@pytest.fixture
def module(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(60):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(str(i * j) for j in range(1, 30 + i)))

    def build(**options: Any) -> TextDataModule:
        settings: dict[str, Any] = {"window": 33, "batch_size": 4, "cache_dir": str(tmp_path / "cache")}
        settings.update(tokenizer="bytes", val_share=0.1, test_share=0.1)
        settings.update(options)
        return TextDataModule(TextFiles(str(tmp_path / "texts")), **settings)

    return build


def test_evaluation_windows_are_different_and_spread_over_the_split(module):
    source = module(val_windows=5).source
    stream = module().corpus.split("val")
    assert source.num_windows("val") == 5
    every = stream.windows(np.arange(stream.num_windows(32)), 32)
    places = [int(np.flatnonzero((every == window).all(axis=1))[0]) for window in source.windows("val", 0, 5)["tokens"]]
    assert len(set(places)) == 5
    assert places != list(range(5))


def test_all_windows_of_a_split_are_its_tokens(module):
    source, stream = module().source, module().corpus.split("test")
    tokens = source.windows("test", 0, source.num_windows("test"))["tokens"]
    assert sorted(map(tuple, tokens)) == sorted(map(tuple, stream.windows(np.arange(len(tokens)), 32)))


def test_documents_are_numbered_when_they_are_to_be_kept_apart(module):
    batch = module(isolate=True).source.windows("train", 0, 20)
    starts = batch["tokens"][:, 1:] == 256
    assert np.array_equal(np.diff(batch["segments"], axis=1) > 0, starts)
    assert "segments" not in module().source.windows("train", 0, 2)


def test_sources_travel_to_other_processes(module):
    source = module().source
    again = pickle.loads(pickle.dumps(source))
    assert np.array_equal(again.windows("train", 3, 2)["tokens"], source.windows("train", 3, 2)["tokens"])


def test_the_fingerprint_is_that_of_the_text(module, tmp_path):
    before = module().fingerprint()
    assert before == module().fingerprint()
    (tmp_path / "texts" / "0.txt").write_text("changed")
    assert before["fingerprint"] != module().fingerprint()["fingerprint"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "data.window=1"),
        ({"val_windows": 0}, "data.val_windows=0"),
        ({"eval_batch_size": 0}, "eval_batch"),
    ],
)
def test_impossible_settings_are_refused(module, options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_a_source_that_needs_a_path_asks_for_it():
    with pytest.raises(ValueError, match=r"data\.path"):
        TextDataModule(TextFiles, window=9, batch_size=1, cache_dir="x")
