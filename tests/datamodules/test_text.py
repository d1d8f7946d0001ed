import hashlib
import math
import os
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from src.build import compose_config
from src.config import instantiate
from src.datamodules.corpora import CorpusError, TextFiles, TokenizerOptions, corpus_identity, files
from src.datamodules.text import TextDataModule
from src.evaluation.choice import evaluator_of


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


def test_what_would_be_prepared_is_known_without_preparing_it(module, tmp_path, monkeypatch):
    expected = module().expected_fingerprint()
    assert expected == corpus_identity(
        TextFiles(str(tmp_path / "texts")), TokenizerOptions("bytes"), val_share=0.1, test_share=0.1
    )
    assert not (tmp_path / "cache").exists()
    found = module().fingerprint()
    assert expected == {key: found[key] for key in ("corpus", "fingerprint")}
    assert module(val_share=0.2).expected_fingerprint() != expected
    before = (tmp_path / "texts" / "0.txt").stat()
    text = (tmp_path / "texts" / "0.txt").read_text()
    (tmp_path / "texts" / "0.txt").write_text(text.replace("0", "7"))  # of the same size
    os.utime(tmp_path / "texts" / "0.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert module().expected_fingerprint() != expected


def test_files_that_have_not_changed_are_hashed_once(module, tmp_path, monkeypatch):
    for path in (tmp_path / "texts").iterdir():
        os.utime(path, ns=(10**18, 10**18))
    monkeypatch.setattr(files, "_SETTLED_NANOSECONDS", 0)
    expected = module().expected_fingerprint()
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: hashed.append(1) or digest(*args))
    assert module().expected_fingerprint() == expected
    assert not hashed
    (tmp_path / "texts" / "0.txt").write_text("changed")
    assert module().expected_fingerprint() != expected
    assert len(hashed) == 1


def test_a_file_written_a_moment_ago_is_hashed_again(module, tmp_path, monkeypatch):
    """Its times may be too coarse to tell of another change."""
    before = module().expected_fingerprint()
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: hashed.append(1) or digest(*args))
    assert module().expected_fingerprint() == before
    assert len(hashed) == 60


def test_tokens_with_other_names_begin_and_end_documents(module, tmp_path):
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.add_special_tokens(["<start>", "<stop>", "<end>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    path = str(tmp_path / "tokenizer.json")
    with pytest.raises(CorpusError, match=r"set data\.bos= to one of its special tokens: <start> <stop> <end>"):
        _ = module(tokenizer=path).corpus
    with pytest.raises(CorpusError, match=r"set data\.eos= to one"):
        _ = module(tokenizer=path, bos="<start>").corpus
    first = module(tokenizer=path, bos="<start>", eos="<stop>")
    other = module(tokenizer=path, bos="<start>", eos="<end>")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this tokeniser knows no digits
        assert (first.corpus.tokenizer.bos_id, first.corpus.tokenizer.eos_id) == (1, 2)
        assert other.corpus.tokenizer.eos_id == 3
    assert first.expected_fingerprint() != other.expected_fingerprint()
    with pytest.warns(UserWarning, match="'bytes' ignores bos='<start>'"):
        module(bos="<start>")


def test_the_configuration_sets_them(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "tokenizer.json").write_text("{}")
    config = compose_config(
        [
            "data=text_files",
            f"data.path={tmp_path / 'a.txt'}",
            f"data.tokenizer={tmp_path}",
            "data.bos='<a>'",
            "data.eos=b",
        ],
        "train",
    )
    module = instantiate(config.data, "data")
    assert (module.options.bos, module.options.eos) == ("<a>", "b")


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


@pytest.mark.filterwarnings("ignore:the tokeniser of")
def test_bits_per_byte_are_of_the_text_and_not_of_its_tokens(module, tmp_path):
    """Tokens with a mark at the end of each word stand for more bytes than the text has."""
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={"<unk>": 0} | {f"{i}{end}": 1 + i + 10 * bool(end) for i in range(10) for end in ("", "</w>")},
            merges=[],
            unk_token="<unk>",
            end_of_word_suffix="</w>",
        )
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "t.json"))
    data = module(tokenizer=str(tmp_path / "t.json"))
    stream, length = data.corpus.split("test"), 32
    evaluator = evaluator_of(data, "test")
    every = torch.from_numpy(stream.windows(np.arange(stream.num_windows(length)), length))
    mask = torch.ones_like(every, dtype=torch.bool)
    count = every[:, 1:].numel()
    logits = torch.zeros(count, data.vocab_size)
    evaluator.update({"tokens": every, "loss_mask": mask}, logits, torch.full((count,), math.log(2)))
    found = float(evaluator.compute()["bits_per_byte"])
    # One bit for each token, over the bytes of the texts; the tail that fills no window is left out.
    assert found == pytest.approx(stream.num_tokens / stream.num_bytes, rel=0.02)
    unscaled = stream.num_tokens / data.corpus.tokenizer.bytes_per_token[stream.tokens].sum()
    assert found > 1.5 * unscaled
