"""What stands beside the page: every table as CSV, scores and differences as LaTeX. Pictures: ``pictures.py``."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.reporting.tables import Line, SweepTables, of_row
from src.reporting.wording import half_interval, interval, known, metric_words, number, p_value, row_name, scored

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "\n": " ",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}


def slugs(names: Iterable[str]) -> dict[str, str]:
    """File names: letters, digits and hyphens, another one for each name."""
    found: dict[str, str] = {}
    for name in names:
        slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60] or "unnamed"
        taken = {other.lower() for other in found.values()}
        number_of = next(
            i for i in range(1, len(taken) + 2) if (slug if i == 1 else f"{slug}-{i}").lower() not in taken
        )
        found.setdefault(name, slug if number_of == 1 else f"{slug}-{number_of}")
    return found


def write_csv(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A table, numbers in full; what is not known is left empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for line in lines for key in line))
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def export_tables(tables: SweepTables, published: list[Line], prefix: str, folder: Path) -> dict[str, list[str]]:
    """Writes the CSV and LaTeX files of a sweep.

    Args:
        tables: of the sweep.
        published: lines of ``published.beside``.
        prefix: of the names of files.
        folder: for the files.

    Returns:
        Names of the files, by the kind of table.
    """
    jobs = [{key: value for key, value in job.items() if key not in ("others", "job")} for job in tables.jobs]
    kinds = {"runs": jobs, "verdicts": tables.verdicts, "scores": tables.scores, "curves": tables.curves}
    kinds |= {"seeds": tables.seeds, "rates": tables.rates, "groups": tables.groups}
    kinds |= {"differences": tables.differences, "published": published}
    found: dict[str, list[str]] = {}
    for kind, lines in kinds.items():
        if lines:
            name = f"{prefix}_{kind}.csv"
            write_csv(lines, folder / name)
            found[kind] = [name]
    for kind, text in (("scores", latex_scores(tables)), ("differences", latex_differences(tables))):
        if kind in found:
            name = f"{prefix}_{kind}.tex"
            (folder / name).write_text(text, encoding="utf-8")
            found[kind].append(name)
    return found


def latex_scores(tables: SweepTables) -> str:
    """The heat map as a table: mean, half the width of the 95% Student interval, number of seeds."""
    head = ["", *map(latex, tables.variants)]
    body = []
    for row in tables.rows:
        of = {line["variant"]: line for line in of_row(tables.scores, row)}
        name = (
            latex(row_name(row.task, row.setting)) + f" ({latex(metric_words(tables.sweep.plan['metrics'][row.task]))})"
        )
        body.append([name, *(_latex_score(of.get(variant)) for variant in tables.variants)])
    about = "Mean over seeds at the best learning rate, +- half of the 95% Student interval (number of seeds)."
    return _latex_table(about, "l" + "r" * len(tables.variants), head, body)


def latex_differences(tables: SweepTables) -> str:
    """All pairs of variants, with both intervals and both p-values."""
    head = ["task", "first", "second", "difference", "Student", "bootstrap", "pairs", "$p$", r"$p_\mathrm{Holm}$"]
    body = [
        [
            *(latex(line[key]) for key in ("task", "first", "second")),
            f"${scored(line['difference'], line['metric'], signed=True)}$",
            *(
                f"${interval(line[f'{kind}_low'], line[f'{kind}_high'], signed=True)}$"
                if known(line[f"{kind}_low"])
                else "--"
                for kind in ("student", "bootstrap")
            ),
            str(line["pairs"]),
            p_value(line["p_value"]),
            p_value(line["p_holm"]),
        ]
        for line in tables.differences
    ]
    about = "Paired differences (positive: the first is better) of mean scores over seeds at the best learning rate, 95% intervals."
    return _latex_table(about, "lllrrrrrr", head, body)


def latex(text: str) -> str:
    """Any text as LaTeX prints it."""
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_score(line: Line | None) -> str:
    if line is None or not known(line["mean"]):
        return "--"
    half = half_interval(line["low"], line["high"])
    spread = rf" \pm {number(half, like=line['mean'])}" if half is not None else ""
    seeds = f"{line['seeds']}" + (f" of {line['seeds_planned']}" if line["seeds"] < line["seeds_planned"] else "")
    return f"${scored(line['mean'], line['metric'])}{spread}$ ({seeds})"


def _latex_table(about: str, columns: str, head: list[str], body: list[list[str]]) -> str:
    lines = [
        f"% {about} Needs booktabs.",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
    ]
    lines += [" & ".join(cells) + r" \\" for cells in body]
    text = "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
    return text.replace("−", "-").replace("–", "--")
