"""Runs jobs on this machine: a few at a time, each a process group of its own, on its share of the cores and GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from src.callbacks.preemption import REQUEUE
from src.config import ConfigError
from src.support.files import Lock
from src.support.signals import answered
from src.sweeps.jobs import ROOT, is_finished, lock_of, start_of
from src.sweeps.plan import Job

POLL = 0.2  # seconds
GRACE = 30.0  # that a job has to write down where it was, after an interruption


class Local:
    """A pool of processes.

    Args:
        workers: jobs at a time; None for one on each slot: a GPU's share if there are GPUs, else a core.
        jobs_per_gpu: how many jobs share a GPU.
        threads: of the CPU for each job; None for an even share of the cores.
        attempts: how often a job is started, in all, if it breaks off.
    """

    config_name = "local"

    def __init__(
        self, workers: int | None = None, jobs_per_gpu: int = 1, threads: int | None = None, attempts: int = 2
    ):
        for name, value in (
            ("workers", workers),
            ("jobs_per_gpu", jobs_per_gpu),
            ("threads", threads),
            ("attempts", attempts),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"launcher.{name}={value}: at least 1")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        gpus = visible_gpus()
        self.slots: list[str | None] = [gpu for gpu in gpus for _ in range(jobs_per_gpu)] or [None] * cores
        if workers is not None:
            # More workers than slots take turns on the GPUs.
            self.slots = [self.slots[i % len(self.slots)] for i in range(workers)]
        self.threads = threads or max(1, cores // len(self.slots))
        self.attempts = attempts

    def describe(self) -> str:
        """In words."""
        where = "GPU" if self.slots[0] is not None else "CPU"
        return f"{len(self.slots)} at a time on the {where}, {self.threads} thread(s) each"

    @property
    def workers(self) -> int:
        """Jobs at a time."""
        return len(self.slots)

    def environment(self, slot: int) -> dict[str, str]:
        """What a job in one of the slots gets of the machine."""
        found = {"OMP_NUM_THREADS": str(self.threads), "COLUMNS": "120"}
        device = self.slots[slot]
        return found if device is None else found | {"CUDA_VISIBLE_DEVICES": device}

    def run(self, jobs: list[Job], root: Path, told: Callable[[Job, str, float], Any]) -> None:
        """Runs what is not finished; returns when no job is left that could be run.

        Args:
            jobs: in this order.
            root: folder of all jobs.
            told: called with a job, what became of it (started, resumed, finished, failed, elsewhere) and seconds.
        """
        _Pool(self, jobs, root, told).run()


class _Pool:
    def __init__(self, settings: Local, jobs: list[Job], root: Path, told: Callable[[Job, str, float], Any]):
        self.settings, self.root, self.told = settings, root, told
        self.waiting = deque(jobs)
        self.elsewhere: deque[Job] = deque()  # another process has the lock
        self.attempts: dict[str, int] = {}
        self.running: dict[int, _Running] = {}  # by slot

    def run(self) -> None:
        with interruptible():
            try:
                while self.waiting or self.running or self.elsewhere:
                    self._start_some()
                    self._collect()
                    time.sleep(POLL)
            except KeyboardInterrupt:
                self._stop()
                raise

    def _start_some(self) -> None:
        free = [slot for slot in range(len(self.settings.slots)) if slot not in self.running]
        for queue in (self.waiting, self.elsewhere):
            for _ in range(len(queue)):
                if not free:
                    return
                job = queue.popleft()
                if is_finished(job, self.root):
                    self.told(job, "finished", 0.0)
                    continue
                lock = lock_of(job, self.root)
                if not lock.acquire():
                    if queue is self.waiting:
                        self.told(job, "elsewhere", 0.0)
                    self.elsewhere.append(job)
                elif is_finished(job, self.root):  # meanwhile
                    lock.release()
                    self.told(job, "finished", 0.0)
                else:
                    self._start(job, lock, free.pop(0))

    def _start(self, job: Job, lock: Lock, slot: int) -> None:
        self.attempts[job.name] = self.attempts.get(job.name, 0) + 1
        process, step = launch(job, self.root, lock, self.settings.environment(slot))
        self.running[slot] = _Running(job, process, lock, time.monotonic())
        self.told(job, f"resumed at step {step:,}" if step else "started", 0.0)

    def _collect(self) -> None:
        for slot, running in list(self.running.items()):
            code = running.process.poll()
            if code is None:
                continue
            del self.running[slot]
            running.lock.release()
            seconds = time.monotonic() - running.started
            if code == 0 and is_finished(running.job, self.root):
                self.told(running.job, "finished", seconds)
            elif code == REQUEUE or (code != 2 and self.attempts[running.job.name] < self.settings.attempts):
                # Stopped on request, its state on the disk; or broken off. (2 is a mistake of the user's.)
                self.waiting.append(running.job)
            else:
                self.told(running.job, "failed", seconds)

    def _stop(self) -> None:
        stop([running.process for running in self.running.values()])


class _Running:
    def __init__(self, job: Job, process: subprocess.Popen[bytes], lock: Lock, started: float):
        self.job, self.process, self.lock, self.started = job, process, lock, started


def launch(job: Job, root: Path, lock: Lock, environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], int]:
    """Starts a job whose lock is held, in a process group of its own; what it prints goes to output.log in its folder.

    Returns:
        The process, and the step from which it goes on.
    """
    start = start_of(job, root)
    with (job.folder(root) / "output.log").open("a") as log:
        process = subprocess.Popen(
            start.command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a signal reaches the job and all that it starts, and nobody else
            pass_fds=[lock.descriptor],
        )
    return process, start.step


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Interrupts process groups as Ctrl-C would, and ends those that do not listen."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, sign)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(POLL)


def interruptible() -> AbstractContextManager[None]:
    """SIGTERM ends a sweep as Ctrl-C does, and Ctrl-C's signal does so in the background of a script too.

    A shell script starts what it runs in the background with that signal ignored, and so would every job be.
    """

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    return answered(interrupt, signal.SIGINT, signal.SIGTERM)


def visible_gpus() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(i) for i in range(torch.cuda.device_count())]
