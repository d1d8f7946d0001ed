"""What a run writes down: whole or not at all, kept when it is damaged, and no reason to stop."""

import csv
import errno
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import src.support.files
from src.callbacks.guard import Guard
from src.cli.entry import _Output, at_home
from src.config import ConfigError
from src.config.mistakes import first_misspelt_key, unreadable_override
from src.runs.csv_log import CSVLog
from src.runs.registry import Recorded
from src.train import train
from tests.runs import ROOT, TINY, curve, main, results, tiny_run


def log_in(folder: Path) -> CSVLog:
    return CSVLog(folder, name="", version="csv", flush_logs_every_n_steps=1)


def written(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def fill(folder: Path, rows: int) -> None:
    log = log_in(folder)
    for step in range(rows):
        log.experiment.log_metrics({"train/loss": step}, step)
    log.save()


# ---- L2: metrics.csv ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics", [{"train/loss": 0.5}, {"train/loss": 0.5, "train/new": 1.0}, {"val/loss": 1.0}])
def test_a_kill_while_metrics_are_rewritten_costs_no_row(tmp_path, monkeypatch, metrics):
    """Killed at any write: all rows of before are there, or all of after."""
    fill(tmp_path, 50)
    log = log_in(tmp_path)
    _ = log.experiment

    class Killed(BaseException):
        pass

    def dies(*_: object) -> None:
        raise Killed

    for place in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(src.support.files.os if place == "fsync" else src.support.files.Path, place, dies)
            with pytest.raises(Killed):
                log.experiment.log_metrics(metrics, 49)
        assert len(written(tmp_path)) == 50
        log = log_in(tmp_path)
    log.experiment.log_metrics(metrics, 49)
    log.save()
    assert len(written(tmp_path)) == (50 if "train/loss" in metrics else 51)
    assert not list(tmp_path.rglob("*.part"))


def test_a_kill_while_a_column_is_added_costs_no_row(tmp_path, monkeypatch):
    fill(tmp_path, 50)
    log = log_in(tmp_path)
    log.experiment.log_metrics({"train/loss": 1.0}, 50)
    log.save()
    log.experiment.log_metrics({"train/loss": 1.0, "train/other": 2.0}, 51)
    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", lambda self, rows: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            log.save()
    assert len(written(tmp_path)) == 51
    log.save()
    assert len(written(tmp_path)) == 52
    assert written(tmp_path)[-1]["train/other"] == "2.0"


DAMAGE = {
    "bytes of something else": lambda content: bytes(range(256)) * 8,
    "a hole of zeros": lambda content: content[:200] + bytes(300) + content[500:],
    "a row cut in the middle": lambda content: content.replace(b"\n0,19,", b"\n0,"),
    "a step that is no number": lambda content: content.replace(b"\n0,19,", b"\n0,x,"),
    "no header": lambda content: content[content.index(b"\n") + 1 :],
    "a million columns": lambda content: b"step," + b"c," * 1_000_000 + b"d\n" + b"1\n" * 100 + content,
    "a quote that never ends": lambda content: content.replace(b"\n0,19,", b'\n0,19,"'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_metrics_are_put_aside_and_the_run_goes_on(tmp_path, caplog, name):
    options = ["trainer.max_steps=40", "callbacks.checkpoint.every_n_train_steps=10", "trainer.val_check_interval=40"]
    tiny_run(tmp_path, *options)
    path = tmp_path / "csv" / "metrics.csv"
    damaged = DAMAGE[name](path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    (tmp_path / "checkpoints" / "final.ckpt").unlink()
    (tmp_path / "checkpoints" / "step00000040.ckpt").unlink()
    (tmp_path / "results.json").unlink()
    tiny_run(tmp_path, *options, "ckpt_path=auto")
    assert "metrics.csv is damaged" in caplog.text
    (aside,) = path.parent.glob("*.damaged")
    assert aside.read_bytes() == damaged
    assert len(curve(tmp_path, "train/loss")) >= 10


def test_a_full_disk_costs_no_row_and_no_run(tmp_path, monkeypatch, caplog):
    """Of the log; what could not be written is written when there is room again, new columns too."""
    full = [False]
    write = csv.DictWriter.writerows

    def fails(self: csv.DictWriter, rows: list) -> None:
        write(self, rows)
        if full[0]:
            self.writer.writerow(["half a row"])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(csv.DictWriter, "writerows", fails)
    log = log_in(tmp_path)
    for step in range(6):
        full[0] = step in (2, 3)
        log.experiment.log_metrics({"train/loss": float(step)} | ({"val/loss": 1.0} if step == 3 else {}), step)
        log.save()
    assert [row["train/loss"] for row in written(tmp_path)] == [str(float(step)) for step in range(6)]
    assert [row["val/loss"] for row in written(tmp_path)].count("1.0") == 1
    assert caplog.text.count("cannot be written") == 1


# ---- F5: full and read-only disks, nobody who reads ------------------------------------------------------------------


def test_a_record_that_cannot_be_written_at_the_end_ends_nothing(tmp_path, monkeypatch, caplog):
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Recorded(tmp_path, "0" * 12):
        monkeypatch.setattr("src.runs.registry.write_json", no_room)
    assert "run.json" in caplog.text
    assert not list(tmp_path.glob("*.part"))


def test_what_fails_leaves_no_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(src.support.files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        src.support.files.write_text(tmp_path / "a.json", "content")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "output",
    ["| head -1", "2>&- >&-", *(pytest.param(to, marks=pytest.mark.slow) for to in (">&-", "> /dev/full"))],
)
def test_printing_never_ends_a_run(tmp_path, output):
    words = [
        sys.executable,
        str(ROOT / "src" / "train.py"),
        *TINY,
        f"hydra.run.dir={tmp_path}/run",
        "trainer.max_steps=30",
    ]
    command = " ".join(f"'{word}'" for word in words)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} {output}; echo status $? > {tmp_path}/status"],
        check=False,
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (tmp_path / "status").read_text() == "status 0\n", done.stderr
    assert results(tmp_path / "run")["steps"] == 30


def test_signs_that_a_terminal_does_not_have_are_replaced():
    raw = io.BytesIO()
    output = _Output(io.TextIOWrapper(raw, encoding="ascii"))
    output.write("μ ┃ done\n")
    output.flush()
    assert raw.getvalue() == b"? ? done\n"


@pytest.mark.parametrize("where", ["/proc/run", "{file}/run"])
def test_a_folder_that_cannot_be_written_is_one_message(tmp_path, capsys, where):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(train, "train", *TINY, "hydra.run.dir=" + where.format(file=tmp_path / "file"))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "cannot be written" in message
    assert "Traceback" not in message


def test_a_test_in_the_folder_of_a_run_is_refused_before_anything_is_written(tmp_path, capsys):
    tiny_run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        main(train, "train", *TINY, "train=false", f"ckpt_path={tmp_path}", f"hydra.run.dir={tmp_path}")
    assert "evaluate.py" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# ---- L3: the guard --------------------------------------------------------------------------------------------------


class Batches:
    """As much of a trainer as the guard asks."""

    world_size, global_rank, accumulate_grad_batches, is_global_zero = 1, 0, 1, True

    def __init__(self) -> None:
        self.global_step = 0


def test_a_norm_that_settles_higher_becomes_the_new_normal(tmp_path, caplog):
    import torch

    guard, trainer = Guard(str(tmp_path)), Batches()
    batch = {"tokens": torch.zeros(4, 64, dtype=torch.int64)}
    for step in range(3000):
        trainer.global_step = step
        guard.on_train_batch_start(trainer, None, batch, step)  # type: ignore[arg-type]
        norm = (1.0 if step < 200 else 8.0) + 0.01 * (step % 7)
        guard.before_update(trainer, None, torch.tensor(1.0), torch.tensor(norm))
    warned = caplog.text.count("grad_norm")
    assert 1 <= warned <= 20
    assert len(list((tmp_path / "bad_batches").iterdir())) == min(warned, guard.keep)
    # And a spike above that is still one.
    trainer.global_step = 3000
    guard.before_update(trainer, None, torch.tensor(1.0), torch.tensor(800.0))
    assert caplog.text.count("grad_norm") == warned + 1


def test_what_is_kept_is_capped(tmp_path, caplog):
    import torch

    guard, trainer = Guard(str(tmp_path), keep=3), Batches()
    for step in range(400):
        trainer.global_step = step
        norm = 10.0 ** (step // 40) + 0.01 * (step % 7)
        guard.before_update(trainer, None, torch.tensor(1.0), torch.tensor(norm))
    assert len(list((tmp_path / "bad_batches").iterdir())) == 3
    assert "its batch is not kept" in caplog.text
    with pytest.raises(ValueError, match="keep=-1"):
        Guard(str(tmp_path), keep=-1)


# ---- F6: the command line -------------------------------------------------------------------------------------------


def test_the_command_line_is_explained(tmp_path):
    assert str(first_misspelt_key("train", ["data=text_files", "data.path=docs", "data.windw=64"])).startswith(
        "data.windw"
    )
    assert first_misspelt_key("train", ["data=text_files", "data.path=docs"]) is None
    assert "name='a=b'" in str(unreadable_override(["seed=1", "name=a=b"]))
    assert "'overrides=[\"a=1\"]'" in str(unreadable_override(["overrides=[a=1]"]))
    assert unreadable_override(["seed=1", "name='a=b'", "+x=[1,2]", "~logger"]) is None
    assert at_home("ckpt_path=~/run") == f"ckpt_path={Path.home()}/run"
    assert at_home("~logger") == "~logger"
    for override, said in [
        ("seed=4294967296", "seed=4294967296: at most 4294967295"),
        ("trainer.max_steps=abc", "trainer.max_steps='abc'"),
        ("ckpt_path='~/nothing.ckpt'", f"{Path.home()}/nothing.ckpt"),
    ]:
        with pytest.raises(ConfigError, match=said):
            tiny_run(tmp_path, override)


def test_a_resumed_run_says_from_where(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tiny_run(tmp_path, "callbacks.checkpoint.every_n_train_steps=3")
    (tmp_path / "checkpoints" / "final.ckpt").unlink()
    (tmp_path / "results.json").unlink()
    tiny_run(tmp_path, "callbacks.checkpoint.every_n_train_steps=3", "ckpt_path=auto")
    assert "going on after step 3" in caplog.text
    assert "other code" not in caplog.text
    assert json.loads((tmp_path / "run.json").read_text())["resumed_from"].endswith("step00000003.ckpt")


def test_a_resumed_run_says_when_other_code_wrote_its_checkpoint(tmp_path, caplog, monkeypatch):
    here = {"commit": "b3059359c0", "dirty": True, "diff_sha256": "9f8e7d6c"}
    monkeypatch.setattr("src.runs.registry.git_state", lambda: here)
    tiny_run(tmp_path, "callbacks.checkpoint.every_n_train_steps=3")
    (tmp_path / "checkpoints" / "final.ckpt").unlink()
    (tmp_path / "results.json").unlink()
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"git": here | {"diff_sha256": "1a2b3c4d"}}))
    tiny_run(tmp_path, "callbacks.checkpoint.every_n_train_steps=3", "ckpt_path=auto")
    told = "other code than before: b3059359c with changes 1a2b3c there, b3059359c with changes 9f8e7d here"
    assert told in caplog.text
