"""Write the report of what has been run: ``python src/report.py``; ``sweeps=[results/R3]`` for some of it.

It reads the files that sweeps and runs have left below ``logs/`` and needs nothing else: no GPU, no network, no finished sweep.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# Run as a script, Python puts src/ itself on the path; the package is one level up.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from omegaconf import DictConfig  # noqa: E402
from rich.console import Console  # noqa: E402

from src.cli.entry import entrypoint  # noqa: E402
from src.config import ConfigError, suggest, to_plain  # noqa: E402
from src.reporting.page import write_report  # noqa: E402
from src.reporting.results import UNVALIDATED, SweepResults, find_sweeps, outside_of  # noqa: E402
from src.reporting.wording import identity  # noqa: E402
from src.runs.foreign import clean_text  # noqa: E402
from src.support.console import Telling, plain_console  # noqa: E402
from src.support.files import leads_out, strange_in  # noqa: E402

MOST_NAMED = 20  # files that could not be read, on the console; the page lists all


def report(config: DictConfig) -> Path:
    """Reads, writes, and says in a line what each sweep shows."""
    plain = checked(config)
    root = Path(plain["paths"]["log_dir"])
    if (strange := leads_out(Path(plain["output"]), root) or strange_in(Path(plain["output"]))) is not None:
        raise ConfigError(f"output={plain['output']}: {strange}. Remove it, or choose another folder")
    console = plain_console()
    problems: list[tuple[str, str]] = []
    with Telling(console) as told:
        told(f"looking for sweeps and runs below {root}")
        every = find_sweeps(root, problems) if root.is_dir() else []
        sweeps = chosen(every, plain["sweeps"])
        runs = outside_of(every, root) if plain["runs"] and root.is_dir() else []
        if not sweeps and not runs:
            unread = "".join(f"; {where} cannot be read: {what}" for where, what in problems[:MOST_NAMED])
            raise ConfigError(
                f"nothing to report below {root}: python src/sweep.py sweep=results/R3 runs a sweep, python src/train.py a single "
                f"model{unread}"
            )
        path = write_report(sweeps, Path(plain["output"]), runs, problems, told, plain["pictures"])
    for sweep in sweeps:
        done = sum(cell.runs for cell in sweep.cells)
        say(
            console,
            f"{identity(sweep)}: {sweep.outcome}, {done} of {len(sweep.rows)} runs finished; {sweep.plan['title']}",
        )
        without = sum(row["status"] == UNVALIDATED for row in sweep.rows)
        if without:
            say(console, f"  {without} of its runs are without a validation, and count nowhere; the page says why")
    if runs:
        say(console, f"{len(runs)} run{'s' if len(runs) > 1 else ''} outside of sweeps")
    for where, what in problems[:MOST_NAMED]:
        say(console, f"could not be read: {where}: {what}")
    if len(problems) > MOST_NAMED:
        say(console, f"and {len(problems) - MOST_NAMED} more, which the page lists")
    say(console, f"report: {path}")
    return path


def say(console: Console, words: str) -> None:
    """A line, whatever names are in it."""
    console.print(clean_text(words), soft_wrap=True)


def chosen(every: list[SweepResults], names: list[str]) -> list[SweepResults]:
    """The sweeps that were asked for, in the order of their names; a name without a scale means all of its scales.

    Raises:
        ConfigError: there is no such sweep on disk.
    """
    if not names:
        return every
    known = {identity(sweep) for sweep in every} | {sweep.name for sweep in every}
    for name in names:
        if name not in known:
            there = (
                suggest(name, known) if known else "there are none yet; python src/sweep.py sweep=results/R3 runs one"
            )
            raise ConfigError(f"sweeps: no sweep {name!r} has been run; {there}")
    return [sweep for sweep in every if sweep.name in names or identity(sweep) in names]


def checked(config: DictConfig) -> dict[str, Any]:
    """The plain configuration, if its values are of the right kind.

    Raises:
        ConfigError: one of them is not.
    """
    plain = to_plain(config)
    if not isinstance(plain["sweeps"], list) or not all(isinstance(name, str) for name in plain["sweeps"]):
        raise ConfigError(f"sweeps={plain['sweeps']!r}: a list of names, [results/R3]")
    plain.setdefault("pictures", False)
    for key in ("runs", "pictures"):
        if not isinstance(plain[key], bool):
            raise ConfigError(f"{key}={plain[key]!r}: true or false")
    if not plain["output"] or not isinstance(plain["output"], str):
        raise ConfigError(f"output={plain['output']!r}: a folder")
    if (other := plain["paths"].get("output_dir", plain["output"])) != plain["output"]:
        raise ConfigError(f"paths.output_dir={other}: the folder of a report is output=, as in output={other}")
    return plain


if __name__ == "__main__":
    entrypoint("report", report)
