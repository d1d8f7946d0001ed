"""Who scores best on a task, over all sweeps of a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from src.reporting.sections import strip
from src.reporting.tables import Line, SweepTables, of_row
from src.reporting.wording import compact, identity, interval, known, metric_words, scored, short_settings

# How the questions of the test set are taken from the data, besides what the data themselves are.
_ASKED = ("window", "isolate", "test_windows", "test_answers")

Key = tuple[str, str, str]  # task, metric, parameters of the data


def leaderboards(
    sweeps: Mapping[str, SweepTables], numbers: Mapping[str, int]
) -> tuple[list[dict[str, Any]], list[Line]]:
    """One table for each task, metric and parameters of the data: scores of other data do not compare.

    Args:
        sweeps: tables by the anchor of the sweep on the page.
        numbers: task -> its number on the page, which filters go by.

    Returns:
        What the template shows; and one line a cell, for a file.
    """
    boards: dict[Key, dict[tuple[str, ...], Line]] = {}
    for slug, tables in sweeps.items():
        for (row, variant), cell in tables.cells.items():
            runs = tables.runs_of(cell)
            data = {key: value for key, value in (runs[0].results.get("data") or {}).items() if key != "seed"}
            taken = tables.sweep.taken[row.task, variant]
            data |= {key: " or ".join(sorted(taken[key])) for key in _ASKED if key in taken}
            key = (row.task, cell.metric, json.dumps(data, sort_keys=True))
            line = of_row(tables.scores, row, variant)[0] | {
                "sweep": identity(tables.sweep),
                "slug": slug,
                "data": short_settings(data),
            }
            # The same runs may belong to several sweeps: one line for them.
            boards.setdefault(key, {}).setdefault((variant, *sorted(cell.folders.values())), line)
    found = []
    for (task, metric, _), board in sorted(boards.items(), key=lambda item: (numbers[item[0][0]], item[0])):
        lines = list(board.values())
        by_score = {by: [_shown(line, lines, by) for line in _sorted(lines, by)] for by in ("mean", "best")}
        settings = any(line["setting"] for line in lines)
        head = {
            "settings": settings,
            "task": task,
            "metric": metric_words(metric),
            "data": lines[0]["data"],
            "tasks": str(numbers[task]),
        }
        found.append(head | {"by_score": by_score})
    return found, [line for board in boards.values() for line in _sorted(list(board.values()), "mean")]


def _sorted(lines: list[Line], by: str) -> list[Line]:
    return sorted(lines, key=lambda line: (line[by] if line["lower_is_better"] else -line[by], line["variant"]))


def _shown(line: Line, lines: list[Line], by: str) -> dict[str, Any]:
    return {
        "variant": line["variant"],
        "slug": line["slug"],
        "setting": line["setting"],
        "sweep": line["sweep"],
        "score": scored(line[by], line["metric"]),
        "strip": strip(line, lines, "mean", "low", "high"),
        "interval": interval(line["low"], line["high"]) if known(line["mean"]) else "",
        "seeds": line["seeds"],
        "runs": f"{line['runs']} of {line['planned']}",
        "parameters": compact(line["parameters"]),
        "flops": compact(line["flops_per_token"]),
        "tokens": compact(line["tokens"]),
    }
