"""What the template shows of one sweep: texts, rows of tables, and ids of figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from src.reporting import figures
from src.reporting.figures import COSTS_SHOWN, Figure
from src.reporting.palette import Look
from src.reporting.tables import Line, Row, SweepTables, of_row
from src.reporting.wording import (
    MARKS,
    NOTHING,
    TONES,
    compact,
    interval,
    known,
    metric_words,
    number,
    p_value,
    rate,
    row_name,
    scored,
    smallest_p,
    title,
)
from src.runs.runs import FINISHED, Run
from src.support.console import duration
from src.sweeps.statements import is_repetition

MOST_ROWS = 1000  # of a table on the page; its CSV file has all of them
Add = Callable[[Figure | None], dict[str, Any] | None]  # puts a figure on the page
COST_NAMES = {
    "parameters": ("parameters", ""),
    "flops_per_token": ("FLOPs/token", ""),
    "state_size": ("state size", ""),
    "tokens_per_second": ("tokens/s", ""),
    "peak_memory_bytes": ("peak memory", "B"),
    "seconds": ("wall time", ""),
}
PARTS = {
    "asks": "What it asks",
    "verdicts": "Verdicts",
    "scores": "Scores",
    "curves": "Learning curves",
    "rates": "Learning rates",
    "groups": "By difficulty",
    "costs": "Score against cost",
    "differences": "Differences",
    "matched": "What was matched",
    "published": "Published",
    "runs": "All runs",
}


class Section:
    """One sweep as the template shows it.

    Args:
        tables: of the sweep.
        slug: its anchor on the page.
        numbers: task -> its number on the page, which filters go by.
        looks: of the variants.
        files: links to CSV, LaTeX and PNG twins by kind, and by kind and task as in curves/Depo.
        published: see ``published.beside``.
        add: puts a figure on the page.
    """

    def __init__(
        self,
        tables: SweepTables,
        slug: str,
        numbers: Mapping[str, int],
        looks: Mapping[str, Look],
        files: Mapping[str, list[tuple[str, str]]],
        published: tuple[list[Line], list[str]],
        add: Add,
    ):
        self.tables, self.slug, self.numbers, self.looks, self.files, self.add = (
            tables,
            slug,
            numbers,
            looks,
            files,
            add,
        )
        self.published, self.problems = published
        self.plan, self.sweep = tables.sweep.plan, tables.sweep

    def context(self) -> dict[str, Any]:
        """Everything, by the names that the template uses."""
        statuses = Counter(FINISHED if job["value"] is not None else job["status"] for job in self.tables.jobs)
        found: dict[str, Any] = {
            "slug": self.slug,
            "name": title(self.sweep),
            "title": self.plan["title"],
            "note": self.plan["note"],
            "command": self.plan["command"],
            "tasks": " ".join(str(self.numbers[task]) for task in self.tables.tasks),
            "variants": self.tables.variants,
            "finished": statuses[FINISHED],
            "planned": len(self.tables.jobs),
            "progress": sorted(statuses.items(), key=lambda item: (item[0] != FINISHED, item[0])),
            "facts": facts(self.tables, statuses),
            "files": self.files,
        }
        found |= self.outcome() | {"verdicts": [self.verdict(line) for line in self.tables.verdicts]}
        found |= {"forest": self.rows(figures.forest(self.tables))} | self.heat()
        found["remarks"] = [
            (f"{row_name(line['task'], line['setting'])}, {line['variant']}", line["remarks"])
            for line in self.tables.scores
            if line["remarks"]
        ]
        found |= {"jobs": [self.job(job) for job in self.tables.jobs], "scores": self.scores()}
        found["unfinished"] = [job for job in found["jobs"] if not job["done"]]
        found |= {"curves": self.curves(), "rates": self.rates(), "groups": self.groups(), "costs": self.costs()}
        found["thinned"] = any(len(part) >= self.tables.most_points // 2 for part in self._parts_of_curves())
        found |= self.differences() | self.matched() | self.beside()
        found |= {"legends": self.legends(), "most_rows": MOST_ROWS}
        empty = {key for key in ("curves", "rates", "groups", "costs", "published") if not found[key]}
        empty -= {"published"} if self.problems else set()
        found["parts"] = [(key, text) for key, text in PARTS.items() if key not in empty]
        return found

    def legends(self) -> dict[str, list[str]]:
        """The variants that each kind of figure has something of."""
        tables = self.tables
        of_kind = {"curves": tables.curves, "rates": tables.rates, "groups": tables.groups}
        there = {kind: {line["variant"] for line in lines} for kind, lines in of_kind.items()}
        there["costs"] = {line["variant"] for line in tables.scores if known(line["mean"])}
        return {kind: [name for name in tables.variants if name in names] for kind, names in there.items()}

    def where(self, task: str) -> dict[str, str]:
        """What a filter goes by."""
        return {"tasks": str(self.numbers[task])}

    def outcome(self) -> dict[str, Any]:
        """Of the sweep as a whole."""
        outcome = self.sweep.outcome
        counts = Counter(verdict.outcome for verdict in self.sweep.verdicts)
        said = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no statements"
        return {"outcome": outcome, "tone": TONES.get(outcome, "unsure"), "mark": MARKS.get(outcome, "·"), "said": said}

    def verdict(self, line: Line) -> dict[str, Any]:
        """One statement with the numbers behind its outcome."""
        numbers, remark = [], "" if known(line["difference"]) else line["reason"]
        if known(line["difference"]):
            numbers = [
                ("difference", scored(line["difference"], line["metric"], signed=True)),
                ("Student 95%", interval(line["student_low"], line["student_high"], signed=True)),
                ("bootstrap 95%", interval(line["bootstrap_low"], line["bootstrap_high"], signed=True)),
                ("pairs", f"{line['pairs']}, first better in {line['wins']}"),
                ("p", p_value(line["p_value"]) + self._least(line)),
                ("best runs", scored(line["best_difference"], line["metric"], signed=True)),
            ]
            remark = "One seed has no interval." if line["seeds"] < 2 else ""
        remark = " ".join(part for part in (remark, _sentence(line["remarks"])) if part)
        look = {"tone": TONES.get(line["outcome"], "unsure"), "mark": MARKS[line["outcome"]]}
        return line | look | {"numbers": numbers, "remark": remark} | self.where(line["task"])

    @staticmethod
    def _least(line: Line) -> str:
        """Says where a p-value is as small as so few seeds let it be."""
        least = smallest_p(line["seeds"])
        return " (minimum)" if line["p_value"] <= least and least > 0.05 else ""

    def heat(self) -> dict[str, Any]:
        """The heat map of each score, and what its colours mean."""
        maps = {}
        for score in ("mean", "best"):
            maps[score] = self.rows(figures.heat_map(self.tables, score) | {"cells": self.slug})
        bounded = ["accuracy" in self.plan["metrics"][task] for task in self.tables.tasks]
        coloured = "" if all(bounded) else "Colours go from the worst to the best of each row"
        coloured += "; accuracies are coloured from 0 to 1." if any(bounded) and coloured else "." if coloured else ""
        if coloured:
            coloured += " The two end colours mean a difference of at least twice its uncertainty; a smaller one stays in the middle."
        return {"heat": maps, "coloured": coloured, "scale_ends": ("0", "1") if all(bounded) else ("worst", "best")}

    def rows(self, figure: Figure | None) -> dict[str, Any] | None:
        """Puts a figure on the page whose rows are filtered by the numbers of their tasks."""
        if figure is not None:
            figure["rows"]["tasks"] = [self.numbers[task] for task in figure["rows"]["tasks"]]
        return self.add(figure)

    def scores(self) -> list[dict[str, Any]]:
        """The heat maps as a table."""
        return [
            {
                "row": row_name(line["task"], line["setting"]),
                "variant": line["variant"],
                "mean": scored(line["mean"], line["metric"]),
                "interval": interval(line["low"], line["high"]) if known(line["mean"]) else NOTHING,
                "seeds": f"{line['seeds']} of {line['seeds_planned']}"
                if line["seeds"] < line["seeds_planned"]
                else line["seeds"],
                "rate": rate(line["learning_rate"]),
                "remarks": line["remarks"],
                "best": scored(line["best"], line["metric"]),
                "runs": f"{line['runs']} of {line['planned']}" if line["runs"] < line["planned"] else line["runs"],
                "chance": number(line["chance"]),
                "cell": i,
            }
            | self.where(line["task"])
            for i, line in enumerate(self.tables.scores)
        ]

    def cells(self) -> list[dict[str, Any]]:
        """What opens beside a cell, in the order of the scores."""
        found = []
        for line in self.tables.scores:
            row = Row(line["task"], line["setting"])
            jobs = of_row(self.tables.jobs, row, line["variant"])
            at_rate = [job for job in jobs if line["learning_rate"] in (None, job["learning_rate"])]
            pairs = [
                (metric_words(line["metric"]), scored(line["mean"], line["metric"])),
                ("95% interval", interval(line["low"], line["high"])),
                ("learning rate", rate(line["learning_rate"])),
                ("seeds", f"{line['seeds']} of {line['seeds_planned']}"),
                ("best over learning rates", scored(line["best"], line["metric"])),
                ("runs", f"{line['runs']} of {line['planned']} finished"),
            ]
            pairs += [("note", _sentence(line["remarks"]))] if line["remarks"] else []
            runs = [
                {
                    "name": f"seed {job['seed']}, {scored(job['value'], line['metric']) if known(job['value']) else job['status']}"
                    + (f", learning rate {rate(job['learning_rate'])}" if line["learning_rate"] is None else ""),
                    "folder": job["folder"],
                    "command": job["command"],
                }
                for job in at_rate
            ]
            found.append({"where": row_name(*row), "title": line["variant"], "facts": pairs, "runs": runs})
        return found

    def job(self, job: Line) -> dict[str, Any]:
        """A run in the table of all runs."""
        return {
            "row": row_name(job["task"], job["setting"]),
            "variant": job["variant"],
            "rate": rate(job["learning_rate"]),
            "seed": job["seed"],
            "status": job["status"],
            "error": job["error"],
            "done": job["value"] is not None,
            "value": scored(job["value"], self.plan["metrics"][job["task"]]),
            "selection": scored(job["selection"], self.plan["selections"][job["task"]]),
            "command": job["command"],
        } | self.where(job["task"])

    def block(
        self, row: Row, text: str, panels: list[tuple[str, Figure | None]], score: str = ""
    ) -> list[dict[str, Any]]:
        """A row of panels; no block if there is nothing in any of them."""
        there = [(heading, self.add(figure)) for heading, figure in panels if figure is not None]
        if not there:
            return []
        return [{"title": row_name(*row), "text": text, "panels": there, "score": score} | self.where(row.task)]

    def curves(self) -> list[dict[str, Any]]:
        """Training loss and validation metric of every row."""
        found = []
        for row in self.tables.rows:
            selection = self.plan["selections"][row.task]
            shown = (("train/loss", "training loss, nats per target"), (selection, metric_words(selection)))
            panels = [(text, figures.curves(self.tables, row, quantity, self.looks)) for quantity, text in shown]
            found += self.block(row, "", panels)
        return found

    def rates(self) -> list[dict[str, Any]]:
        """Score against learning rate of every row."""
        found = []
        for row in self.tables.rows:
            text = metric_words(self.plan["metrics"][row.task])
            found += self.block(row, text, [("", figures.rates(self.tables, row, self.looks))])
        return found

    def groups(self) -> list[dict[str, Any]]:
        """Accuracy against difficulty of every row and kind of difficulty."""
        found = []
        for row in self.tables.rows:
            for group in sorted({line["group"] for line in of_row(self.tables.groups, row)}):
                found += self.block(row, "accuracy", [("", figures.groups(self.tables, row, group, self.looks))])
        return found

    def costs(self) -> list[dict[str, Any]]:
        """Score against three costs of every row, for both scores."""
        found = []
        for row in self.tables.rows:
            text = metric_words(self.plan["metrics"][row.task])
            for score in ("mean", "best"):
                panels = [
                    (name, figures.costs(self.tables, row, cost, name, score, self.looks)) for cost, name in COSTS_SHOWN
                ]
                found += self.block(row, text, panels, score)
        return found

    def differences(self) -> dict[str, Any]:
        """All pairs of variants, task by task."""
        lines = self.tables.differences
        found = []
        for line in lines:
            of_task = [other for other in lines if other["metric"] == line["metric"]]
            found.append(
                {
                    "task": line["task"],
                    "first": line["first"],
                    "second": line["second"],
                    "difference": scored(line["difference"], line["metric"], signed=True),
                    "student": interval(line["student_low"], line["student_high"], signed=True),
                    "bootstrap": interval(line["bootstrap_low"], line["bootstrap_high"], signed=True),
                    "pairs": line["pairs"],
                    "p": p_value(line["p_value"]),
                    "holm": p_value(line["p_holm"]),
                    "strip": strip(line, of_task, "difference", "student_low", "student_high", zero=True),
                    "remarks": _sentence(line["remarks"]),
                }
                | self.where(line["task"])
            )
        seeds = max((line["seeds"] for line in lines), default=0)
        least = f"With {seeds} seeds p cannot be below {p_value(smallest_p(seeds))}." if 2 <= seeds < 6 else ""
        return {"differences": found, "smallest_p": least}

    def matched(self) -> dict[str, Any]:
        """What every variant cost, and relative to the first."""
        names = {
            key: shown for key, shown in COST_NAMES.items() if any(known(line[key]) for line in self.tables.scores)
        }
        found = []
        for row in self.tables.rows:
            lines = of_row(self.tables.scores, row)
            for line in lines:
                cells = []
                for key, (_, unit) in names.items():
                    value, first = line[key], lines[0][key]
                    shown = duration(value) if key == "seconds" and known(value) else compact(value, unit)
                    relative = (
                        f"({value / first:.2f})"
                        if known(value) and known(first) and first and line is not lines[0]
                        else ""
                    )
                    cells.append((shown, relative))
                found.append({"row": row_name(*row), "variant": line["variant"], "costs": cells} | self.where(row.task))
        match = self.plan["match"]
        if not names:
            found = []
        text = "Nothing was matched beforehand: variants are as large as their settings make them."
        if match:
            text = (
                f"Variants were made equal to {match['to']} in {match['budget']} by changing their {match['change']}."
            )
        mixed = len(hardware(self.tables)) > 1
        return {
            "matched": found,
            "matched_by": text,
            "cost_names": [name for name, _ in names.values()],
            "mixed_hardware": mixed,
        }

    def beside(self) -> dict[str, Any]:
        """Published numbers and ours."""
        found = [
            {
                "row": row_name(line["task"], line["setting"]),
                "interval": f"[{_shown(line, 'low')}, {_shown(line, 'high')}]" if known(line["low"]) else NOTHING,
                **{key: line[key] for key in ("variant", "quantity", "seeds", "published_as", "source")},
                **{key: _shown(line, key) for key in ("published", "best", "mean")},
            }
            | self.where(line["task"])
            for line in self.published
        ]
        return {"published": found, "problems": self.problems}

    def _parts_of_curves(self) -> list[list[Line]]:
        parts: dict[tuple[Any, ...], list[Line]] = {}
        for line in self.tables.curves:
            parts.setdefault(tuple(line[key] for key in ("task", "setting", "variant", "quantity")), []).append(line)
        return list(parts.values())


def _sentence(remarks: str) -> str:
    return f"{remarks[0].upper()}{remarks[1:]}." if remarks else ""


def facts(tables: SweepTables, statuses: Mapping[str, int]) -> list[tuple[str, str]]:
    """What there is to know about a sweep before any number."""
    plan, runs = tables.sweep.plan, list(tables.runs.values())
    attempts = [attempt for run in runs if run.record for attempt in (run.record, *run.record.get("earlier", []))]
    seconds = sum(attempt.get("seconds") or 0.0 for attempt in attempts)
    flops = sum(job["training_flops"] or 0.0 for job in tables.jobs)
    left = ", ".join(f"{count} {status}" for status, count in statuses.items() if status != FINISHED)
    code = Counter(tables.sweep.code[name] or "no commit" for name, run in tables.runs.items() if run.record)
    found = [
        ("runs", f"{statuses.get(FINISHED, 0)} of {len(tables.jobs)} finished" + (f"; {left}" if left else "")),
        ("compute", f"{duration(seconds)} of runs, {compact(flops, 'FLOP')} of training" if attempts else "none yet"),
        ("hardware", "; ".join(f"{name} ({count} runs)" for name, count in hardware(tables).items()) or "none yet"),
        ("code", "; ".join(f"{name} ({count} runs)" for name, count in code.items()) or "none yet"),
        ("scale", plan["scale"]),
        ("source of the expectation", plan["source"]),
    ]
    for term, key in (("learning rates", "learning_rate"), ("seeds", "seed")):
        found.append((term, ", ".join(f"{value:g}" for value in sorted({job[key] for job in tables.jobs}))))
    settings = {key: values for key, values in plan["axes"].items() if not is_repetition(key)}
    found += [
        (key, ", ".join(map(str, values)) if isinstance(values, list) else values) for key, values in settings.items()
    ]
    return [(term, text) for term, text in found if text]


def hardware(tables: SweepTables) -> Counter[str]:
    """On what the runs were made, and how many of them."""
    return Counter(_machine(run) for run in tables.runs.values() if run.record)


def _machine(run: Run) -> str:
    there = run.record.get("environment") or {}
    gpus = Counter(there.get("gpus") or [])
    if gpus:
        return " + ".join(f"{count} × {name}" for name, count in gpus.items())
    cpus = there.get("cpus")
    return f"{there.get('processor', 'unknown')}, {cpus} CPU{'' if cpus == 1 else 's'}"


def _shown(line: Line, key: str) -> str:
    """A number beside a published one: of percentages no more digits than the paper has."""
    return f"{line[key]:.1f}" if "%" in line["quantity"] and known(line[key]) else number(line[key])


def strip(
    line: Line, others: list[Line], point: str, low: str, high: str, zero: bool = False
) -> dict[str, float | None] | None:
    """Where a small drawing of an interval has its ends, in percent of its width; all lines of a table share their scale."""
    if not known(line[point]):
        return None
    ends = [other[key] for other in others for key in (point, low, high) if known(other[key])] + ([0.0] if zero else [])
    least, width = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: Any) -> float | None:
        return round(4 + 92 * (value - least) / width, 1) if known(value) else None

    return {
        "point": place(line[point]),
        "low": place(line[low]),
        "high": place(line[high]),
        "zero": place(0.0) if zero else None,
    }
