"""Small runs for tests: in this process, or as a user would start them."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from src.build import CONFIG_DIR
from src.cli.entry import entrypoint
from src.training.run import run

ROOT = Path(__file__).resolve().parents[1]

# A run of two-layer, 16-wide models on windows of 64 tokens: milliseconds a step.
TINY = [
    "data=depo_small",
    "data.window=64",
    "data.batch_size=4",
    "data.eval_batch_size=4",
    "data.val_windows=6",
    "data.test_windows=6",
    "model.dim=16",
    "model.feedforward.hidden_dim=16",
    "trainer=cpu",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "scheduler.warmup_steps=1",
]


def compose_run(folder: Path, *overrides: str, config_name: str = "train") -> Any:
    """The configuration of a run in ``folder``, as the command line would compose it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose(
            config_name=config_name,
            overrides=[f"hydra.runtime.output_dir={folder}", *overrides],
            return_hydra_config=True,
        )
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def tiny_run(folder: Path, *overrides: str) -> dict[str, float]:
    """Trains in this process; returns the metrics."""
    return run(compose_run(folder, *TINY, *overrides))


def command(script: str, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python src/<script>.py`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "src" / f"{script}.py"), *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"} | environment,
    )
    assert not check or done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done


def main(job: Callable[[Any], Any], config_name: str, *arguments: str) -> None:
    """A command line in this process: what ``python src/<script>.py`` does after its imports. Exits as it does."""
    before = sys.argv
    GlobalHydra.instance().clear()
    sys.argv = [config_name, *arguments]
    try:
        entrypoint(config_name, job)
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()


def results(folder: Path) -> dict[str, Any]:
    """What the run in ``folder`` wrote down."""
    return json.loads((folder / "results.json").read_text())


def evaluation(folder: Path) -> dict[str, Any]:
    """What the only evaluation in ``folder`` wrote down."""
    (path,) = folder.glob("evaluation_*.json")
    return json.loads(path.read_text())


def same(a: Any, b: Any) -> bool:
    """Bit-for-bit equality of nested containers of tensors and plain values."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def launch(processes: int, jobs: list[tuple[Path, list[str]]], folder: Path, ahead: Path | None = None) -> None:
    """Several runs, one after another, on this many processes that torchrun starts; ``ahead`` is looked in for modules first."""
    written = folder / f"jobs{processes}.json"
    written.write_text(json.dumps([[str(to), overrides] for to, overrides in jobs]))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
            *("--master-port", free_port(), str(ROOT / "tests" / "several_runs.py"), str(written)),
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, [*([ahead] if ahead else []), ROOT]))},
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def free_port() -> str:
    """A port that nobody listens at, as text."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def curve(folder: Path, column: str) -> list[float]:
    """A column of a run's metrics, in order of steps."""
    with (folder / "csv" / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def final(folder: Path) -> dict[str, Any]:
    """A run's last checkpoint."""
    return torch.load(folder / "checkpoints" / "final.ckpt", weights_only=True)
