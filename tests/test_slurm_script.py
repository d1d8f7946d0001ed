"""scripts/slurm/train.sbatch, with stand-ins for SLURM's own commands."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.runs import ROOT

SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"


@pytest.fixture
def submit(tmp_path):
    def stand_in(name: str, body: str) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def run(status: int, *arguments: str) -> tuple[int, str, str]:
        """The exit status of the job, what srun was to start, and what became of the job."""
        stand_in("srun", f'echo "$@" > {tmp_path}/started; exit {status}')
        stand_in("scontrol", f'echo "$@" > {tmp_path}/queue')
        slurm = {"SLURM_JOB_ID": "42", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "2"}
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            check=False,
            env=os.environ
            | slurm
            | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)},
        )
        queue = tmp_path / "queue"
        return done.returncode, (tmp_path / "started").read_text(), queue.read_text() if queue.exists() else ""

    return run


def test_a_run_that_was_preempted_goes_back_into_the_queue(submit):
    status, started, queue = submit(75, "experiment=single_gpu/depo1", "trainer=fsdp_nodes", "tags=[a b]")
    assert status == 75
    assert queue == "requeue 42\n"
    for option in ("trainer=fsdp_nodes", "trainer.devices=8", "++trainer.num_nodes=2", "tags=[a b]", "ckpt_path=auto"):
        assert option in started
    assert "hydra.run.dir=logs/slurm/42" in started  # the same folder the next time


@pytest.mark.parametrize("status", [0, 1])
def test_one_that_has_ended_or_failed_does_not(submit, status):
    assert submit(status)[0] == status
    assert submit(status)[2] == ""


def test_slurm_is_told_to_send_the_signal_that_the_run_listens_to():
    options = [line.split()[1] for line in Path(SCRIPT).read_text().splitlines() if line.startswith("#SBATCH")]
    assert "--requeue" in options
    assert any(option.startswith("--signal=USR1@") for option in options)
