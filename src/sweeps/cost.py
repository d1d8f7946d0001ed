"""What a sweep will cost, before it is run: from finished runs of the same kind where there are any, else from arithmetic."""

from __future__ import annotations

import heapq
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from src.components.backbone import Backbone
from src.config import instantiate
from src.config.building import model_from_config
from src.datamodules.base import StreamDataModule
from src.runs.runs import Run
from src.support.console import duration, plain_console, print_cells
from src.sweeps.jobs import is_finished
from src.sweeps.plan import Job, Match, is_repetition

# Floating-point operations per second that training sustains, where nothing has been measured: a small model on a core, and
# bf16 on a recent datacentre GPU. They are guesses within a factor of three.
CPU_RATE, GPU_RATE = 3e10, 2e14
START = 10.0  # seconds: imports, data, the first compilation


def estimates(jobs: list[Job], root: Path, told: Callable[[str], object] = lambda words: None) -> dict[str, float]:
    """Seconds by job name; 0 for what is finished.

    Runs of other seeds and learning rates are of the same kind: their median is the estimate. Kinds of which nothing is measured are
    guessed from arithmetic, and the guess is corrected by how far it was off for those that are.
    """
    measured: dict[str, list[float]] = {}
    done: set[str] = set()
    for job in jobs:
        if is_finished(job, root):
            done.add(job.name)
            measured.setdefault(kind_of(job), []).append(float(Run(job.folder(root)).results["seconds"]))
    kinds = {kind_of(job): job for job in jobs}
    guesses: dict[str, float] = {}
    for number, (kind, job) in enumerate(kinds.items(), start=1):
        told(f"counting operations, {number:,} of {len(kinds):,} models")
        guesses[kind] = START + training_flops(job) / (GPU_RATE if on_gpu(job) else CPU_RATE)
    found = corrected(guesses, measured)
    return {job.name: 0.0 if job.name in done else found[kind_of(job)] for job in jobs}


def corrected(guesses: Mapping[str, float], measured: Mapping[str, list[float]]) -> dict[str, float]:
    """Seconds of each kind: what was measured, or the guess times how much longer than guessed the others took."""
    medians = {kind: statistics.median(values) for kind, values in measured.items() if values}
    ratios = [medians[kind] / guesses[kind] for kind in medians if guesses.get(kind)]
    ratio = statistics.median(ratios) if ratios else 1.0
    return {kind: medians.get(kind, guess * ratio) for kind, guess in guesses.items()}


def makespan(seconds: Iterable[float], workers: int) -> float:
    """How long jobs take in all, in this order, each on the worker that is free first: never less than the longest of them."""
    free = [0.0] * max(1, workers)
    for value in seconds:
        heapq.heapreplace(free, free[0] + value)
    return max(free)


def training_flops(job: Job) -> float:
    """Forward and backward, over the whole run."""
    data = job.config["data"]
    read = data["window"] - 1  # the last token of a window is only predicted
    tokens = job.config["trainer"]["max_steps"] * data["batch_size"] * read
    return 3.0 * net_of(job).flops_per_token(read) * tokens


def net_of(job: Job) -> Backbone:
    """The model of a job, on the meta device."""
    model = dict(job.config["model"])
    if not model["vocab_size"]:
        model["vocab_size"] = _vocabulary(json.dumps(job.config["data"] | {"seed": 0}, sort_keys=True))
    return _net(json.dumps(model | {"seed": 0}, sort_keys=True))


@lru_cache(maxsize=4096)
def _net(model: str) -> Backbone:
    return model_from_config(json.loads(model), "meta")


@lru_cache(maxsize=4096)
def _vocabulary(data: str) -> int:
    datamodule: StreamDataModule = instantiate(json.loads(data), "data")
    return datamodule.expected_vocab_size


def on_gpu(job: Job) -> bool:
    """Whether a job asks for a GPU."""
    return job.config["trainer"].get("accelerator") in ("cuda", "gpu")


def print_plan(title: str, jobs: list[Job], root: Path, seconds: dict[str, float], where: str, workers: int) -> None:
    """A row for each task and variant, and the sum; where its settings differ in what they cost, from the least to the most."""
    columns, shown = ["task", "variant", "runs", "finished", "FLOPs of a run", "time of a run"], []
    rows: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        rows.setdefault((job.task, job.variant), []).append(job)
    for (task, variant), members in rows.items():
        operations = [training_flops(job) for job in {kind_of(job): job for job in members}.values()]
        left = [seconds[job.name] for job in members if seconds[job.name]]
        took = [float(Run(job.folder(root)).results["seconds"]) for job in members if not seconds[job.name]]
        # Of what is to be run, the expected times; of a row that is finished, what is typical of it.
        times = left or [statistics.median(took)]
        cells = (_range(operations, "{:.1e}".format), _range(times, duration))
        shown.append([task, variant, str(len(members)), str(len(took)), *cells])
    print_cells(title, columns, shown, left=2)
    console = plain_console()
    left = [seconds[job.name] for job in jobs if seconds[job.name]]
    console.print(
        f"{len(left)} of {len(jobs)} jobs to run, {where}: about {duration(sum(left))} of work, "
        f"{duration(makespan(left, workers))} in all"
    )
    if left:
        console.print(assumptions(jobs, root, where))


def _range(values: Iterable[float], shown: Callable[[float], str]) -> str:
    """The smallest and the largest, or one of them where they look alike."""
    values = list(values)
    return " - ".join(dict.fromkeys((shown(min(values)), shown(max(values)))))


def assumptions(jobs: list[Job], root: Path, where: str) -> str:
    """On what the expected times rest."""
    measured = {kind_of(job) for job in jobs if is_finished(job, root)}
    guessed = [job for job in {kind_of(job): job for job in jobs}.values() if kind_of(job) not in measured]
    if not guessed:
        return "Times are those of finished runs of the same kinds."
    rates = [f"{GPU_RATE / 1e12:g} TFLOP/s on a GPU"] if any(map(on_gpu, guessed)) else []
    rates += [f"{CPU_RATE / 1e9:g} GFLOP/s on the CPU"] if not all(map(on_gpu, guessed)) else []
    found = f"Times assume {' and '.join(rates)}, which may be off by a factor of three"
    found += ", corrected by what finished runs of other kinds took." if measured else "."
    if any(map(on_gpu, jobs)) and "on the CPU" in where:
        found += " These jobs ask for a GPU, and none is visible here: on this machine they would not run."
    return found


def print_matched(jobs: list[Job], match: Match) -> None:
    """What the variants have of each budget, after they were made equal in one of them: relative to the one that stayed as it is."""
    columns, rows = ["task", "variant", "width", "depth", "parameters", "FLOPs a token", "state"], []
    kinds = list({kind_of(job): job for job in jobs}.values())
    for job in kinds:
        like = next(j for j in kinds if (j.task, j.variant, _asked(j)) == (job.task, match.to, _asked(job)))
        own, its = (_budgets(net_of(j), j.config["data"]["window"] - 1) for j in (job, like))
        cells = [f"{a:,} (x{a / b:.3g})" if b else f"{a:,}" for a, b in zip(own, its, strict=True)]
        rows.append([job.task, job.variant, str(net_of(job).dim), str(net_of(job).depth), *cells])
    print_cells(f"{match.budget} of {match.to}, by {match.change}", columns, rows, left=2)


def _budgets(net: Backbone, seq_len: int) -> tuple[int, int, int]:
    return net.count_parameters(), net.flops_per_token(seq_len), net.state_size(seq_len)


def print_jobs(jobs: list[Job], seconds: dict[str, float]) -> None:
    """A line each: hash, task, variant, settings, expected time or that it is done; then how to run one alone."""
    for job in jobs:
        left = duration(seconds[job.name]) if seconds[job.name] else "finished"
        print(f"{job.name}  {job.task} | {job.variant} | {job.settings_in_words}  {left}")
    print(f"\nthe first of them: {jobs[0].command}")


def kind_of(job: Job) -> str:
    """What runs of other seeds and learning rates have in common."""
    return json.dumps([job.task, job.variant, _asked(job)], sort_keys=True)


def _asked(job: Job) -> dict[str, Any]:
    return {keys: value for keys, value in job.settings.items() if not is_repetition(keys)}
