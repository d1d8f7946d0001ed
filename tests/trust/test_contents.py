"""Small files that ask for much, or lie: found by attacking. Each is refused in a moment, by a message that names the file."""

import zipfile
from pathlib import Path

import pytest
import torch

from src.checkpoints import CheckpointError, load_model
from src.checkpoints.__main__ import main
from src.checkpoints.files import problem_of
from src.config import ConfigError, RunError
from src.evaluate import evaluate
from src.train import train
from tests.runs import TINY, compose_run, tiny_run
from tests.runs import main as main_of
from tests.trust.watch import watched

EVERY = ["callbacks.checkpoint.every_n_train_steps=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tiny_run(folder, *EVERY)
    return folder


def shared() -> list:
    """A list that is written in a few bytes and has 2^40 ends."""
    node: list = []
    for _ in range(39):
        node = [node, node]
    return node


def cycle() -> dict:
    node: dict = {}
    node["again"] = node
    return node


def large(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(1, dtype=dtype).expand(2 * 10**9)


# Where, and what is put there.
LIES = {
    "a list of itself twice, forty times": (("config", "model", "norm_eps"), shared),
    "a cycle": (("data", "again"), cycle),
    "a million blocks": (("config", "model", "depth"), lambda: 3e6),
    "a large moment": (("optimizer_states", 0, "state", 0, "exp_avg"), large),
    "a large seed": (("data", "seed"), lambda: large(torch.int8)),
    "a tensor for a name": (("config", "name"), lambda: torch.zeros(2)),
    "a metric that is none": (("validated",), lambda: {"a": 1}),
    "a metric with a name for terminals": (("pending_metrics",), lambda: {"\x1b[31m": 1.0}),
    "loops that are none": (("loops",), lambda: 3),
}


def lie(trained: Path, path: Path, name: str) -> Path:
    way, make = LIES[name]
    checkpoint = torch.load(trained / "checkpoints" / "step00000003.ckpt", weights_only=True)
    node = checkpoint
    for key in way[:-1]:
        node = node[key]
    node[way[-1]] = make()
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("name", LIES)
def test_a_checkpoint_that_asks_for_much(trained, tmp_path, name):
    path = lie(trained, tmp_path / "lie.ckpt", name)
    with watched(tmp_path, seconds=15):
        with pytest.raises(CheckpointError, match=r"lie\.ckpt"):
            load_model(path)
        if name != "a million blocks":
            assert problem_of(path) is not None
        assert main(["inspect", str(path)]) in (0, 2)
        with pytest.raises(ConfigError, match=r"lie\.ckpt"):
            evaluate(compose_run(tmp_path, f"ckpt_path={path}", f"paths.output_dir={tmp_path}", config_name="evaluate"))


STATES = {
    "a history that is none": (("callbacks", "Guard", "history"), 3),
    "steps that never end": (
        (
            "loops",
            "fit_loop",
            "epoch_loop.automatic_optimization.optim_progress",
            "optimizer",
            "step",
            "total",
            "ready",
        ),
        -(10**9),
    ),
    "a schedule that is none": (("lr_schedulers", 0, "step"), 3),
    "a rate that is a word": (("optimizer_states", 0, "param_groups", 0, "lr"), "x"),
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_are_none_are_an_error_that_names_the_file(trained, tmp_path, name):
    way, value = STATES[name]
    checkpoint = torch.load(trained / "checkpoints" / "step00000003.ckpt", weights_only=True)
    node = checkpoint
    for key in way[:-1]:
        node = node[key]
    node[way[-1]] = value
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(checkpoint, folder / "step00000003.ckpt")
    with watched(tmp_path, seconds=60), pytest.raises((RunError, ConfigError), match="step00000003"):
        tiny_run(tmp_path, *EVERY, "ckpt_path=auto")


def test_archives_that_unpack_to_more_than_they_are(trained, tmp_path):
    """PyTorch stores; what is compressed is a bomb or somebody else's."""
    path = tmp_path / "bomb.ckpt"
    source = trained / "checkpoints" / "step00000003.ckpt"
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(source) as whole, zipfile.ZipFile(path, "w", method) as archive:
            for name in whole.namelist():
                archive.writestr(name, whole.read(name))
        assert "compressed" in str(problem_of(path))
        with pytest.raises(CheckpointError, match=r"bomb\.ckpt.*compressed"):
            load_model(path)
    sparse = tmp_path / "bomb.ckpt.sha256"
    with sparse.open("wb") as file:
        file.truncate(20 * 2**30)
    with watched(tmp_path, seconds=10):
        assert problem_of(path) is not None


def test_what_a_stranger_has_written_is_shown_as_text(trained, tmp_path, capsys):
    checkpoint = torch.load(trained / "checkpoints" / "step00000003.ckpt", weights_only=True)
    checkpoint["config"]["name"] = "\x1b]0;mine\x07"
    checkpoint["config"]["model"]["\x1b[2J"] = 1
    del checkpoint["config"]["trainer"]["max_steps"]
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    assert main(["inspect", str(tmp_path / "odd.ckpt")]) == 0
    assert main(["verify", str(tmp_path / "odd.ckpt")]) == 0
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "odd.ckpt")
    shown = capsys.readouterr().out + str(caught.value)
    assert "\x1b" not in shown
    assert "mine" in shown


@pytest.mark.parametrize("name", ["checkpoints", "train.log", ".hydra", ".hydra/overrides.yaml", "csv"])
def test_links_that_lead_out_of_a_runs_folder_are_refused(tmp_path, capsys, name):
    """Before anything is written: Hydra opens its log at once."""
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    (elsewhere / "mine.part").write_text("precious")
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(elsewhere if "." not in name[1:] else elsewhere / "mine.part")
    with pytest.raises(SystemExit):
        main_of(train, "train", *TINY, f"hydra.run.dir={run}", "ckpt_path=auto")
    assert "is a link to" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in elsewhere.iterdir()] == [("mine.part", "precious")]
