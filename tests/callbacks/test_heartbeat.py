"""The exchange between processes that nobody waits for."""

import os
import subprocess
import sys
import time

import pytest

from src.callbacks.heartbeat import Heartbeat
from tests.runs import ROOT, free_port

# Two processes whose main threads wait, as for a GPU, and do not notice each other.
PROCESS = """
import os, sys, time
from types import SimpleNamespace
import torch.distributed
from src.callbacks.heartbeat import Heartbeat

torch.distributed.init_process_group("gloo")
rank, dies = torch.distributed.get_rank(), sys.argv[1] == "dies"
trainer = SimpleNamespace(world_size=2, global_rank=rank)
heartbeat = Heartbeat(interval_seconds=0.1, timeout_seconds=0.5 if not dies else 20.0)
heartbeat.on_fit_start(trainer, None)
time.sleep(1)
if dies and rank == 1:
    os._exit(9)
time.sleep(60 if dies else 2)
heartbeat.on_fit_end(trainer, None)
print("went on", flush=True)
"""


def start(rank: int, port: str, *arguments: str) -> "subprocess.Popen[str]":
    where = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | where | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def test_a_process_that_only_waits_learns_that_the_other_has_died():
    port = free_port()
    waiting, dying = (start(rank, port, "dies") for rank in (0, 1))
    assert dying.wait(timeout=60) == 9
    died = time.monotonic()
    output, _ = waiting.communicate(timeout=60)
    assert time.monotonic() - died < 50
    assert waiting.returncode == 1
    assert "rank 0: another process of this run has died" in output
    assert "went on" not in output


@pytest.mark.slow
def test_a_process_that_is_busy_for_long_is_not_called_dead():
    port = free_port()
    both = [start(rank, port, "is busy") for rank in (0, 1)]
    for process in both:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert "went on" in output


@pytest.mark.parametrize(("interval", "timeout"), [(0.0, 60.0), (5.0, 5.0)])
def test_an_impossible_rhythm(interval, timeout):
    with pytest.raises(ValueError, match="interval_seconds="):
        Heartbeat(interval, timeout)
