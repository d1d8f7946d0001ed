"""The report of sweeps: one HTML page that needs nothing but itself, and every number and figure of it as CSV, LaTeX and PNG.

    <folder>/index.html      what people read
    <folder>/tables/         *.csv, *.tex
    <folder>/figures/        *.png

Numbers become tables (``tables.py``), tables become figures (``figures.py``, ``pictures.py``) and files (``exports.py``); the
templates in ``templates/`` put them on the page.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from src.reporting.exports import export_tables, slugs, write_csv
from src.reporting.figures import Figure
from src.reporting.leaderboard import leaderboards
from src.reporting.palette import THEMES, looks, on_scale, scale
from src.reporting.pictures import draw_pictures, panels_of
from src.reporting.published import beside
from src.reporting.results import SweepResults
from src.reporting.sections import MOST_ROWS, Section
from src.reporting.tables import SweepTables
from src.reporting.wording import BEST, MEAN, identity, known, number, rate
from src.runs.runs import Run, run_line
from src.support.console import duration
from src.support.files import part_of

TEMPLATES = Path(__file__).parent / "templates"
MOST_TEXT = 300  # characters of a name
MOST_PANELS = (
    90  # of the PNG figures of a sweep, and three times as many of all, unless all are asked for: twenty are a second
)
SHOWN_METRICS = ("test/accuracy", "test/bits_per_parameter", "test/bits_per_byte", "test/loss", "val/loss")


Told = Callable[[str], object]  # hears what is being done


def write_report(
    sweeps: list[SweepResults],
    folder: Path,
    runs: Sequence[Run] = (),
    problems: list[tuple[str, str]] | None = None,
    told: Told = lambda words: None,
    pictures: bool = False,
) -> Path:
    """Writes the page and its twins.

    Args:
        sweeps: what is reported, in this order.
        folder: becomes ``index.html``, ``tables`` and ``figures``; files of an earlier report are overwritten.
        runs: outside of sweeps, for a plain table.
        problems: files that could not be read, and why; the page lists them, and gets to this list what turns up while it is written.
        told: hears what is being done, every now and then.
        pictures: draw every figure as PNG, of large sweeps too, which takes minutes.

    Returns:
        Path of ``index.html``.
    """
    problems = [] if problems is None else problems
    _read(sweeps, told)
    tables = [SweepTables(sweep) for sweep in sweeps]
    page = _Page(folder, tables, math.inf if pictures else MOST_PANELS)
    sections = []
    for table in tables:
        told(f"drawing {identity(table.sweep)}, {len(sections) + 1} of {len(tables)}")
        sections.append(page.section(table))
    boards, board_lines = leaderboards({page.slugs[table]: table for table in tables}, page.tasks)
    board_files = []
    if board_lines:
        write_csv(board_lines, folder / "tables" / "leaderboard.csv")
        board_files = [("CSV", "tables/leaderboard.csv")]
    context = {"sweeps": sections, "boards": boards, "board_files": board_files, "most_rows": MOST_ROWS}
    context["outside"] = outside(runs, folder, problems, told)
    # After everything else: curves are read for figures only.
    problems += dict.fromkeys(problem for sweep in sweeps for problem in sweep.problems)
    context["unreadable"] = unreadable(problems, folder)
    path = folder / "index.html"
    folder.mkdir(parents=True, exist_ok=True)
    page.write(context, path)
    return path


def _read(sweeps: Sequence[SweepResults], told: Told) -> None:
    there, done = sum(len(sweep.plan["jobs"]) for sweep in sweeps), itertools.count(1)
    for sweep in sweeps:
        sweep.read(lambda _: told(f"reading the runs of sweeps, {next(done):,} of {there:,}"))


def unreadable(problems: Sequence[tuple[str, str]], folder: Path) -> list[tuple[str, str]]:
    """What the page says of files that could not be read; the file of an earlier report does not stay."""
    path = folder / "tables" / "unreadable.csv"
    if problems:
        write_csv([{"where": where, "what": what} for where, what in problems], path)
    else:
        path.unlink(missing_ok=True)
    return list(problems)


class _Page:
    """Collects what the sections of sweeps put on the page."""

    def __init__(self, folder: Path, tables: Sequence[SweepTables], most_panels: float):
        self.folder = folder
        self.most_panels, self.panels_left = most_panels, 3 * most_panels
        seen = Counter[str]()
        names = []
        for table in tables:  # a sweep may have been copied: both are shown
            name = identity(table.sweep)
            seen[name] += 1
            names.append(name if seen[name] == 1 else f"{name} {seen[name]}")
        self.slugs = dict(zip(tables, slugs(names).values(), strict=True))
        self.tasks = {task: i for i, task in enumerate(dict.fromkeys(task for table in tables for task in table.tasks))}
        self.task_slugs = slugs(self.tasks)
        self.looks = looks(table.variants for table in tables)
        self.figures: dict[str, str] = {}  # as JSON: their numbers as objects would fill the memory
        self.cells: dict[str, str] = {}

    def section(self, tables: SweepTables) -> dict[str, Any]:
        """Writes the files of a sweep; returns what the template shows of it."""
        slug = self.slugs[tables]
        published = beside(tables)
        names = export_tables(tables, published[0], slug, self.folder / "tables")
        panels = panels_of(tables)
        grids = panels <= min(self.most_panels, self.panels_left)
        self.panels_left -= panels if grids else 0
        pictures = draw_pictures(tables, self.looks, slug, self.task_slugs, self.folder / "figures", grids)
        files = {kind: _links("tables", found) for kind, found in names.items()}
        for kind, found in pictures.items():
            section, _, task = kind.partition("/")
            of_task = f" {task}" if task and len(tables.tasks) > 1 else ""
            links = [(text + of_task, address) for text, address in _links("figures", found)]
            files[section] = files.get(section, []) + links
        section = Section(tables, slug, self.tasks, self.looks, files, published, self.add)
        self.cells[slug] = embedded(section.cells())
        found = section.context() | {"without_pictures": not grids}
        tables.forget_curves()
        return found

    def add(self, figure: Figure | None) -> dict[str, Any] | None:
        """Puts a figure on the page; returns its id there and its height."""
        if figure is None:
            return None
        name = f"figure-{len(self.figures) + 1}"
        self.figures[name] = embedded(figure)
        rows = figure.get("rows")
        height = rows["extra"] + rows["height"] * len(rows["ids"]) if rows else figure["layout"]["height"]
        return {"id": name, "height": height}

    def write(self, context: Mapping[str, Any], path: Path) -> None:
        """Writes the HTML, piece by piece: as one text it would take several times its size of memory."""
        themes = tuple(THEMES)
        scales = {theme: scale(theme) for theme in themes}
        inks = {
            theme: [on_scale(theme, i / (len(scales[theme]) - 1))[1] for i in range(len(scales[theme]))]
            for theme in themes
        }
        parts: dict[str, Mapping[str, str] | str] = {"figures": self.figures, "cells": self.cells}
        parts |= {name: embedded(part) for name, part in (("themes", THEMES), ("scales", scales), ("inks", inks))}
        environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
        pieces = environment.get_template("report.html.j2").stream(
            **context,
            **headline(context["sweeps"]),
            tasks=list(self.tasks),
            looks=self.looks,
            themes=THEMES,
            scales=scales,
            mean_name=MEAN,
            best_name=BEST,
            when=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
            css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
            js=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
            plotly=Markup(plotly_js()),
            data=_pieces(parts),
        )
        part = part_of(path)
        # Names of folders may hold what is no text.
        pieces.dump(str(part), "utf-8", "backslashreplace")
        part.replace(path)


def plotly_js() -> str:
    """The script that draws; importing plotly for it would take 50 MB."""
    found = find_spec("plotly")
    assert found is not None
    assert found.origin is not None
    return (Path(found.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def headline(sections: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Title of the page and a sentence about all of it."""
    if not sections:
        return {
            "title": "Report of runs",
            "heading": "Report of runs",
            "summary": "There are no sweeps here, only single runs.",
        }
    done, planned = (sum(section[key] for section in sections) for key in ("finished", "planned"))
    many = len(sections) > 1
    summary = f"{len(sections)} sweep{'s' if many else ''}, {done} of {planned} runs finished."
    if done < planned:
        summary += " Numbers of cells with unfinished runs may still change."
    heading = "Report of sweeps" if many else f"Report of {sections[0]['name']}"
    return {"title": f"{heading}, Canon Lab", "heading": heading, "summary": summary}


def outside(
    runs: Sequence[Run], folder: Path, problems: list[tuple[str, str]], told: Told = lambda words: None
) -> dict[str, Any] | None:
    """The table of runs that belong to no sweep."""
    lines: list[dict[str, Any]] = []
    for number_of, run in enumerate(runs, start=1):
        told(f"reading single runs, {number_of:,} of {len(runs):,}")
        alone = Run(run.folder)  # forgotten after its line
        lines.append(run_line(alone))
        problems += [(lines[-1]["folder"], problem) for problem in alone.problems]
    if not lines:
        return None
    write_csv(
        [{k: v if isinstance(v, str) or known(v) else None for k, v in line.items()} for line in lines],
        folder / "tables" / "runs.csv",
    )
    there, lines = len(lines), lines[-MOST_ROWS:]
    metrics = [metric for metric in SHOWN_METRICS if any(known(line.get(metric)) for line in lines)][:3]
    columns = [
        "folder",
        "name",
        "status",
        "data",
        "canon",
        "seed",
        "learning rate",
        "parameters",
        "wall time",
        *metrics,
    ]
    shown = [
        [
            *(
                line[key][:MOST_TEXT] if isinstance(line[key], str) and line[key] else "–"
                for key in ("folder", "name", "status", "data", "canon")
            ),
            f"{line['seed']:.0f}" if known(line["seed"]) else "–",
            rate(line["learning_rate"]),
            f"{line['parameters']:,.0f}" if known(line["parameters"]) else "–",
            duration(line["seconds"]) if known(line["seconds"]) else "–",
            *(number(line.get(metric)) for metric in metrics),
        ]
        for line in lines
    ]
    found = {"columns": columns, "lines": shown, "files": [("CSV", "tables/runs.csv")]}
    return found | {"there": there, "left_out": there > len(lines)}


def embedded(data: Any) -> Markup:
    """JSON that may stand in a script element whatever names are in it."""
    # In ASCII a character is a byte of memory; one dash in a text of megabytes would double them.
    text = json.dumps(_plain(data), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _pieces(parts: Mapping[str, Mapping[str, str] | str]) -> Iterator[Markup]:
    """An object of parts that are JSON already, or of objects of such parts, in pieces: together they are megabytes."""
    for i, (name, part) in enumerate(parts.items()):
        yield Markup(f"{',' if i else '{'}{embedded(name)}:")
        if isinstance(part, str):
            yield Markup(part)
        else:
            yield from _pieces(part)
    yield Markup("}" if parts else "{}")


def _plain(node: Any) -> Any:
    """Six digits are more than a screen shows; JSON knows no infinity."""
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    if isinstance(node, float):
        return float(f"{node:.6g}") if math.isfinite(node) else None
    return node


def _links(folder: str, names: Iterable[str]) -> list[tuple[str, str]]:
    kinds = {"csv": "CSV", "tex": "LaTeX", "png": "PNG"}
    return [(kinds[name.rpartition(".")[2]], f"{folder}/{name}") for name in names]
