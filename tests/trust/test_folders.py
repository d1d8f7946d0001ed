"""Folders of runs from elsewhere: links, pipes, files for folders, and what lies too deep."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from src.checkpoints import CheckpointError, load_model, read_checkpoint
from src.checkpoints.__main__ import main
from src.checkpoints.files import newest_first
from src.checkpoints.integrity import damage
from src.checkpoints.sharded import write_shards
from src.config import ConfigError
from src.runs.runs import find_runs
from src.train import train
from tests.runs import TINY, tiny_run
from tests.runs import main as main_of
from tests.trust.watch import watched

EVERY = ["callbacks.checkpoint.every_n_train_steps=1"]


@pytest.mark.parametrize(
    "name", ["checkpoints", "train.log", ".hydra", ".hydra/overrides.yaml", "csv", "without-canon/csv/metrics.csv"]
)
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


def test_a_link_is_refused_whatever_hydra_is_told_by_flags(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("mine")
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "config.yaml").symlink_to(tmp_path / "mine.yaml")
    with pytest.raises(SystemExit):
        main_of(train, "train", "--config-dir", str(tmp_path), *TINY, f"hydra.run.dir={tmp_path / 'run'}")
    assert "is a link to" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_the_name_of_other_results_is_no_way_out_of_the_folder(trained, tmp_path):
    """Results of another run are kept under their hash, which somebody else may have written."""
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(trained, run)
    (run / "results-x").mkdir()
    mine.mkdir()
    (mine / "settings.json").write_text("mine")
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"config_hash": "x/../../mine/settings"}))
    tiny_run(run, *EVERY, "trainer.max_steps=6", "ckpt_path=auto")
    assert (mine / "settings.json").read_text() == "mine"
    assert json.loads((run / "results-other.json").read_text())["config_hash"] == "x/../../mine/settings"


def test_nobody_waits_for_a_pipe(trained, tmp_path, capsys):
    """In place of a log, of a checkpoint, and of the rest of a folder of shards."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "train.log").unlink(missing_ok=True)
    os.mkfifo(run / "train.log")
    with watched(tmp_path, seconds=20):
        with pytest.raises(ConfigError, match=r"'train\.log' in it is a pipe"):
            tiny_run(run, *EVERY, "ckpt_path=auto")
        (run / "train.log").unlink()
        os.mkfifo(run / "checkpoints" / "step00000009.ckpt")
        assert main(["verify", str(run)]) in (0, 2)
        assert load_model(run).count_parameters() > 0
        shards = tmp_path / "shards.ckpt"
        write_shards(read_checkpoint(trained), shards, 1)
        (shards / "meta.pt").unlink()
        os.mkfifo(shards / "meta.pt")
        with pytest.raises(CheckpointError, match=r"shards\.ckpt"):
            load_model(shards)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "run.json/",
            "results.json/",
            "results-x.json/",
            "evaluation_x.json/",
            "config.yaml/",
            "run.lock/",
            "train.log/",
        ),
        *(".hydra/mine.yaml/", "csv/metrics.csv/", "checkpoints/step00000002.ckpt.sha256/"),
        *("checkpoints", "csv", ".hydra"),
    ],
)
def test_folders_for_files_and_files_for_folders_are_refused(tmp_path, capsys, name):
    """Before anything is trained: what cannot be written would be found at the end."""
    run, odd = tmp_path / "run", tmp_path / "run" / name
    odd.parent.mkdir(parents=True)
    odd.mkdir() if name.endswith("/") else odd.touch()
    with pytest.raises(SystemExit):
        main_of(train, "train", *TINY, f"hydra.run.dir={run}", "ckpt_path=auto")
    told = capsys.readouterr().err
    assert f"{name.rstrip('/')!r} in it is a f" in told
    assert "Traceback" not in told


def test_folders_that_lie_deep_in_each_other_are_an_error_that_says_so(tmp_path):
    """A path can be longer than a system takes, and who follows it level by level can come to an end before it does."""
    run = tmp_path / "run"
    run.mkdir()
    where = os.open(run, os.O_RDONLY)
    for _ in range(1000):
        os.mkdir("a", dir_fd=where)
        where = within("a", where)
    try:
        with pytest.raises(ConfigError, match="folders in it lie more than 50 deep"):
            tiny_run(run, *EVERY)
        with pytest.raises(CheckpointError, match=r"run.* a folder without final\.ckpt"):
            load_model(run)
        problems: list[tuple[str, str]] = []
        assert find_runs(tmp_path, problems) == []
        assert [what for _, what in problems] == ["folders more than 50 deep are not looked into"]
    finally:  # pytest's own way of removing them would not come to an end
        for _ in range(1000):
            where = within("..", where)
            os.rmdir("a", dir_fd=where)
        os.close(where)


def within(name: str, folder: int) -> int:
    """Opens a folder in an open one, which is closed."""
    opened = os.open(name, os.O_RDONLY, dir_fd=folder)
    os.close(folder)
    return opened


def test_a_link_in_a_circle_leads_nowhere(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "loop").symlink_to("loop")
    tiny_run(tmp_path / "run", *EVERY, "trainer.max_steps=5", "ckpt_path=auto")


def test_folders_without_a_checkpoint_are_not_searched_for_ever(tmp_path):
    """Links to themselves are thousands of folders in three levels, and one to / is the machine."""
    for i in range(80):
        (tmp_path / f"{i}").symlink_to(".")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "mine.ckpt").touch()
    with watched(tmp_path, seconds=10), pytest.raises(CheckpointError, match=r"it holds a/b/mine\.ckpt"):
        load_model(tmp_path)


def test_one_checkpoint_under_many_names_is_looked_at_once(trained, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for i in range(20):
        os.link(trained / "checkpoints" / "step00000003.ckpt", folder / f"step{i:08d}.ckpt")
    assert len(newest_first(folder)) == 1


def test_a_checkpoint_with_a_hole_is_not_hashed(tmp_path):
    with (tmp_path / "final.ckpt").open("wb") as file:
        file.truncate(2**40)
    (tmp_path / "final.ckpt.sha256").write_text("0" * 64)
    with watched(tmp_path, seconds=10):
        assert "no checkpoint at all" in str(damage(tmp_path / "final.ckpt"))


def test_a_shard_that_is_a_link_is_damage(trained, tmp_path):
    """One to a file of the system has no end."""
    shards = tmp_path / "shards.ckpt"
    assert main(["reshard", str(trained / "checkpoints" / "step00000003.ckpt"), str(shards)]) == 0
    piece = next(shards.glob("*.distcp"))
    piece.unlink()
    piece.symlink_to("/proc/self/pagemap")
    with watched(tmp_path, seconds=10):
        assert damage(shards) == f"'{piece.name}' is a link"
        with pytest.raises(CheckpointError, match=piece.name):
            load_model(shards)


def test_callbacks_know_of_no_files_elsewhere(trained, tmp_path):
    """Lightning's own removes the oldest of those that its state says it has kept."""
    victim = tmp_path / "theirs" / "x.ckpt"
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    mine = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: %s, monitor: val/loss, save_top_k: 1}"
    options = [*EVERY, "+callbacks.mine=" + mine % (run / "checkpoints"), "trainer.max_steps=6"]
    victim.parent.mkdir()
    victim.touch()
    checkpoint = torch.load(run / "checkpoints" / "step00000003.ckpt", weights_only=True)
    elsewhere = f"{run}/checkpoints/../../theirs/x.ckpt"
    key = ModelCheckpoint(dirpath=run / "checkpoints", monitor="val/loss", save_top_k=1).state_key
    state = {
        "dirpath": str(run / "checkpoints"),
        "best_k_models": {elsewhere: torch.tensor(1e9)},
        "kth_value": torch.tensor(1e9),
    }
    state |= {"kth_best_model_path": elsewhere, "best_model_path": elsewhere, "last_model_path": elsewhere}
    checkpoint["callbacks"][key] = state | {
        "monitor": "val/loss",
        "best_model_score": torch.tensor(1e9),
        "current_score": None,
    }
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    torch.save(checkpoint, run / "checkpoints" / "step00000003.ckpt")
    tiny_run(run, *options, "ckpt_path=auto")
    assert victim.exists()
    assert [path.name for path in (run / "checkpoints").glob("epoch=*")]


def test_a_truncated_final_checkpoint_is_named(trained, tmp_path, caplog):
    """What cannot be opened has no step, and must not be passed over for that."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    final = run / "checkpoints" / "final.ckpt"
    final.write_bytes(final.read_bytes()[:3000])
    assert load_model(run).count_parameters() > 0
    assert "final.ckpt is damaged" in caplog.text
