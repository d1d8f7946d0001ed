"""Sweeps by ``-m`` on two processes: every rank of a job runs the same configuration, or the run stops and says why."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import ROOT, TINY, command, results

PLUGINS = str(ROOT / "tests" / "plugins")
TWO = [o for o in TINY if o != "trainer=cpu"] + ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
RANDOM = ["-m", "hydra/sweeper=random"]


def hashes(text: str) -> list[str]:
    return re.findall(r"rank \d: config (\w{12})", text)


@pytest.mark.slow
def test_a_random_sampler_gives_both_ranks_of_a_job_the_same_configuration(tmp_path):
    done = command("train", *RANDOM, *TWO, f"hydra.sweep.dir={tmp_path}", PYTHONPATH=PLUGINS)
    found = hashes(done.stdout)
    by_hash = {name: found.count(name) for name in found}
    # Two jobs, and two ranks that agree in each, when they train and when they test.
    assert list(by_hash.values()) == [4, 4], done.stdout[-3000:]
    rates = []
    for job in ("0", "1"):
        assert results(tmp_path / job)["steps"] == 4
        rates.append(
            torch.load(tmp_path / job / "checkpoints/final.ckpt", weights_only=True)["config"]["optimizer"]["lr"]
        )
        assert results(tmp_path / job)["config_hash"] in by_hash
    assert rates[0] != rates[1]


@pytest.mark.slow
def test_ranks_that_a_launcher_starts_with_different_draws_stop_and_say_why(tmp_path):
    """As torchrun would: each process reads the command line for itself, and draws for itself."""
    environment = os.environ | {
        "PYTHONPATH": PLUGINS,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29000 + os.getpid() % 2000),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "src/train.py"), *RANDOM, *TWO, f"hydra.sweep.dir={tmp_path / rank}"],
            cwd=ROOT,
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    texts = [process.communicate(timeout=180)[0] for process in processes]
    assert all(process.returncode != 0 for process in processes), texts
    assert len({name for text in texts for name in hashes(text)}) == 2
    assert all("the ranks run different configurations" in text for text in texts), texts[0][-3000:]
    assert not list(Path(tmp_path).rglob("*.ckpt"))


@pytest.mark.parametrize("key", ["hydra/launcher=basic", "hydra.sweep.dir=x"])
def test_hydras_own_keys_are_left_to_hydra(key):
    from src.config.mistakes import first_misspelt_key

    assert first_misspelt_key("train", [key, "seed=1,2"]) is None
