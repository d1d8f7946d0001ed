"""Sweeps on this machine: killed at any moment, the same command finishes what is missing and runs nothing twice."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from src.config import ConfigError
from src.runs.registry import Run
from src.support.files import Lock
from src.sweeps import local
from src.sweeps.jobs import Start, is_finished, start_of
from src.sweeps.local import Local, visible_gpus
from src.sweeps.plan import Job, Sweep
from tests.runs import ROOT, TINY, same

STEPS = 40
FIRST = ["trainer.max_steps=40", "trainer.val_check_interval=10", "callbacks.checkpoint.every_n_train_steps=5"]


def plan(**changes: Any) -> Sweep:
    parts: dict[str, Any] = {
        "title": "a test",
        "tasks": {"Depo": [*TINY, *FIRST]},
        "variants": {"none": ["canon.positions=''"], "ABCD": ["canon.positions=ABCD"]},
        "axes": {"seed": [1]},
    }
    return Sweep(**(parts | changes))


def attempts(job: Job, root: Path) -> list[dict[str, Any]]:
    record = Run(job.folder(root)).record
    return [*record.get("earlier", []), record]


def arguments(folder: Path) -> list[str]:
    overrides = ",".join(f"'{override}'" for override in [*TINY, *FIRST])
    return [
        *(sys.executable, str(ROOT / "src/sweep.py"), "sweep=canon_points", f"overrides=[{overrides}]"),
        *("axes={seed: [1], optimizer.lr: [1e-3]}", f"paths.log_dir={folder}", "report=false", "launcher.threads=1"),
    ]


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.05)


def test_a_sweep_killed_in_the_middle_goes_on_and_runs_nothing_twice(tmp_path):
    """First the sweep alone is killed, whose jobs go on by themselves; then everything, as when the machine goes down."""
    environment = os.environ | {"COLUMNS": "200"}
    jobs = tmp_path / "jobs"

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(arguments(tmp_path), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    first = begin()
    wait_for(lambda: len(list(jobs.glob("*/run.json"))) >= 2)
    first.kill()
    first.communicate()
    orphans = {path.parent.name for path in jobs.glob("*/run.json")}

    second = begin()
    wait_for(lambda: len(list(jobs.glob("*/run.json"))) >= 4 and any(jobs.glob("*/checkpoints/step*")))
    assert len(list(jobs.glob("*"))) == 4
    running = [run for run in map(Run, jobs.glob("*")) if run.status == "running"]
    wait_for(lambda: all(any(run.folder.glob("checkpoints/step*")) for run in running))
    second.kill()
    second.communicate()
    broken = set()
    for run in running:
        if not (run.folder / "results.json").exists():
            os.killpg(Run(run.folder).record["pid"], signal.SIGKILL)
            broken.add(run.folder.name)

    third = subprocess.run(arguments(tmp_path), check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert third.returncode == 0, third.stdout + third.stderr
    for folder in jobs.glob("*"):
        records = [*Run(folder).record["earlier"], Run(folder).record]
        assert [record["exit_status"] for record in records] == ([None, 0] if folder.name in broken else [0])
        assert Run(folder).status == "finished"
        with (folder / "csv" / "metrics.csv").open() as file:
            steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
        assert steps == list(range(STEPS))  # none missing, none twice
    assert orphans - broken
    fourth = subprocess.run(arguments(tmp_path), check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "0 of 4 jobs to run" in fourth.stdout
    assert "started" not in fourth.stdout
    # With other values for axes and overrides it is a trial, beside the sweep itself.
    assert not (tmp_path / "sweeps/canon_points/smoke/manifest.json").exists()
    (manifest,) = (tmp_path / "sweeps/canon_points/smoke").glob("*/manifest.json")
    again = shlex.split(json.loads(manifest.read_text())["command"])
    assert again[:4] == ["python", "src/sweep.py", "sweep=canon_points", "axes={seed:[1],optimizer.lr:[0.001]}"]


def test_an_interrupted_sweep_interrupts_its_jobs_even_in_the_background_of_a_script(tmp_path):
    """There the shell has told it, and all that it starts, to ignore Ctrl-C."""
    script = ["bash", "-c", '"$@" & echo $!; wait $!', "bash", *arguments(tmp_path), "launcher.workers=1"]
    process = subprocess.Popen(script, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    sweep = int(process.stdout.readline())
    wait_for(lambda: any((tmp_path / "jobs").glob("*/checkpoints/step*")))
    os.kill(sweep, signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "The same command goes on" in printed
    (folder,) = (tmp_path / "jobs").iterdir()
    assert Run(folder).status in ("interrupted", "finished")  # unless it had just ended
    assert "stopped after step" in (folder / "output.log").read_text() or Run(folder).status == "finished"


@pytest.mark.slow
def test_a_broken_job_ends_as_one_that_was_not_broken(tmp_path):
    (job,) = plan(variants={"ABCD": ["canon.positions=ABCD"]}).jobs()
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    Local(workers=1).run([job], straight, lambda *_: None)
    lock = Lock(job.folder(broken))
    assert lock.acquire()
    process = subprocess.Popen(
        start_of(job, broken).command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    wait_for((job.folder(broken) / "checkpoints/step00000010.ckpt").exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # A file that was being written when the power went.
    (job.folder(broken) / "checkpoints" / "step00000039.ckpt").write_bytes(b"PK\x03\x04 half")
    lock.release()
    told = []
    Local(workers=1).run([job], broken, lambda job, what, seconds: told.append(what))
    assert told[0].startswith("resumed at step ")
    assert told[-1] == "finished"
    a, b = Run(job.folder(straight)), Run(job.folder(broken))
    assert a.metrics == b.metrics
    assert a.curve("train/loss").equals(b.curve("train/loss"))
    assert [record["status"] for record in attempts(job, broken)] == ["running", "finished"]
    weights = [torch.load(run.folder / "checkpoints/final.ckpt", weights_only=True)["state_dict"] for run in (a, b)]
    assert same(*weights)


def test_a_job_that_fails_does_not_stop_the_others(tmp_path):
    jobs = plan().jobs()
    folder = jobs[0].folder(tmp_path)
    folder.mkdir()
    (folder / "csv").write_text("a file where a folder should be")
    told: list[tuple[str, str]] = []
    Local(workers=2, threads=1, attempts=1).run(
        jobs, tmp_path, lambda job, what, seconds: told.append((job.name, what))
    )
    assert (jobs[0].name, "failed") in told
    assert is_finished(jobs[1], tmp_path)
    assert not is_finished(jobs[0], tmp_path)
    assert "'csv' in it is a file, where a run writes a folder" in (folder / "output.log").read_text()


@pytest.mark.parametrize("name", ["output.log", "job.lock", ""])
def test_nothing_is_written_through_a_link_in_the_folder_of_a_job(tmp_path, name):
    """Jobs may lie in a folder that a colleague has sent; what is said of a link would be written through it."""
    job = plan().jobs()[0]
    place = job.folder(tmp_path / "jobs") / name
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a link to .*elsewhere"):
        Local(threads=1).run([job], tmp_path / "jobs", lambda job, what, seconds: None)
    assert not (tmp_path / "elsewhere").exists()


def test_a_finished_job_of_another_configuration_does_not_count(tmp_path):
    job = plan().jobs()[0]
    folder = job.folder(tmp_path)
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"status": "finished", "host": "x", "pid": 1}))
    (folder / "results.json").write_text(json.dumps({"config_hash": "another", "metrics": {}, "seconds": 1.0}))
    assert not is_finished(job, tmp_path)
    (folder / "results.json").write_text(json.dumps({"config_hash": job.name, "metrics": {}, "seconds": 1.0}))
    assert is_finished(job, tmp_path)


def test_a_lock_is_held_by_whoever_inherits_it(tmp_path):
    lock = Lock(tmp_path)
    assert lock.acquire()
    assert not Lock(tmp_path).acquire()
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.descriptor], start_new_session=True
    )
    lock.release()
    assert not Lock(tmp_path).acquire()
    child.communicate(b"\n")
    assert Lock(tmp_path).acquire()


def test_a_job_keeps_its_lock_when_its_sweep_is_gone(tmp_path, monkeypatch):
    job = plan().jobs()[0]
    sleeping = Start([sys.executable, "-c", "import time; time.sleep(60)"], 0)
    monkeypatch.setattr(local, "start_of", lambda *_: sleeping)
    lock = Lock(job.folder(tmp_path))
    assert lock.acquire()
    process, _ = local.launch(job, tmp_path, lock, {})
    lock.release()  # as the end of the sweep's process does
    try:
        assert not Lock(job.folder(tmp_path)).acquire()
    finally:
        process.kill()
        process.wait()
    assert Lock(job.folder(tmp_path)).acquire()


def test_checkpoints_that_cannot_be_gone_on_from_are_set_aside(tmp_path):
    job = plan().jobs()[0]
    folder = job.folder(tmp_path) / "checkpoints"
    folder.mkdir(parents=True)
    (folder / f"step{STEPS:08d}.ckpt").write_bytes(b"the end of training, but no results")
    start = start_of(job, tmp_path)
    assert start.step == 0
    assert not any(word.startswith("ckpt_path") for word in start.command)
    assert not folder.exists()
    assert (job.folder(tmp_path) / "checkpoints.1").is_dir()


def test_slots(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == ["2", "5"]
    launcher = Local(jobs_per_gpu=2)
    assert [launcher.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(launcher.workers)] == [
        "2",
        "2",
        "5",
        "5",
    ]
    assert Local(workers=3).slots == ["2", "5", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cores = len(os.sched_getaffinity(0))
    assert Local().slots == [None] * cores
    assert "CUDA_VISIBLE_DEVICES" not in Local().environment(0)
    assert Local(workers=1).environment(0)["OMP_NUM_THREADS"] == str(cores)
    with pytest.raises(ConfigError, match=r"launcher.workers=0: at least 1"):
        Local(workers=0)
