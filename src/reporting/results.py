"""From the runs of a sweep to numbers one can trust: cells, differences, verdicts.

A *cell* is a task, a variant and the values of all axes but seed and learning rate. It has two scores, which are never mixed:

- **mean over seeds at the best learning rate**: the rate is the one whose mean over seeds is best on the *validation* set;
  this is what differences and verdicts use, paired by seed. Where there are several rates, a run that was not validated counts
  nowhere: to judge it by its test score would choose on the test set. Where there is one rate, nothing is chosen;
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
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.evaluation.names import lower_is_better
from src.reporting.statistics import Difference, Interval, difference, student_interval
from src.runs.foreign import Unreadable, clean_text
from src.runs.git import code_of, remarks_on_code
from src.runs.runs import COSTS, FINISHED, UNREADABLE, Run, find, find_runs
from src.runs.schema import LARGEST
from src.sweeps.manifest import read_manifest, remarks_on_taking, taken_by, write_manifest  # noqa: F401 (the last for others)
from src.sweeps.statements import Statement, is_repetition

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

CONFIRMED, CONTRADICTED, INCONCLUSIVE = "confirmed", "contradicted", "inconclusive"
SEEDS_NEEDED = 3  # for a verdict
ROUNDING = 1e-9
# What has become of a job whose run has ended well and says nothing: it was another run, or its score is missing or no number.
OTHER, SCORELESS = "of another configuration", "without a score"
# Its learning rate is one of several, and there is nothing to choose it by.
UNVALIDATED = "without a validation"
OTHER_DATA = "of other data"

Told = Callable[[int], object]  # how many runs have been read since the last call


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
    remarks: list[str] = field(
        default_factory=list, repr=False
    )  # what must be known of the choice of the rate, and of the code
    code: Counter[str] = field(
        default_factory=Counter, repr=False
    )  # states of the code -> how many of its runs they have made

    @cached_property
    def setting(self) -> str:
        """A key for ``others``."""
        return json.dumps(self.others, sort_keys=True)

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
    best_difference: float | None  # of the best runs over learning rates, in the settings that both have
    reason: str
    remarks: list[str] = field(default_factory=list)  # of the cells that were compared

    def __str__(self) -> str:
        said = f"{self.statement.better} vs {self.statement.than}, {self.task}, {self.metric}: by at least {self.statement.by:g}"
        return "; ".join([f"{self.outcome:<13} {said}: {self.reason}", *self.remarks])


class SweepResults:
    """The plan of a sweep, as it was written down, and the runs that exist of it.

    Args:
        path: ``manifest.json``.
    """

    def __init__(self, path: Path):
        self.path = path
        self.plan: dict[str, Any] = read_manifest(path)
        self.statements = [Statement(**item) for item in self.plan["expect"]]
        self.runs: dict[str, Run] = {}  # by folder, as they have been read
        # By folder: when the run ended, on which data, and which data its plan asks for.
        self.origins: dict[str, tuple[str, str, str]] = {}
        self.code: dict[
            str, str
        ] = {}  # by folder: the state of the code that made the run, empty where that is not known

    @property
    def name(self) -> str:
        """Such as results/R3."""
        return self.plan["name"]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One a job: task, variant, axes, status, ``value`` (test), ``selection`` (validation), costs, folder, command.

        ``reason`` says what there is to say about a job without a value.
        """
        return self.read()

    def read(self, told: Told = lambda count: None) -> list[dict[str, Any]]:
        """What ``rows`` holds from then on, telling of every run that has been read."""
        if "rows" not in self.__dict__:
            rows = []
            for job in self.plan["jobs"]:
                rows.append(self._row(job))
                told(1)
            self._leave_out_other_data(rows)
            for cell in _by_cell(rows):
                self._leave_out_what_was_not_validated(cell)
            self.__dict__["rows"] = rows
        return self.__dict__["rows"]

    @cached_property
    def table(self) -> pd.DataFrame:
        """``rows`` as a table."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    @property
    def problems(self) -> list[tuple[str, str]]:
        """The folders whose files are not what was written, and what is wrong with them."""
        _ = self.rows
        return [(folder, problem) for folder, run in self.runs.items() for problem in run.problems]

    def _row(self, job: dict[str, Any]) -> dict[str, Any]:
        folder = clean_text(os.path.normpath(self.path.parent / job["folder"]))
        run = self.runs.setdefault(folder, Run(self.path.parent / job["folder"]))
        done = run.status == FINISHED and run.results.get("config_hash") == job["name"]
        # A score that is no number (a run that diverged) is no score.
        metrics = {name: x for name, x in run.metrics.items() if math.isfinite(x)} if done else {}
        value = metrics.get(self.plan["metrics"][job["task"]])
        status = run.status if run.record else "planned"
        reason = run.record.get("error") or ""
        if status == FINISHED and value is None:
            status = SCORELESS if done else OTHER
            reason = _lacking(self.plan["metrics"][job["task"]], run) if done else "results.json is of another run"
        if run.problems:
            status, reason = UNREADABLE, "; ".join(run.problems)
        others = {key: value for key, value in job["settings"].items() if not is_repetition(key)}
        costs = {key: run.results.get(key) if done else None for key in COSTS}
        if folder not in self.origins:  # jobs may share a folder
            self.origins[folder] = (str(run.record.get("ended") or ""), _data_of(run), "")
        # Manifests of before do not say which data a job asks for; those of a variant are the same.
        asked = job.get("data") or f"of {job['variant']}"
        self.origins[folder] = (*self.origins[folder][:2], asked)
        if folder not in self.code:  # of two jobs in one folder, the second finds a record that has been slimmed
            self.code[folder] = code_of(run.record)
        run.slim()
        return {
            "job": job["name"],
            "task": job["task"],
            "variant": job["variant"],
            "seed": job["seed"],
            "learning_rate": job["learning_rate"],
            "others": json.dumps(others, sort_keys=True),
            "status": status,
            "reason": reason,
            "value": value,
            "selection": metrics.get(self.plan["selections"][job["task"]]),
            "folder": folder,
            "command": job["command"],
        } | costs

    def _leave_out_other_data(self, rows: list[dict[str, Any]]) -> None:
        """Runs that ask for the same data are compared on the same data: where files were replaced, those of the latest run count."""
        groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for row in rows:
            if row["value"] is not None:
                groups.setdefault((row["task"], row["others"], self.origins[row["folder"]][2]), []).append(row)
        for members in groups.values():
            _, newest, _ = max((self.origins[row["folder"]] for row in members), key=lambda origin: origin[0])
            for row in members:
                if self.origins[row["folder"]][1] != newest:
                    row["status"], row["value"] = OTHER_DATA, None
                    row["reason"] = (
                        "its data were others than those of the latest run; the sweep's command runs it again"
                    )

    def _leave_out_what_was_not_validated(self, cell: list[dict[str, Any]]) -> None:
        """To choose among several learning rates, a run without a validation could only be judged by the test set."""
        if len({row["learning_rate"] for row in cell}) == 1:
            return
        for row in cell:
            if row["value"] is not None and row["selection"] is None:
                lacking = _lacking(self.plan["selections"][row["task"]], self.runs[row["folder"]])
                row["reason"] = (
                    f"{lacking}, by which the learning rate is chosen; its test score, {row['value']:.4g}, counts nowhere"
                )
                row["status"], row["value"] = UNVALIDATED, None

    @cached_property
    def cells(self) -> list[Cell]:
        """Of every task, variant and other setting of which something is finished, in the order of the plan."""
        return [self._cell(rows) for rows in _by_cell(self.rows) if any(row["value"] is not None for row in rows)]

    @cached_property
    def taken(self) -> dict[tuple[str, str], dict[str, set[str]]]:
        """See ``manifest.taken_by``."""
        return defaultdict(dict, taken_by(self.plan["jobs"]))

    def remarks_on_data(self, task: str, better: str, than: str) -> list[str]:
        """What must be known of a comparison of two variants that do not take the same data alike."""
        return remarks_on_taking([self.taken[task, name] for name in (better, than)])

    @cached_property
    def _cells_of(self) -> dict[tuple[str, str], list[Cell]]:
        found: dict[tuple[str, str], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault((cell.task, cell.variant), []).append(cell)
        return found

    def cells_of(self, task: str, variant: str) -> list[Cell]:
        """Those of a task and a variant, in the order of the plan."""
        return self._cells_of.get((task, variant), [])

    @cached_property
    def _left(self) -> dict[tuple[str, str], Counter[str]]:
        """How the runs of a task and a variant stand that have no value."""
        found: dict[tuple[str, str], Counter[str]] = {}
        for row in self.rows:
            if row["value"] is None:
                found.setdefault((row["task"], row["variant"]), Counter())[row["status"]] += 1
        return found

    def _cell(self, rows: list[dict[str, Any]]) -> Cell:
        task = rows[0]["task"]
        lower = self.lower_is_better(task)
        done = [row for row in rows if row["value"] is not None]
        by_rate: dict[float, dict[int, float]] = {}
        for row in done:
            by_rate.setdefault(row["learning_rate"], {})[row["seed"]] = row["value"]
        best = min if lower else max
        rate, remarks = self._chosen(rows)
        chosen = [row for row in done if row["learning_rate"] == rate]
        costs = {key: [row[key] for row in chosen if row[key] is not None] for key in COSTS}
        code = Counter(state for row in done if (state := self.code[row["folder"]]))
        return Cell(
            task=task,
            variant=rows[0]["variant"],
            others=json.loads(rows[0]["others"]),
            metric=self.plan["metrics"][task],
            lower_is_better=lower,
            rate=rate,
            by_seed=by_rate[rate],
            best=best(row["value"] for row in done),
            runs=len(done),
            planned=len(rows),
            by_rate=by_rate,
            folders={f"{row['learning_rate']}/{row['seed']}": row["folder"] for row in done},
            costs={key: sum(values) / len(values) for key, values in costs.items() if values},
            commands=[row["command"] for row in chosen],
            remarks=remarks + remarks_on_code(code),
            code=code,
        )

    def _chosen(self, rows: list[dict[str, Any]]) -> tuple[float, list[str]]:
        """The learning rate that is best on the validation set, and what must be known of the choice."""
        # Its direction is its own: a loss may choose for an accuracy.
        best = min if lower_is_better(self.plan["selections"][rows[0]["task"]]) else max
        done = [row for row in rows if row["value"] is not None]
        planned = Counter(row["learning_rate"] for row in rows)
        if len(planned) == 1:
            without = sum(row["selection"] is None for row in done)
            told = f"{without} of {len(done)} finished runs have no validation; there is one learning rate, so nothing was chosen"
            return done[0]["learning_rate"], [told] if without else []
        selections: dict[float, list[float]] = {}
        for row in done:
            selections.setdefault(row["learning_rate"], []).append(row["selection"])
        means = {rate: fsum(values) / len(values) for rate, values in selections.items()}
        equal = sorted(rate for rate, mean in means.items() if mean == best(means.values()))
        remarks = []
        if len(equal) > 1:
            rates = " and ".join(f"{rate:g}" for rate in equal)
            remarks.append(f"learning rates {rates} are equally good on the validation set: the smallest was taken")
        # A rate that diverges on one seed is no better for having fewer runs counted, so it must be said.
        if len(done) < len(rows):
            counts = ", ".join(f"{len(selections.get(r, []))} of {planned[r]} at {r:g}" for r in sorted(planned))
            remarks.append(f"its learning rate was chosen while runs are missing ({counts})")
        return equal[0], remarks

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
        sides = [self.cells_of(task, name) for name in (statement.better, statement.than)]
        outcome, reason, found = INCONCLUSIVE, "runs are missing" + self._missing(statement, task), None
        best = None
        remarks = [
            f"{cell.variant}{_words(cell.others)}: {remark}"
            for side in sides
            for cell in side
            for remark in cell.remarks
            if remark not in remarks_on_code(cell.code)
        ]
        remarks += remarks_on_code(sum((cell.code for side in sides for cell in side), Counter()))
        remarks += self.remarks_on_data(task, statement.better, statement.than)
        if all(sides):
            found = compare(*sides)
            best = _best_difference(*sides)
        if found is not None:
            outcome, reason = judge(found, statement.by)
        return Verdict(statement, task, metric, outcome, found, best, reason, remarks)

    def _missing(self, statement: Statement, task: str) -> str:
        """How the runs stand that a statement would need, where that is more than that they have not been run."""
        asked = dict.fromkeys((statement.better, statement.than))  # a statement may be about one variant
        counts = sum((self._left.get((task, variant), Counter()) for variant in asked), Counter[str]())
        return f" ({', '.join(f'{count} {status}' for status, count in counts.items())})" if counts else ""

    @property
    def outcome(self) -> str:
        """Of all statements together: confirmed if each is, contradicted if one is."""
        outcomes = {verdict.outcome for verdict in self.verdicts}
        if not outcomes:
            return "nothing was said"
        return CONTRADICTED if CONTRADICTED in outcomes else CONFIRMED if outcomes == {CONFIRMED} else INCONCLUSIVE


def _data_of(run: Run) -> str:
    """What identifies the data of a run but their seed; runs that have not written it down are alike."""
    data = run.results.get("data")
    if not isinstance(data, dict):
        return ""
    return json.dumps({key: value for key, value in data.items() if key != "seed"}, sort_keys=True, default=str)


def compare(better: list[Cell], than: list[Cell]) -> Difference | None:
    """Paired differences of two variants on a task, each at its best learning rate; positive where the first is better.

    Pairs share the seed and all other settings. None when no pair is finished on both sides.
    """

    def scores(cells: list[Cell]) -> dict[tuple[int, str], float]:
        return {
            (seed, cell.setting): -value if cell.lower_is_better else value
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
    intervals = f"95% t {_bracketed(found.student)}, bootstrap {_bracketed(found.bootstrap)}"
    if found.clusters == 1:
        intervals = "one seed, so no interval"
    numbers = f"{_signed(found.mean)}, {intervals}, {found.pairs} pair{'' if found.pairs == 1 else 's'}"
    if found.unpaired:
        numbers += f" ({found.unpaired} runs without a partner)"
    if found.clusters < SEEDS_NEEDED:
        return INCONCLUSIVE, f"{numbers}; fewer than {SEEDS_NEEDED} seeds"
    return (CONFIRMED if low >= by else CONTRADICTED if high < by else INCONCLUSIVE), numbers


def _best_difference(better: list[Cell], than: list[Cell]) -> float | None:
    """How much better the best runs of one variant are, as a mean over the settings that both have; None where there are none.

    A mean over other settings on either side would be of how hard those are.
    """
    a, b = ({c.setting: -c.best if c.lower_is_better else c.best for c in cells} for cells in (better, than))
    gains = [a[key] - b[key] for key in a if key in b]
    return fsum(gains) / len(gains) if gains else None


def find_sweeps(root: Path, problems: list[tuple[str, str]] | None = None) -> list[SweepResults]:
    """All sweeps whose manifest lies below a folder, by name; one that cannot be read is reported and left out.

    Args:
        root: the folder.
        problems: gets the manifests that are left out, and why.
    """
    found = []
    for path in find(root, "manifest.json", problems):
        try:
            sweep = SweepResults(path)
        except (Unreadable, FileNotFoundError) as error:
            shown = clean_text(str(path))
            log.warning(
                f"{shown} is left out, this version cannot read it ({error}); the command that wrote it writes it anew"
            )
            if problems is not None:
                problems.append((shown, str(error)))
        else:
            found.append((sweep.name, sweep.plan["scale"], sweep))
    return [sweep for _, _, sweep in sorted(found, key=lambda row: (_counted(row[0]), row[1]))]


def outside_of(sweeps: list[SweepResults], root: Path, problems: list[tuple[str, str]] | None = None) -> list[Run]:
    """The runs below a folder that are no job of any sweep; ``problems`` gets the folders that cannot be looked into."""
    jobs = {os.path.realpath(sweep.path.parent / job["folder"]) for sweep in sweeps for job in sweep.plan["jobs"]}
    return find_runs(root, problems, but=jobs)


def _by_cell(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["variant"], row["others"]), []).append(row)
    return list(groups.values())


def _lacking(metric: str, run: Run) -> str:
    value = run.metrics.get(metric)
    if value is None:
        return f"{metric} was not measured"
    return f"{metric} is {value}" + (f", or beyond {LARGEST:g}" if math.isinf(value) else "")


def _words(others: dict[str, Any]) -> str:
    return "".join(f", {key.rpartition('.')[2]}={value}" for key, value in others.items())


def _counted(name: str) -> list[Any]:
    """A key by which R2 comes before R10."""
    # Without its zeros in front, a longer number is a larger one; as an int, one of thousands of digits would be refused.
    parts = enumerate(re.split(r"([0-9]+)", name))  # numbers are at the odd places
    return [(place % 2, len(part.lstrip("0")) if place % 2 else 0, part.lstrip("0") or part) for place, part in parts]


def _bracketed(interval: Interval) -> str:
    return f"[{_signed(interval.low)}, {_signed(interval.high)}]" if math.isfinite(interval.low) else "–"


def _signed(value: float) -> str:
    """Three decimals, or two digits of what is smaller than they show."""
    return f"{value:+.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:+.2g}"
