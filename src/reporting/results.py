"""From the runs of a sweep to numbers one can trust: cells, differences, verdicts.

A *cell* is a task, a variant and the values of all axes but seed and learning rate. It has two scores, which are never mixed:

- **mean over seeds at the best learning rate**: the rate is the one whose mean over seeds is best on the *validation* set;
  this is what differences and verdicts use, paired by seed;
- **best over learning rates**: the best single run on the test set, which is what the paper reports. It grows with the number
  of runs, so compare it only between cells with as many.

A *verdict* on a statement ("A scores at least 0.3 more than B"), from the interval of the paired differences:

    confirmed      both the Student and the bootstrap interval lie at or above what was said
    contradicted   both lie below it
    inconclusive   anything else, or fewer than three seeds
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from src.evaluation.evaluators import lower_is_better
from src.reporting.registry import COSTS, FINISHED, Run, write_json
from src.reporting.statistics import Difference, Interval, difference, student_interval
from src.sweeps.plan import Job, Statement, Sweep, is_repetition

log = logging.getLogger(__name__)

CONFIRMED, CONTRADICTED, INCONCLUSIVE = "confirmed", "contradicted", "inconclusive"
SEEDS_NEEDED = 3  # for a verdict
ROUNDING = 1e-9
# What has become of a job whose run has ended well and says nothing: it was another run, or its score is missing or no number.
OTHER, SCORELESS = "of another configuration", "without a score"


@dataclass(frozen=True)
class Cell:
    """What was measured of a variant on a task."""

    task: str
    variant: str
    others: dict[str, Any]  # axes but seed and learning rate
    metric: str
    lower_is_better: bool
    rate: float  # the best learning rate
    by_seed: dict[int, float]  # test score at that rate
    best: float  # best single run over learning rates and seeds
    runs: int  # finished, of all learning rates
    planned: int
    by_rate: dict[float, dict[int, float]] = field(repr=False)  # learning rate -> seed -> test score
    folders: dict[str, str] = field(repr=False)  # "rate/seed" -> folder
    costs: dict[str, float] = field(repr=False)  # means over the runs at the best rate
    commands: list[str] = field(repr=False)  # that repeat the runs at the best rate

    @property
    def mean(self) -> float:
        """Over seeds, at the best learning rate."""
        return sum(self.by_seed.values()) / len(self.by_seed)

    @property
    def interval(self) -> Interval:
        """95% Student interval of the mean over seeds."""
        return student_interval(list(self.by_seed.values()))


@dataclass(frozen=True)
class Verdict:
    """A statement and what became of it."""

    statement: Statement
    task: str
    metric: str
    outcome: str
    difference: Difference | None
    best_difference: float | None  # of the best runs over learning rates
    reason: str

    def __str__(self) -> str:
        said = f"{self.statement.better} vs {self.statement.than}, {self.task}, {self.metric}: by at least {self.statement.by:g}"
        return f"{self.outcome:<13} {said}: {self.reason}"


class SweepResults:
    """The plan of a sweep, as it was written down, and the runs that exist of it.

    Args:
        path: ``manifest.json``.
    """

    def __init__(self, path: Path):
        self.path = path
        self.plan: dict[str, Any] = json.loads(path.read_text())
        self.statements = [Statement(**item) for item in self.plan["expect"]]

    @property
    def name(self) -> str:
        """Such as results/R3."""
        return self.plan["name"]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One a job: task, variant, axes, status, ``value`` (test), ``selection`` (validation), costs, folder, command."""
        return [self._row(job) for job in self.plan["jobs"]]

    @cached_property
    def table(self) -> pd.DataFrame:
        """``rows`` as a table."""
        return pd.DataFrame(self.rows)

    def _row(self, job: dict[str, Any]) -> dict[str, Any]:
        run = Run(self.path.parent / job["folder"])
        done = run.status == FINISHED and run.results.get("config_hash") == job["name"]
        # A score that is no number (a run that diverged) is no score.
        metrics = {name: x for name, x in run.metrics.items() if math.isfinite(x)} if done else {}
        value = metrics.get(self.plan["metrics"][job["task"]])
        status = run.status if run.record else "planned"
        if status == FINISHED and value is None:
            status = SCORELESS if done else OTHER
        others = {key: value for key, value in job["settings"].items() if not is_repetition(key)}
        return {
            "job": job["name"],
            "task": job["task"],
            "variant": job["variant"],
            "seed": job["seed"],
            "learning_rate": job["learning_rate"],
            "others": json.dumps(others, sort_keys=True),
            "status": status,
            "value": value,
            "selection": metrics.get(self.plan["selections"][job["task"]]),
            "folder": str(run.folder),
            "command": job["command"],
        } | {key: run.results.get(key) if done else None for key in COSTS}

    @cached_property
    def cells(self) -> list[Cell]:
        """Of every task, variant and other setting of which something is finished, in the order of the plan."""
        groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for row in self.rows:
            groups.setdefault((row["task"], row["variant"], row["others"]), []).append(row)
        found = []
        for rows in groups.values():
            done = [row for row in rows if row["value"] is not None]
            if done:
                found.append(self._cell(done, len(rows)))
        return found

    def _cell(self, done: list[dict[str, Any]], planned: int) -> Cell:
        task = done[0]["task"]
        lower = self.lower_is_better(task)
        by_rate: dict[float, dict[int, float]] = {}
        selections: dict[float, list[float]] = {}
        for row in done:
            by_rate.setdefault(row["learning_rate"], {})[row["seed"]] = row["value"]
            # A run that was not validated is judged by what there is.
            judged = row["value"] if row["selection"] is None else row["selection"]
            selections.setdefault(row["learning_rate"], []).append(judged)
        best = min if lower else max
        # A rate that diverges on one seed is no better for having fewer runs counted: unfinished runs are the report's to show.
        rate = best(selections, key=lambda rate: sum(selections[rate]) / len(selections[rate]))
        chosen = [row for row in done if row["learning_rate"] == rate]
        costs = {key: [row[key] for row in chosen if row[key] is not None] for key in COSTS}
        return Cell(
            task=task,
            variant=done[0]["variant"],
            others=json.loads(done[0]["others"]),
            metric=self.plan["metrics"][task],
            lower_is_better=lower,
            rate=rate,
            by_seed=by_rate[rate],
            best=best(row["value"] for row in done),
            runs=len(done),
            planned=planned,
            by_rate=by_rate,
            folders={f"{row['learning_rate']}/{row['seed']}": row["folder"] for row in done},
            costs={key: sum(values) / len(values) for key, values in costs.items() if values},
            commands=[row["command"] for row in chosen],
        )

    def lower_is_better(self, task: str) -> bool:
        """For losses, perplexities, bits per byte and divergences."""
        return lower_is_better(self.plan["metrics"][task])

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """One for each statement and task."""
        found = []
        for statement in self.statements:
            tasks = [statement.task] if statement.task else list(self.plan["metrics"])
            found += [self._verdict(statement, task) for task in tasks]
        return found

    def _verdict(self, statement: Statement, task: str) -> Verdict:
        metric = self.plan["metrics"][task]
        sides = [
            [c for c in self.cells if (c.task, c.variant) == (task, name)]
            for name in (statement.better, statement.than)
        ]
        outcome, reason, found = INCONCLUSIVE, "runs are missing", None
        best = None
        if all(sides):
            found = compare(*sides)
            best = _best(sides[0]) - _best(sides[1])
            if self.lower_is_better(task):
                best = -best
        if found is not None:
            outcome, reason = judge(found, statement.by)
        return Verdict(statement, task, metric, outcome, found, best, reason)

    @property
    def outcome(self) -> str:
        """Of all statements together: confirmed if each is, contradicted if one is."""
        outcomes = {verdict.outcome for verdict in self.verdicts}
        if not outcomes:
            return "nothing was said"
        return CONTRADICTED if CONTRADICTED in outcomes else CONFIRMED if outcomes == {CONFIRMED} else INCONCLUSIVE


def compare(better: list[Cell], than: list[Cell]) -> Difference | None:
    """Paired differences of two variants on a task, each at its best learning rate; positive where the first is better.

    Pairs share the seed and all other settings. None when no pair is finished on both sides.
    """

    def scores(cells: list[Cell]) -> dict[tuple[int, str], float]:
        return {
            (seed, json.dumps(cell.others, sort_keys=True)): -value if cell.lower_is_better else value
            for cell in cells
            for seed, value in cell.by_seed.items()
        }

    a, b = scores(better), scores(than)
    return difference(a, b) if a.keys() & b.keys() else None


def judge(found: Difference, by: float) -> tuple[str, str]:
    """The outcome of "at least ``by`` more", and the numbers behind it."""
    # Scores are shares of a few hundred answers: 0.7 - 0.4 is meant to be 0.3.
    by -= ROUNDING
    low, high = min(found.student.low, found.bootstrap.low), max(found.student.high, found.bootstrap.high)
    numbers = (
        f"{_signed(found.mean)}, 95% t [{_signed(found.student.low)}, {_signed(found.student.high)}], "
        f"bootstrap [{_signed(found.bootstrap.low)}, {_signed(found.bootstrap.high)}], {found.pairs} pairs"
    )
    if found.unpaired:
        numbers += f" ({found.unpaired} runs without a partner)"
    if found.clusters < SEEDS_NEEDED:
        return INCONCLUSIVE, f"{numbers}; fewer than {SEEDS_NEEDED} seeds"
    return (CONFIRMED if low >= by else CONTRADICTED if high < by else INCONCLUSIVE), numbers


def _best(cells: list[Cell]) -> float:
    """Mean over other settings of the best run."""
    return sum(cell.best for cell in cells) / len(cells)


def write_manifest(path: Path, name: str, scale: str, sweep: Sweep, jobs: list[Job], root: Path, command: str) -> None:
    """Writes down the plan of a sweep, whole enough for a report to need nothing else but the runs.

    Args:
        path: ``manifest.json``; folders of jobs are stored relative to it, so that logs/ can be moved as a whole.
        name: of the sweep.
        scale: of the sweep.
        sweep: the plan.
        jobs: of the plan.
        root: folder of all jobs.
        command: that runs the sweep again.
    """
    content: dict[str, Any] = {
        "name": name,
        "scale": scale,
        "title": sweep.title,
        "note": sweep.note,
        "source": sweep.source,
        "metrics": {task: sweep.metric_of(task) for task in sweep.tasks},
        "selections": {task: sweep.selection_of(task) for task in sweep.tasks},
        "variants": list(sweep.variants),
        "axes": sweep.axes,
        "expect": [asdict(statement) for statement in sweep.expect],
        "match": asdict(sweep.match) if sweep.match else None,
        "published": sweep.published,
        "command": command,
        "jobs": [
            {
                "name": job.name,
                "task": job.task,
                "variant": job.variant,
                "settings": job.settings,
                "seed": job.seed,
                "learning_rate": job.learning_rate,
                "folder": os.path.relpath(job.folder(root), path.parent),
                "command": job.command,
            }
            for job in jobs
        ],
    }
    write_json(path, content)


def find_sweeps(root: Path) -> list[SweepResults]:
    """All sweeps whose manifest lies below a folder, by name; one that this version cannot read is reported and left out."""
    found = []
    for path in root.rglob("manifest.json"):
        try:
            sweep = SweepResults(path)
            found.append((sweep.name, sweep.plan["scale"], sweep))
        except (ValueError, KeyError, TypeError) as error:
            log.warning(
                f"{path} is left out, this version cannot read it ({error}); the command that wrote it writes it anew"
            )
    return [sweep for _, _, sweep in sorted(found, key=lambda row: (_counted(row[0]), row[1]))]


def _counted(name: str) -> list[Any]:
    """A key by which R2 comes before R10."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", name)]


def _signed(value: float) -> str:
    """Three decimals, or two digits of what is smaller than they show."""
    return f"{value:+.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:+.2g}"
