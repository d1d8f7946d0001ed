"""Runs jobs by SLURM, through submitit: one SLURM job for each job of a sweep, submitted as an array."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from src.config import ConfigError
from src.sweeps.jobs import ROOT, is_finished, lock_of, start_of
from src.sweeps.plan import Job

POLL = 5.0  # seconds


class Slurm:
    """Arguments as in ``configs/launcher/slurm.yaml``.

    Args:
        cluster: slurm, or local for processes of this machine, to try it out.
        partition: of the cluster; None for its default.
        account: that is charged.
        nodes: of each job.
        gpus_per_node: of each job.
        tasks_per_node: processes of each job on a node; the trainer's ``devices``.
        cpus_per_task: cores of a process.
        memory_gb: of a node.
        timeout_minutes: after which SLURM ends a job; the next sweep goes on with it.
        array_parallelism: jobs that may run at the same time.
        options: further options of sbatch, without their dashes.
        setup: shell lines before each job.
        wait: until all jobs have ended.
    """

    config_name = "slurm"

    def __init__(
        self,
        cluster: Literal["slurm", "local"] = "slurm",
        partition: str | None = None,
        account: str | None = None,
        nodes: int = 1,
        gpus_per_node: int = 1,
        tasks_per_node: int = 1,
        cpus_per_task: int = 8,
        memory_gb: int = 64,
        timeout_minutes: int = 1440,
        array_parallelism: int = 64,
        options: dict[str, Any] | None = None,
        setup: list[str] | None = None,
        wait: bool = True,
    ):
        self.cluster, self.array_parallelism, self.wait = cluster, array_parallelism, wait
        self.parameters: dict[str, Any] = {
            "nodes": nodes,
            "gpus_per_node": gpus_per_node,
            "tasks_per_node": tasks_per_node,
            "cpus_per_task": cpus_per_task,
            "mem_gb": memory_gb,
            "timeout_min": timeout_minutes,
        }
        if cluster == "slurm":
            more = {"account": account} if account else {}
            self.parameters |= {
                "slurm_array_parallelism": array_parallelism,
                "slurm_additional_parameters": more | (options or {}),
                "slurm_setup": list(setup or []),
            } | ({"slurm_partition": partition} if partition else {})

    def describe(self) -> str:
        """In words."""
        return f"{self.array_parallelism} at a time by {self.cluster}"

    @property
    def workers(self) -> int:
        """Jobs at a time."""
        return self.array_parallelism

    def executor(self, folder: Path) -> Any:
        """submitit's, which writes its scripts and logs into a folder.

        Raises:
            ConfigError: submitit is not installed, or there is no SLURM here.
        """
        try:
            import submitit
        except ImportError as error:
            raise ConfigError("launcher=slurm: pip install submitit") from error
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster)
        except RuntimeError as error:
            raise ConfigError(f"launcher.cluster={self.cluster}: {error}") from error
        executor.update_parameters(name="canon-lab", **self.parameters)
        return executor

    def run(self, jobs: list[Job], root: Path, told: Callable[[Job, str, float], Any]) -> None:
        """Submits what is not finished, and waits for it; see ``Local.run``."""
        missing = [job for job in jobs if not is_finished(job, root)]
        if not missing:
            return
        records = root.parent / "submitit"
        if records.is_symlink():
            raise ConfigError(
                f"{records} is a link to {str(records.readlink())!r}: what is submitted would be written there. Remove it"
            )
        # A new one, which nobody can have filled: submitit runs what lies where it means to write.
        own = records / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{secrets.token_hex(4)}"
        own.mkdir(parents=True)
        executor = self.executor(own / "%j")
        with executor.batch():
            submitted = [executor.submit(run_job, job, root) for job in missing]
        for job, handle in zip(missing, submitted, strict=True):
            told(job, f"submitted as {handle.job_id}", 0.0)
        began, open_ = (
            time.monotonic(),
            dict(zip((job.name for job in missing), zip(missing, submitted, strict=True), strict=True)),
        )
        while self.wait and open_:
            for name, (job, handle) in list(open_.items()):
                if handle.done():
                    del open_[name]
                    told(job, "finished" if is_finished(job, root) else "failed", time.monotonic() - began)
            if open_:
                time.sleep(POLL if self.cluster == "slurm" else 0.2)


def run_job(job: Job, root: Path) -> int:
    """What each task of a SLURM job does: the run, from its newest checkpoint on. Lightning finds its ranks in the environment.

    Only the first task takes the lock; where another sweep has it, there is nothing to do.
    """
    first = int(os.environ.get("SLURM_PROCID", "0")) == 0
    lock = lock_of(job, root)
    if first and not lock.acquire():
        return 0
    try:
        if is_finished(job, root):
            return 0
        inherited = [lock.descriptor] if first else []
        with (job.folder(root) / "output.log").open("a") as log:
            done = subprocess.run(
                start_of(job, root, tidy=first).command,
                check=False,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=inherited,
            )
        if done.returncode:
            raise RuntimeError(f"{job.command}: exit status {done.returncode}; see {job.folder(root) / 'output.log'}")
        return 0
    finally:
        lock.release()
