"""manifest.json: the plan of a sweep as it is written down, whole enough for a report to need nothing else but the runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from src.runs.foreign import Unreadable, read_json, shaped
from src.runs.schema import MANIFEST
from src.support.files import write_text

if TYPE_CHECKING:
    from src.sweeps.plan import Job, Sweep

MOST_BYTES = 256 << 20  # of ten thousand jobs with their commands some ten millions
# What a report makes of a manifest grows with products of what it lists, whether or not a single run of it is there.
MOST_VERDICTS = 5_000  # statements times tasks; a statement about one task counts once
MOST_PAIRS = 5_000  # of variants, times tasks
MOST_DRAWS = 50_000  # seeds of all pairs and verdicts, each of which takes a millisecond of resampling
# What earlier versions did not write.
OPTIONAL: dict[str, Any] = {"title": "", "note": None, "source": None, "axes": {}, "match": None, "command": ""}
# Of the data, how many are taken, and how: not what they are drawn from. A score depends on all of these but the last.
_TAKING = ("window", "batch_size", "isolate", "val_windows", "test_windows", "val_answers", "test_answers")
_UNSEEN = ("seed", "eval_batch_size", "num_workers", "cache_dir")


def data_name(section: dict[str, Any]) -> str:
    """What names the data that a configuration asks for, whatever the files hold: jobs with the same name must find the same data."""
    asked = {key: value for key, value in section.items() if key not in (*_TAKING, *_UNSEEN)}
    return hashlib.blake2b(json.dumps(asked, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def taken_by(jobs: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, set[str]]]:
    """How the jobs of each task and variant of a manifest take their data: values, as texts, by key; under "" what names the data."""
    found: dict[tuple[str, str], dict[str, set[str]]] = {}
    for job in jobs:
        values = found.setdefault((job["task"], job["variant"]), {})
        for key, value in ((job.get("taking") or {}) | {"": job.get("data")}).items():
            values.setdefault(key, set()).add(f"{value}"[:80])
    return found


def remarks_on_taking(sides: list[dict[str, set[str]]]) -> list[str]:
    """What must be known of a comparison whose sides were not asked the same questions.

    Args:
        sides: of ``taken_by``.
    """
    # Which data are asked for is known by a name only.
    words = ["what they ask for as data"] if sides[0].get("") != sides[1].get("") else []
    for key in _TAKING:
        values = [" or ".join(sorted(side.get(key, ()))) or "none" for side in sides]
        if len(set(values)) > 1:
            words.append(f"data.{key} ({' and '.join(values)})")
    return [f"the two differ in {', '.join(words)}: they were not trained or asked alike"] if words else []


def read_manifest(path: Path) -> dict[str, Any]:
    """The plan of a sweep, every part of its kind, not more than a report can show, tasks and variants of its jobs among those it lists.

    The folder of a job may lie anywhere, because jobs may be kept on another disk than manifests. Whatever a manifest names there is
    at most read as a run's folder: as records that have the shape of such, and that count only under the job's own hash.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: it is something else.
    """
    plan = OPTIONAL | cast(dict[str, Any], read_json(path, MANIFEST, MOST_BYTES))
    metrics = plan["metrics"]
    plan["selections"] = {task: name.replace("test/", "val/", 1) for task, name in metrics.items()} | plan.get(
        "selections", {}
    )
    plan["published"] = plan.get("published") or {}
    folders: dict[str, int] = {}
    for number, job in enumerate(plan["jobs"]):
        # Each run is read for its own job: one for all of them would be read thousands of times.
        where = os.path.realpath(path.parent / job["folder"])
        if where in folders:
            raise Unreadable(f"jobs.{number}.folder: the same as that of jobs.{folders[where]}")
        folders[where] = number
        for key, known in (("task", metrics), ("variant", plan["variants"])):
            if job[key] not in known:
                raise Unreadable(f"jobs.{number}.{key}: {job[key][:80]!r} is none of those that it lists")
    for number, said in enumerate(plan["expect"]):
        if said.get("task") is not None and said["task"] not in metrics:
            raise Unreadable(f"expect.{number}.task: {said['task'][:80]!r} is none of those that it lists")
    _check_products(plan)
    return plan


def _check_products(plan: Mapping[str, Any]) -> None:
    """Raises Unreadable for a plan whose report would take minutes."""
    tasks, variants = plan["metrics"], len(plan["variants"])
    pairs = variants * (variants - 1) // 2
    if pairs * len(tasks) > MOST_PAIRS:
        raise Unreadable(
            f"variants: {pairs * len(tasks):,} pairs of {variants} variants on {len(tasks)} tasks; at most {MOST_PAIRS:,} can be compared"
        )
    said = Counter(statement.get("task") for statement in plan["expect"])
    verdicts = sum(said[None] + said[task] for task in tasks)
    if verdicts > MOST_VERDICTS:
        raise Unreadable(
            f"expect: {verdicts:,} statements, those about all tasks counted for each; at most {MOST_VERDICTS:,} can be judged"
        )
    seeds: dict[str, set[int]] = {task: set() for task in tasks}
    for job in plan["jobs"]:
        seeds[job["task"]].add(job["seed"])
    draws = sum(len(seeds[task]) * (pairs + said[None] + said[task]) for task in tasks)
    if draws > MOST_DRAWS:
        raise Unreadable(
            f"jobs: {draws:,} seeds in all comparisons of variants; at most {MOST_DRAWS:,} can be resampled"
        )


def write_manifest(path: Path, name: str, scale: str, sweep: Sweep, jobs: list[Job], root: Path, command: str) -> None:
    """Writes down the plan of a sweep.

    Args:
        path: ``manifest.json``; folders of jobs are stored relative to it, so that logs/ can be moved as a whole.
        name: of the sweep.
        scale: of the sweep.
        sweep: the plan.
        jobs: of the plan.
        root: folder of all jobs.
        command: that runs the sweep again.

    Raises:
        ConfigError: no report could read it, because it lists too much or holds a number beyond all measure.
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
                "name": job.recorded_name,
                "task": job.task,
                "variant": job.variant,
                "settings": job.settings,
                "seed": job.seed,
                "learning_rate": job.learning_rate,
                "folder": os.path.relpath(job.folder(root), path.parent),
                "command": job.command,
                "data": data_name(job.config.get("data") or {}),
                "taking": {key: value for key in _TAKING if (value := job.config.get("data", {}).get(key)) is not None},
            }
            for job in jobs
        ],
    }
    text = json.dumps(content, indent=2) + "\n"
    try:
        _check_products(shaped(json.loads(text), MANIFEST))
    except Unreadable as error:
        from src.config import ConfigError  # with all of Lightning, which a report does without

        raise ConfigError(f"sweep: no report could read its plan: {error}") from None
    write_text(path, text)
