"""Sweeps and runs that never ran, on disk as real ones are: for tests of the report, and to look at it."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from src.reporting.results import SweepResults, write_manifest
from src.runs.registry import FAILED, FINISHED, write_json
from src.sweeps.plan import Job, Statement, Sweep

VARIANTS = ("NoPE", "NoPE + Canon", "RoPE", "RoPE + Canon")
# How far each variant gets on each task in these fictions, from 0 to 1, and how much seeds scatter.
SKILL = {"NoPE": 0.05, "NoPE + Canon": 0.9, "RoPE": 0.72, "RoPE + Canon": 0.95}
SCATTER = 0.03
SEEDS = "seed,data.seed"  # the axis: one value for both
HOPS = (1, 2, 4)
CHANCE = 0.198


def make_sweep(
    root: Path,
    name: str = "results/R3",
    *,
    title: str = "NoPE with Canon layers rises to RoPE with them",
    tasks: tuple[str, ...] = ("Depo", "Mano"),
    variants: Sequence[str] = VARIANTS,
    rates: tuple[float, ...] = (2e-3, 4e-3),
    seeds: tuple[int, ...] = (1, 2, 3),
    others: dict[str, list] | None = None,
    expect: tuple[Statement, ...] | None = None,
    unfinished: int = 1,
    failed: int = 1,
    ran: float = 1.0,
    skill: dict[str, float] | None = None,
    metrics: dict[str, str] | None = None,
    published: dict | None = None,
    hops: tuple[int, ...] = HOPS,
    note: str | None = "Small models and few steps: it shows a direction, not a size.",
) -> SweepResults:
    """Writes a sweep's manifest and runs below ``root``/logs.

    Args:
        others: further axes, key -> values.
        expect: statements; None for two that fit the default variants.
        unfinished: how many of the last jobs were never begun.
        failed: how many before them have failed.
        ran: share of all jobs that was run at all.
        skill: of variants, from 0 to 1.

    Returns:
        The sweep, as a report reads it.
    """
    axes = {"optimizer.lr": list(rates), **(others or {}), SEEDS: list(seeds)}
    sweep = Sweep(
        title=title,
        tasks={task: [] for task in tasks},
        variants={name: [f"model={i}"] for i, name in enumerate(variants)},
        axes=axes,
        expect=list(_statements(variants, tasks[0]) if expect is None else expect),
        metrics=metrics or {},
        published=published or {},
        source="Part 4.1, Result 3",
        note=note,
    )
    jobs = _jobs(sweep, name)
    jobs_root = root / "logs" / "jobs"
    manifest = root / "logs" / "sweeps" / name / "smoke" / "manifest.json"
    write_manifest(manifest, name, "smoke", sweep, jobs, jobs_root, f"python src/sweep.py sweep={name} scale=smoke")
    begun = jobs[: math.floor(ran * len(jobs)) - (unfinished if ran == 1.0 else 0)]
    for number, job in enumerate(begun):
        fails = number >= len(begun) - failed
        size = list((others or {}).get("size", [])).index(job.settings["size"]) if "size" in job.settings else 0
        level = (skill or SKILL).get(job.variant, 0.5) * (0.85 + 0.1 * size) ** list(tasks).index(job.task)
        metric = sweep.metric_of(job.task)
        make_run(job.folder(jobs_root), job, level, size=size, fails=fails, metric=metric, hops=hops)
    return SweepResults(manifest)


def _statements(variants: Sequence[str], task: str) -> list[Statement]:
    """One on every task; two more on the first for the default variants."""
    found = [Statement(better=variants[-1], than=variants[0], by=0.3)]
    if variants == VARIANTS:
        found.append(Statement(better="NoPE + Canon", than="RoPE", by=0.3, task=task))
        found.append(Statement(better="NoPE + Canon", than="RoPE + Canon", by=-0.05, task=task))
    return found


def make_run(
    folder: Path, job: Job, skill: float, *, size: int = 0, fails=False, metric="test/accuracy", hops=HOPS
) -> None:
    """Writes the folder of one run."""
    rng = np.random.default_rng([job.seed, sum(job.variant.encode()), sum(job.task.encode())])
    off = 0.12 * abs(math.log2(job.learning_rate / 2e-3))
    final = float(np.clip(skill - off * skill + SCATTER * rng.standard_normal(), 0.0, 1.0))
    final = CHANCE * (1 - final) + final if "accuracy" in metric else 3.0 - 2.0 * final
    started = "2026-11-27T22:41:25.930+00:00"
    record: dict[str, Any] = {
        "status": FAILED if fails else FINISHED,
        "config_hash": job.name,
        "command": ["train.py", *job.overrides],
        "started": started,
        "ended": started,
        "seconds": 42.0 if fails else 310.0 + 10 * job.seed,
        "exit_status": int(fails),
        "error": "RuntimeError: loss is not finite at step 37" if fails else None,
        "host": "elsewhere",
        "pid": 1,
        "git": {"commit": "304ade544c8504bc5056c465a2329a6355beaff6", "branch": "main", "dirty": False, "changed": []},
        "environment": {"python": "3.12.1", "processor": "x86_64", "cpus": 2, "packages": {"torch": "2.13.0"}},
        "earlier": [],
    }
    write_json(folder / "run.json", record)
    config = {"name": "fake", "seed": job.seed, "canon": {"positions": "ABCD"}, "optimizer": {"lr": job.learning_rate}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    curve = _write_curves(folder, final, rng, metric.replace("test/", "val/"), steps=400 if fails else 1000)
    if fails:
        return
    results = {
        "name": "fake",
        "config_hash": job.name,
        "data": {"seed": 42, "task": job.task.lower(), "N": 8},
        "steps": 1000,
        "seconds": record["seconds"],
        "metrics": {"val/loss": 1.0, metric.replace("test/", "val/"): curve, "test/loss": 1.0, metric: final}
        | {f"test/accuracy/hop{hop}": max(CHANCE, final - 0.06 * (hop - 1)) for hop in hops},
        "chance": {"accuracy": CHANCE} | {f"accuracy/hop{hop}": CHANCE for hop in hops},
    } | _costs(job.variant, size)
    write_json(folder / "results.json", results)


def plain_run(folder: Path, name: str = "quickstart", status: str = FINISHED) -> None:
    """Writes the folder of a run that belongs to no sweep."""
    job = Job("Depo", name, {}, [f"experiment={name}"], {"seed": 7, "optimizer": {"lr": 1e-3}}, "0" * 12)
    make_run(folder, job, 0.6, fails=status == FAILED)
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"name": name}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def _jobs(sweep: Sweep, name: str) -> list[Job]:
    """As ``Sweep.jobs`` orders them, without composing configurations."""
    import itertools

    order = sorted(sweep.axes, key=lambda key: key != SEEDS)
    found = []
    for values in itertools.product(*(sweep.axes[key] for key in order)):
        settings = dict(zip(order, values, strict=True))
        for task, variant in itertools.product(sweep.tasks, sweep.variants):
            overrides = [
                "experiment=fake",
                *sweep.variants_by_name[variant],
                *(f"{key}={value}" for keys, value in settings.items() for key in keys.split(",")),
            ]
            config = {"seed": settings[SEEDS], "optimizer": {"lr": settings["optimizer.lr"]}}
            found.append(
                Job(task, variant, settings, overrides, config, f"{abs(hash_of(name, task, variant, settings)):012x}")
            )
    return found


def hash_of(*parts) -> int:
    """The same in every process, unlike ``hash``."""
    import zlib

    return zlib.crc32(json.dumps(parts, sort_keys=True).encode())


def _write_curves(folder: Path, final: float, rng, selection: str, steps: int) -> float:
    """csv/metrics.csv; returns the last validation score."""
    rows, score = [], 0.0
    rising = "accuracy" in selection
    for step in range(9, steps, 10):
        done = 1 / (1 + math.exp(-(step - 420) / 90))
        level = CHANCE + (final - CHANCE) * done if rising else 3.0 - (3.0 - final) * done
        noise = float(rng.normal(0, 0.012))
        loss = 3.0 - 2.7 * (level if rising else (3 - level) / 2.2) + 3 * noise + 1.2 * math.exp(-step / 60)
        rows.append({"epoch": 0, "step": step, "train/loss": max(loss, 0.02), "train/lr": 1e-3})
        if step % 100 == 99:
            score = level + noise
            rows.append(
                {"epoch": 0, "step": step, selection: min(score, 1.0) if rising else score, "val/loss": max(loss, 0.02)}
            )
    (folder / "csv").mkdir(parents=True, exist_ok=True)
    with (folder / "csv" / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)
    return score


def _costs(variant: str, size: int) -> dict[str, float]:
    canon, rope = "Canon" in variant, "RoPE" in variant
    parameters = int((104_000 + 2_400 * canon) * 1.8**size)
    return {
        "parameters": parameters,
        "flops_per_token": 2 * parameters + 900 * rope,
        "state_size": 24_448 + 1_200 * canon,
        "tokens": 2_048_000,
        "training_flops": 3 * 2 * parameters * 2_048_000,
        "tokens_per_second": 21_400.0 - 2_300 * canon - 700 * rope,
        "peak_memory_bytes": 1.2e9 + 6e7 * canon,
    }
