"""Shared fixtures. The reference material in ``../shared`` exists for maintainers only; tests that read it skip without it."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# Tests run in parallel on few cores; more threads would only fight.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the official models' golden logits (../shared/golden) are not on this machine")
    return folder
