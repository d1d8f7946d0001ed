"""SLURM: the scripts that submitit writes, and the same path on this machine by its local executor."""

import shutil
from pathlib import Path

import pytest
import submitit

from src.config import ConfigError
from src.runs.registry import Run
from src.support.files import Lock
from src.sweeps.jobs import is_finished
from src.sweeps.slurm import Slurm, run_job
from tests.sweeps.test_local import plan


@pytest.fixture
def sbatch(monkeypatch):
    """A machine that seems to have SLURM."""
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, *more: "/usr/bin/sbatch" if name in ("sbatch", "srun") else which(name, *more)
    )


def test_the_script_asks_for_what_the_configuration_says(tmp_path, sbatch):
    launcher = Slurm(
        partition="research",
        account="canon",
        nodes=2,
        gpus_per_node=8,
        tasks_per_node=8,
        cpus_per_task=6,
        memory_gb=480,
        timeout_minutes=90,
        array_parallelism=4,
        options={"constraint": "h100"},
        setup=["module load cuda"],
    )
    executor = launcher.executor(tmp_path)._executor
    assert isinstance(executor, submitit.SlurmExecutor)
    script = executor._make_submission_file_text("python -m the.job", "uid")
    lines = script.splitlines()
    for wanted in (
        "#SBATCH --partition=research",
        "#SBATCH --account=canon",
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --cpus-per-task=6",
        "#SBATCH --mem=480GB",
        "#SBATCH --time=90",
        "#SBATCH --constraint=h100",
        "#SBATCH --job-name=canon-lab",
        "module load cuda",
    ):
        assert wanted in lines, script
    assert any(line.startswith("#SBATCH --signal=") for line in lines)  # told before its time is up
    assert "srun" in script
    assert "python -m the.job" in script


def test_jobs_run_through_the_local_executor(tmp_path):
    jobs = plan().jobs()
    told: list[str] = []
    launcher = Slurm(cluster="local", gpus_per_node=0, cpus_per_task=1, timeout_minutes=10)
    launcher.run(jobs, tmp_path / "jobs", lambda job, what, seconds: told.append(what))
    assert all(is_finished(job, tmp_path / "jobs") for job in jobs)
    assert told.count("finished") == 2
    again: list[str] = []
    launcher.run(jobs, tmp_path / "jobs", lambda job, what, seconds: again.append(what))
    assert again == []
    assert all(not Run(job.folder(tmp_path / "jobs")).record["earlier"] for job in jobs)


def test_every_submission_has_a_folder_of_its_own(tmp_path, monkeypatch):
    """What lies under a number that a job will have, submitit would run."""
    asked: list[Path] = []

    class Refused(Exception):
        pass

    def executor(self: Slurm, folder: Path) -> None:
        asked.append(folder)
        assert list(folder.parent.iterdir()) == []
        raise Refused

    monkeypatch.setattr(Slurm, "executor", executor)
    for _ in range(2):
        with pytest.raises(Refused):
            Slurm(cluster="local").run(plan().jobs()[:1], tmp_path / "jobs", lambda *_: None)
    assert asked[0] != asked[1]
    assert all(tmp_path / "submitit" in folder.parents for folder in asked)


def test_a_job_that_another_sweep_has_is_left_alone(tmp_path):
    job = plan().jobs()[0]
    lock = Lock(job.folder(tmp_path))
    assert lock.acquire()
    assert run_job(job, tmp_path) == 0
    assert not (job.folder(tmp_path) / "run.json").exists()


def test_without_slurm_it_says_so(tmp_path: Path):
    if shutil.which("srun"):
        pytest.skip("this machine has SLURM")
    with pytest.raises(ConfigError, match=r"launcher.cluster=slurm: "):
        Slurm().executor(tmp_path)
