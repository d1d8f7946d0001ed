"""A line on the terminal for everything that happens to a job."""

from __future__ import annotations

from pathlib import Path

from src.runs.registry import Run
from src.sweeps.cost import corrected, duration, kind_of, makespan
from src.sweeps.jobs import is_finished
from src.sweeps.plan import Job


class Progress:
    """Prints a line whenever something happens to a job."""

    def __init__(self, jobs: list[Job], root: Path, expected: dict[str, float], workers: int):
        self.jobs, self.root, self.expected, self.workers = jobs, root, expected, workers
        self.done = {job.name for job in jobs if is_finished(job, root)}
        self.failed: set[str] = set()
        self.guesses = {kind_of(job): expected[job.name] for job in jobs if expected[job.name]}
        self.measured: dict[str, list[float]] = {}

    def __call__(self, job: Job, what: str, seconds: float) -> None:
        """Prints it."""
        if what == "finished":
            if job.name in self.done:
                return  # it was before we began
            self.done.add(job.name)
            whole = Run(job.folder(self.root)).results.get("seconds", 0.0)  # of all attempts
            if took_all := max(seconds, whole):
                self.measured.setdefault(kind_of(job), []).append(took_all)
        if what == "failed":
            self.failed.add(job.name)
            what = f"failed, see {job.folder(self.root) / 'output.log'}"
        if what == "elsewhere":
            what = "is being run by another process; waiting for it"
        took = f" in {duration(seconds)}" if seconds else ""
        print(
            f"[{len(self.done):>3}/{len(self.jobs)}] {job.task} | {job.variant} | {job.settings_in_words}: {what}{took}{self._ahead()}",
            flush=True,
        )

    def _ahead(self) -> str:
        by_kind = corrected(self.guesses, self.measured)
        left = [
            by_kind[kind_of(j)] for j in self.jobs if j.name not in self.done | self.failed and self.expected[j.name]
        ]
        return f"; about {duration(makespan(left, self.workers))} left" if left else ""

    def left(self) -> str:
        """How many jobs are finished."""
        finished = sum(is_finished(job, self.root) for job in self.jobs)
        return f"{finished} of {len(self.jobs)} jobs are finished"
