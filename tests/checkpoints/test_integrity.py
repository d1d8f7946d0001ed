"""Damaged, foreign and old checkpoints; the checkpoints command."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from src.checkpoints import CheckpointError, load_model, read_checkpoint
from src.checkpoints.__main__ import main
from src.checkpoints.files import find_checkpoint, newest_first, newest_whole, problem_of, to_resume
from src.checkpoints.integrity import damage
from src.checkpoints.sharded import read_metadata
from src.evaluate import evaluate
from tests.runs import evaluation, same, tiny_run
from tests.runs import main as main_of

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint_0.1.0.ckpt"
EVERY = ["callbacks.checkpoint.every_n_train_steps=1", "callbacks.checkpoint.save_top_k=-1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_run(folder, *EVERY)
    for name in ("final.ckpt", "final.ckpt.sha256"):
        (folder / "checkpoints" / name).unlink()
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flipped_without_checksum(path: Path) -> None:
    flipped(path)
    path.with_name(path.name + ".sha256").unlink()


def foreign(path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, path)


def foreign_without_checksum(path: Path) -> None:
    """Whole, and none of this project's."""
    foreign(path)
    path.with_name(path.name + ".sha256").unlink()


def encrypted(path: Path) -> None:
    """As far as one bit of every entry in its directory says."""
    content = bytearray(path.read_bytes())
    start = 0
    while (start := content.find(b"PK\x01\x02", start)) >= 0:
        content[start + 8] |= 1
        start += 4
    path.write_bytes(content)
    path.with_name(path.name + ".sha256").unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def half_written(path: Path) -> None:
    """As a killed process leaves it: under another name."""
    path.rename(path.with_name(path.name + ".123.part"))
    path.with_name(path.name + ".sha256").unlink()


@pytest.mark.parametrize(
    "harm", [truncated, flipped, flipped_without_checksum, foreign, foreign_without_checksum, encrypted, empty]
)
def test_the_one_before_a_damaged_checkpoint_is_taken(run, harm, caplog):
    newest = run / "checkpoints" / "step00000004.ckpt"
    assert damage(newest) is None
    harm(newest)
    assert problem_of(newest) is not None
    assert damage(newest) is not None or harm is foreign_without_checksum
    found = to_resume("auto", run)
    assert found is not None
    assert found.name == "step00000003.ckpt"
    assert f"checkpoint {newest} is damaged" in caplog.text
    with pytest.raises(
        CheckpointError, match=r"step00000004.ckpt is damaged.*newest whole one beside it is .*step00000003"
    ):
        to_resume(str(newest), run)
    assert newest.exists()  # nothing is deleted
    metrics = tiny_run(run, *EVERY, "trainer.max_steps=5", "ckpt_path=auto")
    assert metrics["test/loss"] > 0
    assert torch.load(run / "checkpoints" / "final.ckpt", weights_only=True)["global_step"] == 5


def test_no_bit_of_the_directory_raises_anything(tmp_path):
    """Without a checksum beside it, what a file says of itself is read before its CRCs can tell that it is wrong."""
    content = FIXTURE.read_bytes()
    path = tmp_path / "step00000001.ckpt"
    start = content.rindex(b"PK\x01\x02")
    found = []
    for bit in range(8 * start, 8 * len(content), 3):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        found.append(problem_of(path))
    assert sum(problem is not None for problem in found) > len(found) / 2  # the others are dates, and who made the file


def test_a_half_written_checkpoint_is_no_checkpoint(run):
    half_written(run / "checkpoints" / "step00000004.ckpt")
    found = to_resume("auto", run)
    assert found is not None
    assert found.name == "step00000003.ckpt"
    assert main(["verify", str(run)]) == 0


def test_nothing_to_resume(run, tmp_path):
    assert to_resume("auto", tmp_path / "nowhere") is None
    assert to_resume(None, run) is None
    for path in (run / "checkpoints").glob("step*.ckpt"):
        truncated(path)
    assert newest_whole(run / "checkpoints") is None
    with pytest.raises(CheckpointError, match="every checkpoint in it is damaged"):
        to_resume("auto", run)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_pickled_objects_are_refused(run, capsys):
    path = run / "pickled.ckpt"
    torch.save(read_checkpoint(run / "checkpoints" / "step00000004.ckpt") | {"extra": Evil()}, path)
    with pytest.raises(CheckpointError, match="cannot be opened as plain data"):
        read_checkpoint(path)
    shards = run / "shards.ckpt"
    assert main(["reshard", str(run / "checkpoints" / "step00000003.ckpt"), str(shards), "--files", "2"]) == 0
    (shards / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"names builtins.print, which is no description"):
        read_checkpoint(shards)
    with pytest.raises(pickle.UnpicklingError):
        read_metadata(shards)
    assert "this must not run" not in capsys.readouterr().out


def test_a_checkpoint_of_the_previous_release_opens(tmp_path):
    """Written by version 0.1.0; with it the logits that this version must find."""
    expected = json.loads(FIXTURE.with_suffix(".json").read_text())
    logits = load_model(FIXTURE)(torch.tensor([expected["ids"]]))
    torch.testing.assert_close(logits[0, -1], torch.tensor(expected["last_logits"]), atol=1e-5, rtol=1e-5)
    assert damage(FIXTURE) is None
    assert read_checkpoint(FIXTURE)["global_step"] == expected["step"]
    main_of(evaluate, "evaluate", f"ckpt_path={FIXTURE}", f"hydra.run.dir={tmp_path}")
    assert evaluation(tmp_path)["metrics"]["test/loss"] > 0


def test_the_command(run, tmp_path, capsys):
    path = run / "checkpoints" / "step00000004.ckpt"
    assert main(["inspect", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "4 of 4" in shown
    assert "2 x 16 T" in shown
    shards, back = tmp_path / "shards.ckpt", tmp_path / "back.ckpt"
    assert main(["reshard", str(path), str(shards), "--files", "3"]) == 0
    assert len(list(shards.glob("*.distcp"))) == 3
    assert main(["inspect", str(shards)]) == 0
    assert main(["consolidate", str(shards), str(back)]) == 0
    assert main(["verify", str(shards), str(back), str(run)]) == 0
    a, b = read_checkpoint(path), read_checkpoint(back)
    assert a.keys() == b.keys()
    for key in a:
        assert same(a[key], b[key]), key
    flipped(back)
    flipped(next(shards.glob("*.distcp")))
    capsys.readouterr()
    assert main(["verify", str(shards), str(back)]) == 1
    assert capsys.readouterr().out.count("damaged ") == 2
    assert main(["consolidate", str(shards), str(back)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nothing.ckpt")]) == 2


def test_a_folder_means_the_checkpoint_of_its_latest_step_whatever_its_name(run):
    assert find_checkpoint(run).name == "step00000004.ckpt"
    shutil.copy(run / "checkpoints" / "step00000002.ckpt", run / "checkpoints" / "final.ckpt")
    assert find_checkpoint(run).name == "step00000004.ckpt"
    shutil.copy(run / "checkpoints" / "step00000004.ckpt", run / "checkpoints" / "final.ckpt")
    assert find_checkpoint(run).name == "final.ckpt"
    (run / "checkpoints" / "step00000001.ckpt").rename(run / "checkpoints" / "step00000009.ckpt")
    assert [path.name for path in newest_first(run / "checkpoints")] == [
        *("final.ckpt", "step00000004.ckpt", "step00000003.ckpt", "step00000002.ckpt", "step00000009.ckpt")
    ]
