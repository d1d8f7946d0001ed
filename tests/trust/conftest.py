from pathlib import Path

import pytest

from tests.runs import tiny_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small run that has kept its newest checkpoints; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_run(folder, "callbacks.checkpoint.every_n_train_steps=1")
    return folder
