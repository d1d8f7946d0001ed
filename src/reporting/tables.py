"""The tables of a sweep: every number that a report shows, in long form. Figures are drawn from them, CSV files hold them.

A *row* is a task and a setting (all axes but seed and learning rate), a row of the heat map; with a variant it is a cell.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import cached_property
from itertools import combinations
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from src.reporting.results import Cell, SweepResults, compare
from src.reporting.statistics import Difference, holm
from src.reporting.wording import half_interval, in_words, known, short_settings
from src.runs.runs import COSTS, Run

MOST_POINTS = 300  # of a curve; beyond that, neighbouring steps are averaged
FEWEST_POINTS = 60  # to which that goes down where there are so many curves that the page would be too large
ALL_POINTS = 60_000  # of all curves of a sweep
MOST_READ = 2_000_000  # points of all runs of a curve, at most so many are held to make its mean
RATE_KEYS = ("task", "setting", "variant", "learning_rate")
GROUP = re.compile(r"test/accuracy/([A-Za-z_]+)([0-9]{1,9})\+?")  # hop4, depth6+


Line = dict[str, Any]  # of a table


class Row(NamedTuple):
    """A task and a setting."""

    task: str
    setting: str


class Table(list[Line]):
    """Lines that are looked up by row and by cell again and again; not changed once they are."""

    @cached_property
    def by_row(self) -> dict[Row, list[Line]]:
        """The lines of every row."""
        found: dict[Row, list[Line]] = {}
        for line in self:
            found.setdefault(Row(line["task"], line["setting"]), []).append(line)
        return found

    @cached_property
    def by_cell(self) -> dict[tuple[Row, str], list[Line]]:
        """The lines of every row and variant."""
        found: dict[tuple[Row, str], list[Line]] = {}
        for line in self:
            found.setdefault((Row(line["task"], line["setting"]), line["variant"]), []).append(line)
        return found


class SweepTables:
    """The tables of one sweep.

    Args:
        sweep: its plan and runs.
    """

    def __init__(self, sweep: SweepResults):
        self.sweep = sweep
        self.variants: list[str] = list(sweep.plan["variants"])
        self.tasks: list[str] = list(sweep.plan["metrics"])

    @cached_property
    def jobs(self) -> Table:
        """One line a job: what the plan says, how it stands, what it scored, its command."""
        found = Table()
        for row in self.sweep.rows:
            line: Line = {key: value for key, value in row.items() if key != "reason"}
            line |= {key: row[key] if known(row[key]) else None for key in ("value", "selection", *COSTS)}
            found.append(line | {"setting": short_settings(json.loads(row["others"])), "error": row["reason"]})
        return found

    @property
    def runs(self) -> dict[str, Run]:
        """The runs by folder, whether or not there is anything."""
        _ = self.sweep.rows
        return self.sweep.runs

    @cached_property
    def rows(self) -> list[Row]:
        """All of the plan: tasks in its order, and their settings."""
        places = {task: place for place, task in enumerate(self.tasks)}
        return sorted(self.jobs.by_row, key=lambda row: places[row.task])

    @cached_property
    def cells(self) -> dict[tuple[Row, str], Cell]:
        """What has been measured, by row and variant."""
        return {(Row(c.task, short_settings(c.others)), c.variant): c for c in self.sweep.cells}

    def runs_of(self, cell: Cell) -> list[Run]:
        """The finished runs of a cell at its best learning rate, by seed."""
        return [self.runs[cell.folders[f"{cell.rate}/{seed}"]] for seed in sorted(cell.by_seed)]

    def chance(self, row: Row, variant: str | None = None, metric: str | None = None) -> float | None:
        """What guessing scores on a row, if finished runs say so: of a variant, or of all of them where it is the same."""
        name = (metric or self.sweep.plan["metrics"][row.task]).partition("/")[2]
        cells = [self.cells.get((row, known)) for known in (self.variants if variant is None else [variant])]
        found = {
            float(level)
            for cell in cells
            for run in (self.runs_of(cell) if cell else [])
            if (level := (run.results.get("chance") or {}).get(name)) is not None
        }
        return found.pop() if len(found) == 1 else None

    @cached_property
    def scores(self) -> Table:
        """One line a cell: both scores, the interval, seeds, what is unfinished, costs."""
        found = Table()
        for row in self.rows:
            for variant in self.variants:
                if jobs := of_row(self.jobs, row, variant):
                    found.append(self._score(row, variant, jobs, self.cells.get((row, variant))))
        return found

    def _score(self, row: Row, variant: str, jobs: list[Line], cell: Cell | None) -> Line:
        left = Counter(job["status"] for job in jobs if job["value"] is None)
        low, high = cell.interval if cell else (None, None)
        at_rate = [job for job in jobs if cell is None or job["learning_rate"] == cell.rate]
        return {
            "task": row.task,
            "setting": row.setting,
            "variant": variant,
            "metric": self.sweep.plan["metrics"][row.task],
            "lower_is_better": self.sweep.lower_is_better(row.task),
            "mean": cell.mean if cell else None,
            "low": finite(low),
            "high": finite(high),
            "seeds": len(cell.by_seed) if cell else 0,
            "seeds_planned": len({job["seed"] for job in at_rate}),
            "learning_rate": cell.rate if cell else None,
            "best": cell.best if cell else None,
            "runs": sum(job["value"] is not None for job in jobs),
            "planned": len(jobs),
            "unfinished": ", ".join(f"{count} {status}" for status, count in left.items()),
            "chance": self.chance(row, variant),
            "remarks": "; ".join(cell.remarks) if cell else "",
        } | {key: cell.costs.get(key) if cell else None for key in COSTS}

    def uncertainty(self, row: Row) -> float | None:
        """Half the width of Student's interval of the difference between the best and the worst variant of a row, paired by seed."""
        cells = [self.cells[row, variant] for variant in self.variants if (row, variant) in self.cells]
        if len(cells) < 2:
            return None
        found = compare([max(cells, key=lambda cell: cell.mean)], [min(cells, key=lambda cell: cell.mean)])
        return half_interval(*found.student) if found else None

    @cached_property
    def seeds(self) -> Table:
        """One line a finished run: scores on the test and the validation set over learning rates and seeds."""
        columns = ("task", "setting", "variant", "learning_rate", "seed", "value", "selection")
        return Table(
            {key: job[key] for key in columns}
            | {"chosen": job["learning_rate"] == self.cells[Row(job["task"], job["setting"]), job["variant"]].rate}
            for job in self.jobs
            if job["value"] is not None
        )

    @cached_property
    def rates(self) -> Table:
        """One line a cell and learning rate: means over seeds, and which rate was chosen."""
        groups: dict[tuple[Any, ...], list[Line]] = {}
        for line in self.seeds:
            groups.setdefault(tuple(line[key] for key in RATE_KEYS), []).append(line)
        found = Table()
        rows = {row: place for place, row in enumerate(self.rows)}
        variants = {variant: place for place, variant in enumerate(self.variants)}

        def place(key: tuple[Any, ...]) -> tuple[int, int, float]:
            task, setting, variant, learning_rate = key
            return rows[Row(task, setting)], variants[variant], learning_rate

        for key, lines in sorted(groups.items(), key=lambda item: place(item[0])):
            selections = [line["selection"] for line in lines if line["selection"] is not None]
            found.append(
                dict(zip(RATE_KEYS, key, strict=True))
                | {"mean": fmean(line["value"] for line in lines), "seeds": len(lines), "chosen": lines[0]["chosen"]}
                | {"selection": fmean(selections) if selections else None}
            )
        return found

    @cached_property
    def curves(self) -> Table:
        """Training loss and the validation metric over steps at the best learning rate: mean, lowest and highest of the seeds."""
        found = Table()
        most = self.most_points
        for (row, variant), cell in self.cells.items():
            quantities = list(dict.fromkeys(("train/loss", self.sweep.plan["selections"][row.task])))
            runs = self.runs_of(cell)
            most_read = max(MOST_READ // max(len(runs), 1), FEWEST_POINTS)
            curves = [{name: _thinned(x, most_read) for name, x in run.curves(quantities).items()} for run in runs]
            for quantity in quantities:
                head = {"task": row.task, "setting": row.setting, "variant": variant, "quantity": quantity}
                found += [head | point for point in _band([curve[quantity] for curve in curves], most)]
        return found

    @property
    def most_points(self) -> int:
        """Of a curve, so that all of them together are not too many."""
        return min(max(ALL_POINTS // (2 * len(self.cells) or 1), FEWEST_POINTS), MOST_POINTS)

    def forget_curves(self) -> None:
        """Gives back what most of the memory is for."""
        self.__dict__.pop("curves", None)

    @cached_property
    def groups(self) -> Table:
        """Accuracy by difficulty, from metrics such as test/accuracy/hop4: mean, lowest and highest of the seeds."""
        found = Table()
        for (row, variant), cell in self.cells.items():
            values: dict[tuple[str, int, str], list[float]] = {}
            for run in self.runs_of(cell):
                for metric, value in run.metrics.items():
                    if (match := GROUP.fullmatch(metric)) and known(value):
                        values.setdefault((match[1], int(match[2]), metric), []).append(value)
            found += [
                {"task": row.task, "setting": row.setting, "variant": variant, "group": group, "number": level}
                | {"mean": fmean(scores), "low": min(scores), "high": max(scores)}
                | {"seeds": len(scores), "chance": self.chance(row, variant, metric)}
                for (group, level, metric), scores in sorted(values.items())
            ]
        return found

    @cached_property
    def verdicts(self) -> list[Line]:
        """One line a statement and task."""
        return [
            {
                "statement": in_words(verdict),
                "task": verdict.task,
                "metric": verdict.metric,
                "better": verdict.statement.better,
                "than": verdict.statement.than,
                "by": verdict.statement.by,
                "outcome": verdict.outcome,
            }
            | numbers_of(verdict.difference)
            | {"best_difference": verdict.best_difference, "reason": verdict.reason}
            | {"remarks": "; ".join(verdict.remarks)}
            for verdict in self.sweep.verdicts
        ]

    @cached_property
    def differences(self) -> list[Line]:
        """One line a task and pair of variants; positive where the first is better. P-values adjusted within the task."""
        found = []
        for task in self.tasks:
            of = {name: self.sweep.cells_of(task, name) for name in self.variants}
            pairs = []
            for than, better in combinations(self.variants, 2):
                if difference := compare(of[better], of[than]):
                    head = {"task": task, "metric": self.sweep.plan["metrics"][task], "first": better, "second": than}
                    remarks = {"remarks": "; ".join(self.sweep.remarks_on_data(task, better, than))}
                    pairs.append(head | numbers_of(difference) | remarks)
            adjusted = holm([pair["p_value"] for pair in pairs]) if pairs else []
            found += [pair | {"p_holm": float(p)} for pair, p in zip(pairs, adjusted, strict=True)]
        return found


def numbers_of(difference: Difference | None) -> dict[str, Any]:
    """Columns of a difference; infinite ends of intervals are left empty."""
    found = difference
    return {
        "difference": found.mean if found else None,
        "student_low": finite(found.student.low) if found else None,
        "student_high": finite(found.student.high) if found else None,
        "bootstrap_low": finite(found.bootstrap.low) if found else None,
        "bootstrap_high": finite(found.bootstrap.high) if found else None,
        "pairs": found.pairs if found else 0,
        "seeds": found.clusters if found else 0,
        "wins": found.wins if found else 0,
        "p_value": found.p_value if found else None,
    }


def finite(value: float | None) -> float | None:
    """None for what is infinite: nothing is known there."""
    return value if value is not None and math.isfinite(value) else None


def of_row(lines: list[Line], row: Row, variant: str | None = None) -> list[Line]:
    """The lines that belong to a row, or to a cell."""
    if isinstance(lines, Table):
        return lines.by_row.get(row, []) if variant is None else lines.by_cell.get((row, variant), [])
    return [
        line
        for line in lines
        if (line["task"], line["setting"]) == row and (variant is None or line["variant"] == variant)
    ]


def _thinned(curve: dict[int, float], most: int) -> dict[int, float]:
    """A curve of at most so many points: every second, third, ... of a longer one."""
    return dict(list(curve.items())[:: -(-len(curve) // most)]) if len(curve) > most else curve


def _band(curves: list[dict[int, float]], most: int = MOST_POINTS) -> list[Line]:
    """Mean, lowest and highest over the curves, at the steps that all of them have (or any, if there is none that all have)."""
    common = set(curves[0]).intersection(*curves[1:]) if curves else set()
    places = sorted(common or set().union(*curves))
    if not places:
        return []
    values = np.array([[curve.get(step, math.nan) for curve in curves] for step in places], dtype=float)
    steps = np.array(places, dtype=float)
    every = -(-len(steps) // most)
    found = []
    for start in range(0, len(steps), every):
        part = values[start : start + every]
        counted = part[:, ~np.isnan(part).all(axis=0)]
        means = np.nanmean(counted, axis=0)
        found.append(
            {"step": int(steps[start : start + every].mean()), "mean": float(means.mean())}
            | {"low": float(means.min()), "high": float(means.max()), "seeds": len(means)}
        )
    return found
