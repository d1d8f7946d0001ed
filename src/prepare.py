"""Tokenise a corpus ahead of a run: ``python src/prepare.py data=python_source``.

A run does so itself when it finds nothing in the cache; on a cluster one wants it done once, before the machines are hired.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, Python puts src/ itself on the path; the package is one level up.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from omegaconf import DictConfig  # noqa: E402

from src.cli.entry import entrypoint  # noqa: E402
from src.config import ConfigError, check_complete, instantiate  # noqa: E402
from src.datamodules.text import TextDataModule  # noqa: E402
from src.support.console import print_cells  # noqa: E402


def prepare(config: DictConfig) -> None:
    """Tokenises, and prints what there is."""
    check_complete(config)
    datamodule = instantiate(config.data, "data")
    if not isinstance(datamodule, TextDataModule):
        raise ConfigError(
            "data: synthetic tasks need no preparation; text corpora do (data=python_source, data=text_files)"
        )
    corpus = datamodule.corpus
    rows = []
    for split in ("train", "val", "test"):
        stream = corpus.split(split)
        numbers = (stream.num_documents, stream.num_tokens, stream.num_bytes, stream.num_windows(datamodule.window - 1))
        rows.append([split, *(f"{number:,}" for number in numbers)])
    print_cells(str(corpus.path), ["split", "documents", "tokens", "bytes", "windows"], rows)


if __name__ == "__main__":
    entrypoint("train", prepare)
