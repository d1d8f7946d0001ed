"""What a run leaves behind, and how it is read back."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

from src.config import experiment_hash, to_plain
from src.runs import registry
from src.runs.csv_log import CSVLog
from src.runs.registry import Recorded, Run, find_runs, runs_table
from tests.runs import ROOT, TINY, compose_run, results, tiny_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    tiny_run(folder, "canon.positions=A")
    return Run(folder)


def test_a_run_tells_how_it_was_made(finished):
    record = finished.record
    assert finished.status == "finished"
    assert record["exit_status"] == 0
    assert record["host"] == socket.gethostname()
    assert record["environment"]["packages"]["torch"]
    assert record["started"] < record["ended"]
    assert record["seconds"] > 0
    assert record["earlier"] == []
    if (ROOT / ".git").exists():
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert record["git"]["commit"] == commit.stdout.strip()


def test_a_run_tells_what_it_cost(finished):
    results = finished.results
    assert results["tokens"] == 4 * 4 * 64  # steps x windows x tokens
    assert (
        results["training_flops"] == 3 * results["flops_per_token"] * results["tokens"] * 63 / 64
    )  # a window's last is not read
    assert results["tokens_per_second"] > 0
    assert 1e7 < results["peak_memory_bytes"] < 1e11
    assert results["config_hash"] == finished.record["config_hash"]


def test_the_hash_names_what_is_computed_and_nothing_else(tmp_path):
    def hashed(*overrides):
        return experiment_hash(to_plain(compose_run(tmp_path / str(len(overrides)), *TINY, *overrides)))

    first = hashed()
    assert hashed("name=other", "tags=[x]") == first
    assert hashed("paths.log_dir=/elsewhere", "callbacks=quiet", "logger=tensorboard", "paths.data_dir=/data") == first
    different = {
        hashed(o) for o in ("seed=1", "optimizer.lr=1", "canon.positions=A", "data.seed=1", "trainer.max_steps=5")
    }
    assert len(different | {first}) == 6


def test_curves_count_finished_steps(finished):
    curve = finished.curve("train/loss")
    assert list(curve.index) == [1, 2, 3, 4]
    assert list(finished.curve("val/loss").index) == [2, 4]
    assert finished.curve("nothing").empty


def test_a_table_of_runs(finished):
    (run,) = find_runs(finished.folder.parent)
    table = runs_table([run])
    row = table.iloc[0]
    assert row["status"] == "finished"
    assert (row["data"], row["canon"], row["seed"]) == ("depo", "A", 42)
    assert row["test/accuracy"] == finished.metrics["test/accuracy"]
    assert row["parameters"] == finished.results["parameters"]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_runs(finished.folder / "nowhere")


def test_failures_and_interruptions_are_written_down(tmp_path):
    with pytest.raises(ZeroDivisionError), Recorded(tmp_path, "abc"):
        _ = 1 / 0
    assert Run(tmp_path).status == "failed"
    assert Run(tmp_path).record["error"] == "ZeroDivisionError: division by zero"
    with pytest.raises(KeyboardInterrupt), Recorded(tmp_path, "abc"):
        raise KeyboardInterrupt
    run = Run(tmp_path)
    assert run.status == "interrupted"
    assert [attempt["status"] for attempt in run.record["earlier"]] == ["failed"]


def test_a_run_that_was_killed_is_lost_and_not_running(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from src.runs.registry import Recorded\n"
        "with Recorded(Path(sys.argv[1]), 'abc'): time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert Run(tmp_path).status == "running"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert Run(tmp_path).status == "lost"
    (tmp_path / "run.json").write_text(json.dumps(Run(tmp_path).record | {"host": "another"}))
    assert Run(tmp_path).status == "running"  # nobody here can know


def test_half_a_record_does_not_keep_a_run_from_going_on(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "running", "st')
    with Recorded(tmp_path, "abc"):
        pass
    assert [attempt["status"] for attempt in Run(tmp_path).record["earlier"]] == ["unreadable"]


def test_a_run_without_results_has_not_finished(tmp_path):
    with Recorded(tmp_path, "abc"):
        pass
    assert Run(tmp_path).status == "lost"


def test_half_a_file_is_never_seen(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    registry.write_json(path, {"a": 1})
    monkeypatch.setattr(registry.json, "dumps", lambda *_, **__: "{half")
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        registry.write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 1\n}\n'


# ---- metrics over time ---------------------------------------------------------------------------------------------


def logged(folder, *rows):
    logger = CSVLog(folder, name="", version="csv", flush_logs_every_n_steps=1)
    for step, metrics in rows:
        logger.log_metrics(metrics, step)
    return pd.read_csv(folder / "csv" / "metrics.csv")


def test_a_resumed_run_goes_on_with_its_file(tmp_path):
    logged(
        tmp_path, (0, {"train/loss": 3.0}), (1, {"train/loss": 2.0}), (1, {"val/loss": 2.5}), (2, {"train/loss": 1.5})
    )
    table = logged(tmp_path, (2, {"train/loss": 1.5, "train/lr": 0.1}), (3, {"train/loss": 1.0}))
    assert table["train/loss"].dropna().tolist() == [3.0, 2.0, 1.5, 1.0]
    assert table["val/loss"].dropna().tolist() == [2.5]
    assert table["step"].tolist() == [0, 1, 1, 2, 3]


def test_a_test_alone_leaves_the_curves(tmp_path):
    logged(tmp_path, (5, {"train/loss": 3.0}))
    table = logged(tmp_path, (0, {"test/loss": 1.0}))
    assert table["train/loss"].dropna().tolist() == [3.0]
    assert table["test/loss"].dropna().tolist() == [1.0]


def test_a_row_that_was_cut_off_is_dropped(tmp_path):
    logged(tmp_path, (0, {"train/loss": 3.0, "train/lr": 1.0}), (1, {"train/loss": 2.0, "train/lr": 1.0}))
    path = tmp_path / "csv" / "metrics.csv"
    path.write_text(path.read_text().rstrip("\n") + "\n2,1.")
    assert logged(tmp_path, (2, {"train/loss": 1.5}))["train/loss"].tolist() == [3.0, 2.0, 1.5]


def test_a_run_that_starts_again_replaces_what_there_was(tmp_path):
    logged(tmp_path, (3, {"train/loss": 3.0}))
    assert logged(tmp_path, (0, {"train/loss": 9.0}))["train/loss"].tolist() == [9.0]


@pytest.mark.parametrize("name", ["run.json", "results.json", "csv/metrics.csv"])
@pytest.mark.parametrize(
    "content", [b"", b"[1, 2]", b"{", b"\xff\xfe\x00binary", b'{"metrics": null}', b'{"metrics": {"test/loss": "x"}}']
)
def test_a_file_that_is_not_what_was_written_is_no_crash(tmp_path, name, content):
    """It tells nothing, and the run is not taken for finished."""
    good = {"status": "finished", "started": "2026", "host": "x", "pid": 1}
    (tmp_path / "csv").mkdir()
    (tmp_path / "run.json").write_text(json.dumps(good))
    (tmp_path / "results.json").write_text(json.dumps({"metrics": {"test/loss": 1.0}, "seconds": 2.0}))
    (tmp_path / "csv" / "metrics.csv").write_text("step,val/loss\n0,1.0\n")
    assert Run(tmp_path).status == "finished"
    (tmp_path / name).write_bytes(content)
    run = Run(tmp_path)
    if name == "csv/metrics.csv":
        assert run.curve("val/loss").empty
    else:
        assert run.status == "lost"
        assert run.metrics == {} or name == "run.json"
    assert len(runs_table([run])) == 1


def test_a_resumed_run_counts_the_time_of_all_its_attempts(tmp_path):
    tiny_run(tmp_path / "a", "callbacks.checkpoint.every_n_train_steps=2")
    checkpoint = tmp_path / "a" / "checkpoints" / "step00000002.ckpt"
    content = dict(torch.load(checkpoint, weights_only=True))
    assert 0 < content["seconds"] < 60
    torch.save(content | {"seconds": 1000.0}, tmp_path / "later.ckpt")
    tiny_run(tmp_path / "b", f"ckpt_path={tmp_path / 'later.ckpt'}")
    assert 1000 < results(tmp_path / "b")["seconds"] < 1060
