"""What a sweep will cost, before it is run: from finished runs of the same kind where there are any, else from arithmetic."""

from __future__ import annotations

import json
import statistics
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from src.build import model_from_config
from src.components.backbone import Backbone
from src.config import instantiate
from src.datamodules.base import StreamDataModule
from src.reporting.runs import Run
from src.reporting.wording import duration
from src.sweeps.jobs import is_finished
from src.sweeps.plan import Job, Match, is_repetition

# Floating-point operations per second that training sustains, where nothing has been measured: a small model on a core, and
# bf16 on a recent datacentre GPU. They are guesses within a factor of three.
CPU_RATE, GPU_RATE = 3e10, 2e14
START = 10.0  # seconds: imports, data, the first compilation


def estimates(jobs: list[Job], root: Path) -> dict[str, float]:
    """Seconds by job name; 0 for what is finished.

    Runs of other seeds and learning rates are of the same kind: their median is the estimate.
    """
    measured: dict[str, list[float]] = {}
    done: set[str] = set()
    for job in jobs:
        run = Run(job.folder(root))
        if is_finished(job, root):
            done.add(job.name)
            measured.setdefault(_kind(job), []).append(float(run.results["seconds"]))
    flops = {kind: training_flops(job) for kind, job in {_kind(job): job for job in jobs}.items()}
    found = {}
    for job in jobs:
        kind = _kind(job)
        guess = START + flops[kind] / (GPU_RATE if on_gpu(job) else CPU_RATE)
        found[job.name] = 0.0 if job.name in done else statistics.median(measured.get(kind, [guess]))
    return found


def training_flops(job: Job) -> float:
    """Forward and backward, over the whole run."""
    data = job.config["data"]
    tokens = job.config["trainer"]["max_steps"] * data["batch_size"] * data["window"]
    return 3.0 * net_of(job).flops_per_token(data["window"] - 1) * tokens


def net_of(job: Job) -> Backbone:
    """The model of a job, on the meta device."""
    section = {key: job.config[key] | {"seed": 0} for key in ("data", "model")}
    return _net(json.dumps(section, sort_keys=True))


@lru_cache(maxsize=4096)
def _net(section: str) -> Backbone:
    job = json.loads(section)
    data: StreamDataModule = instantiate(job["data"], "data")
    return model_from_config(
        job["model"] | {"vocab_size": job["model"]["vocab_size"] or data.expected_vocab_size}, "meta"
    )


def on_gpu(job: Job) -> bool:
    """Whether a job asks for a GPU."""
    return job.config["trainer"].get("accelerator") in ("cuda", "gpu")


def print_plan(title: str, jobs: list[Job], root: Path, seconds: dict[str, float], where: str, workers: int) -> None:
    """A row for each task and variant, and the sum."""
    table = Table(title=title, title_justify="left")
    for column in ("task", "variant", "runs", "finished", "FLOPs of a run", "time of a run"):
        table.add_column(column, justify="left" if column in ("task", "variant") else "right")
    rows: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        rows.setdefault((job.task, job.variant), []).append(job)
    for (task, variant), members in rows.items():
        left = [job for job in members if seconds[job.name]]
        took = [float(Run(job.folder(root)).results["seconds"]) for job in members if not seconds[job.name]]
        shown = duration(statistics.median([seconds[job.name] for job in left] or took))
        table.add_row(task, variant, str(len(members)), str(len(took)), f"{training_flops(members[0]):.1e}", shown)
    console = Console()
    console.print(table)
    total = sum(seconds.values())
    left = sum(value > 0 for value in seconds.values())
    console.print(
        f"{left} of {len(jobs)} jobs to run, {where}: about {duration(total)} of work, {duration(total / workers)} in all",
        highlight=False,
    )


def print_matched(jobs: list[Job], match: Match) -> None:
    """What the variants have of each budget, after they were made equal in one of them: relative to the one that stayed as it is."""
    table = Table(title=f"{match.budget} of {match.to}, by {match.change}", title_justify="left")
    for column in ("task", "variant", "width", "depth", "parameters", "FLOPs a token", "state"):
        table.add_column(column, justify="left" if column in ("task", "variant") else "right")
    kinds = list({_kind(job): job for job in jobs}.values())
    for job in kinds:
        like = next(j for j in kinds if (j.task, j.variant, _asked(j)) == (job.task, match.to, _asked(job)))
        own, its = (_budgets(net_of(j), j.config["data"]["window"] - 1) for j in (job, like))
        cells = [f"{a:,} (x{a / b:.3g})" if b else f"{a:,}" for a, b in zip(own, its, strict=True)]
        table.add_row(job.task, job.variant, str(net_of(job).dim), str(net_of(job).depth), *cells)
    Console().print(table)


def _budgets(net: Backbone, seq_len: int) -> tuple[int, int, int]:
    return net.count_parameters(), net.flops_per_token(seq_len), net.state_size(seq_len)


def print_jobs(jobs: list[Job], seconds: dict[str, float]) -> None:
    """A line each: hash, task, variant, settings, expected time or that it is done; then how to run one alone."""
    for job in jobs:
        left = duration(seconds[job.name]) if seconds[job.name] else "finished"
        print(f"{job.name}  {job.task} | {job.variant} | {job.settings_in_words}  {left}")
    print(f"\nthe first of them: {jobs[0].command}")


def _kind(job: Job) -> str:
    return json.dumps([job.task, job.variant, _asked(job)], sort_keys=True)


def _asked(job: Job) -> dict[str, Any]:
    return {keys: value for keys, value in job.settings.items() if not is_repetition(keys)}
