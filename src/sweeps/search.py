"""Search instead of a grid: Optuna proposes values, hopeless trials are stopped early.

A search is a YAML file like a sweep (``configs/sweep/search``); the class below is its schema. Trials are jobs like any others. What Optuna
knows is in a journal beside the manifest, so that the same command goes on after whatever has happened; a trial that was cut
off is run to its end from its last checkpoint.
"""

from __future__ import annotations

import csv
import logging
import math
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from src.config import ConfigError, config_hash, to_plain
from src.config.compose import compose_config
from src.evaluation.evaluators import lower_is_better
from src.runs.git import code_of, remarks_on_code
from src.runs.registry import Run
from src.support.files import Lock, strange_in
from src.sweeps.former import recognised
from src.sweeps.jobs import expected_data, is_finished, lock_of
from src.sweeps.local import POLL, Local, interruptible, launch, stop
from src.sweeps.plan import Job, job_of
from src.training.checks import check_measured

log = logging.getLogger(__name__)

JOB = "job"  # under which a trial's record names its job


@dataclass(frozen=True)
class Search:
    """What is searched, and how.

    Args:
        title: what it asks.
        base: overrides of every trial.
        overrides: further ones.
        space: configuration key -> ``{low, high, log, step}`` or ``{choices: [...]}``.
        metric: of the validation set. Whether it is a loss is known by its name.
        trials: to be finished or pruned in all.
        sampler: tpe or random.
        pruner: median stops a trial that is worse than half of the earlier ones at the same step; hyperband halves; none.
        warmup_trials: that are finished before any is stopped.
        seed: of the sampler.
        note: what to know about it.
    """

    config_name = "search"

    title: str
    space: dict[str, dict[str, Any]]
    base: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    metric: str = "val/loss"
    trials: int = 16
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "hyperband", "none"] = "median"
    warmup_trials: int = 4
    seed: int = 42
    note: str | None = None

    def __post_init__(self) -> None:
        if not self.metric.startswith("val/"):
            raise ConfigError(f"sweep.metric={self.metric}: a search looks at the validation set, val/...")
        if self.trials < 1:
            raise ConfigError(f"sweep.trials={self.trials}: at least 1")
        if not isinstance(self.space, dict):
            raise ConfigError(
                f"sweep.space={self.space!r}: a mapping, {{optimizer.lr: {{low: 1e-4, high: 1e-2, log: true}}}}"
            )
        for key, values in self.space.items():
            if not isinstance(values, dict):
                raise ConfigError(f"sweep.space.{key}={values!r}: {{low, high}} with log or step, or {{choices}}")
            if set(values) != {"choices"} and not {"low", "high"} <= set(values) <= {"low", "high", "log", "step"}:
                raise ConfigError(f"sweep.space.{key}={values}: {{low, high}} with log or step, or {{choices}}")
            _check_range(f"sweep.space.{key}", values)
        if not self.space:
            raise ConfigError("sweep.space: at least one key, as in {optimizer.lr: {low: 1e-4, high: 1e-2, log: true}}")

    @property
    def identity(self) -> str:
        """Of what decides a trial's score: trials of another configuration, space or metric are those of another search.

        How many there are, and how they are chosen and stopped, may change in its course.
        """
        return config_hash({"jobs": [job.name for job in self._bases], "space": self.space, "metric": self.metric})

    def data_now(self) -> list[dict[str, Any]]:
        """Which data the trials would be measured on, as the files are now: of the base, and of every choice that may name others.

        Raises:
            ConfigError: the base describes no data.
        """
        return [
            expected_data(section)
            for section in {repr(j.config["data"]): j.config["data"] for j in self._bases}.values()
        ]

    def now(self) -> tuple[str, list[dict[str, Any]]]:
        """Identity and data as the files of the configuration and of the data are at this moment."""
        fresh = replace(self)
        return fresh.identity, fresh.data_now()

    @cached_property
    def _bases(self) -> list[Job]:
        """What is composed of files: the base, and every choice that may name others. Numbers between two ends say all themselves."""
        overrides = [*self.base, "compare=null", *self.overrides]
        found = [job_of("search", "base", {}, overrides, thorough=False)]
        for key, values in self.space.items():
            if "choices" in values and (key.startswith("data") or "." not in key):
                for value in values["choices"]:
                    try:
                        found.append(job_of("search", "base", {key: value}, overrides, thorough=False))
                    except ConfigError:  # it needs another choice beside it; a trial without that says so itself
                        continue
        return found

    def study(self, folder: Path, state: tuple[str, list[dict[str, Any]]] | None = None) -> Any:
        """Optuna's, as the journal in a folder has it: one study for each state of configuration and data, whose scores are never mixed.

        Args:
            folder: of the journal.
            state: what ``now`` has said; None asks it.

        Raises:
            ConfigError: Optuna is not installed.
        """
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
        except ImportError as error:
            raise ConfigError("a search needs Optuna: pip install optuna") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        pruners = {
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=self.warmup_trials),
            "hyperband": optuna.pruners.HyperbandPruner,
            "none": optuna.pruners.NopPruner,
        }
        journal = folder / "optuna.journal"
        for path in (journal, Path(f"{journal}.lock")):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise ConfigError(
                    f"{path} is a link or no file, and Optuna would wait for it, or write elsewhere. Remove it"
                )
        # Not the lock that is a link: one that leads nowhere would be waited for without end.
        storage = JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal))))
        identity, data = self.now() if state is None else state
        name = f"{identity}-{config_hash(data)}"
        known = [study.study_name for study in storage.get_all_studies()]
        if known and name not in known:
            log.warning(
                f"{folder / 'optuna.journal'}: it has trials of other settings, on other data or of another version than now; they stay in "
                "the journal and count no more, a new study begins"
            )
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            load_if_exists=True,
            direction="minimize" if lower_is_better(self.metric) else "maximize",
            pruner=pruners[self.pruner](),
        )
        # A sampler that is made anew with the same seed would propose the same values again.
        study.sampler = samplers[self.sampler](seed=self.seed + len(study.trials))
        return study

    def job(self, trial: Any) -> Job:
        """The job of a trial, which asks it for values."""
        values = {key: _suggested(trial, key, space) for key, space in self.space.items()}
        return job_of("search", f"trial {trial.number}", values, [*self.base, "compare=null", *self.overrides])

    def run(self, launcher: Local, folder: Path, root: Path, told: Callable[[Job, str, float], Any]) -> Any:
        """Runs trials until there are ``trials`` of them.

        Args:
            launcher: how many at a time, and on what.
            folder: of the search.
            root: of all jobs.
            told: called with a job, what became of it and seconds.

        Returns:
            Optuna's study.

        Raises:
            ConfigError: the metric is not measured on these data, or files of the data were replaced in the course of the search.
        """
        config = compose_config([*self.base, "compare=null", *self.overrides])
        check_measured("sweep.metric", self.metric, to_plain(config.data), where="on these data")
        state = self.now()
        study = self.study(folder, state)
        _take_up_what_was_cut_off(study, root)
        _Trials(self, study, state, launcher, root, told).run()
        jobs = {trial.user_attrs.get(JOB) for trial in study.trials if trial.value is not None} - {None}
        for remark in remarks_on_code(Counter(code_of(Run(root / job).record) for job in jobs)):
            log.warning(f"{folder}: {remark}")
        return study


class _Trials:
    def __init__(
        self,
        search: Search,
        study: Any,
        state: tuple[str, list[dict[str, Any]]],
        launcher: Local,
        root: Path,
        told: Callable[[Job, str, float], Any],
    ):
        self.search, self.study, self.state = search, study, state
        self.launcher, self.root, self.told = launcher, root, told
        self.running: dict[int, _Trial] = {}  # by slot
        self.replaced = False  # files of the data or of the configuration, since the study began

    def run(self) -> None:
        with interruptible():
            try:
                while self._wants_more() or self.running:
                    for slot in range(self.launcher.workers):
                        if slot not in self.running and self._wants_more():
                            self._begin(slot)
                    for slot, trial in list(self.running.items()):
                        if self._ended(trial):
                            del self.running[slot]
                    time.sleep(POLL)
            except KeyboardInterrupt:
                stop([trial.process for trial in self.running.values()])
                raise
        if self.replaced:
            raise ConfigError(
                "sweep: files of the data, or of the configuration, were changed in the course of the search, and scores on both are not "
                "compared; the same command begins a new study"
            )

    def _wants_more(self) -> bool:
        return not self.replaced and self._started() < self.search.trials

    def _started(self) -> int:
        """Trials that count: failed ones are replaced, up to as many again."""
        from optuna.trial import TrialState

        states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
        failed = states.count(TrialState.FAIL)
        return len(states) - min(failed, self.search.trials) - states.count(TrialState.WAITING)

    def _begin(self, slot: int) -> None:
        self.replaced = self.search.now() != self.state
        if self.replaced:  # what is running ends, and counts if it has not read the new ones
            return
        trial = self.study.ask()
        (job,) = recognised([self.search.job(trial)], self.root)
        trial.set_user_attr(JOB, job.recorded_name)
        if is_finished(job, self.root):
            self._tell(trial, job)
            self.told(job, "finished", 0.0)
            return
        lock = lock_of(job, self.root)
        if not lock.acquire():
            self.study.tell(trial, state=_state("FAIL"))  # another search is at it; ours proposes something else
            return
        process, step = launch(job, self.root, lock, self.launcher.environment(slot))
        self.running[slot] = _Trial(trial, job, process, lock, time.monotonic())
        self.told(job, f"resumed at step {step:,}" if step else "started", 0.0)

    def _ended(self, trial: _Trial) -> bool:
        code, seconds = trial.process.poll(), time.monotonic() - trial.started
        if code is None:
            if not self._hopeless(trial):
                return False
            stop([trial.process])
            trial.lock.release()
            self.study.tell(trial.trial, state=_state("PRUNED"))
            self.told(trial.job, f"stopped at step {trial.reported:,}: worse than the others", seconds)
            return True
        trial.lock.release()
        if code == 0 and is_finished(trial.job, self.root):
            self._tell(trial.trial, trial.job)
            self.told(trial.job, "finished", seconds)
        else:
            self.study.tell(trial.trial, state=_state("FAIL"))
            self.told(trial.job, "failed", seconds)
        return True

    def _hopeless(self, trial: _Trial) -> bool:
        """Hands new validations to Optuna, and asks."""
        for step, value in Run(trial.job.folder(self.root)).curve(self.search.metric).items():
            if int(step) > trial.reported:  # type: ignore[arg-type]
                trial.reported = int(step)  # type: ignore[arg-type]
                trial.trial.report(float(value), trial.reported)
                if trial.trial.should_prune():
                    return True
        return False

    def _tell(self, trial: Any, job: Job) -> None:
        """A trial without a validation, or whose validation is no number, is no trial: nothing else may stand in for it."""
        value = Run(job.folder(self.root)).metrics.get(self.search.metric, math.nan)
        if math.isfinite(value):
            self.study.tell(trial, value)
        else:
            self.study.tell(trial, state=_state("FAIL"))
            self.told(job, f"without a finite {self.search.metric}: does not count", 0.0)


def write_trials(study: Any, search: Search, folder: Path) -> Path:
    """A table of all trials, trials.csv."""
    path = folder / "trials.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", search.metric, *search.space, JOB])
        for trial in study.get_trials(deepcopy=False):
            values = [trial.params.get(key) for key in search.space]
            value = trial.value if trial.value is not None else trial.intermediate_values.get(trial.last_step)
            writer.writerow([trial.number, trial.state.name.lower(), value, *values, trial.user_attrs.get(JOB)])
    return path


@dataclass
class _Trial:
    trial: Any
    job: Job
    process: subprocess.Popen[bytes]
    lock: Lock
    started: float
    reported: int = 0  # last step whose validation Optuna knows


def _check_range(where: str, values: dict[str, Any]) -> None:
    if "choices" in values:
        if not isinstance(values["choices"], list) or not values["choices"]:
            raise ConfigError(f"{where}.choices={values['choices']!r}: a list of values")
        return
    for name in ("low", "high", "step"):
        value = values.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{where}.{name}={value!r}: a number")
    if values["low"] > values["high"] or (values.get("log") and values["low"] <= 0):
        raise ConfigError(f"{where}={values}: low is at most high, and positive on a logarithmic scale")


def _suggested(trial: Any, key: str, space: dict[str, Any]) -> Any:
    if "choices" in space:
        return trial.suggest_categorical(key, space["choices"])
    whole = isinstance(space["low"], int) and isinstance(space["high"], int)
    suggest = trial.suggest_int if whole else trial.suggest_float
    options = {name: space[name] for name in ("log", "step") if name in space}
    return suggest(key, space["low"], space["high"], **options)


def _take_up_what_was_cut_off(study: Any, root: Path) -> None:
    """Trials that were running when a search was killed are asked for again, with the same values: the same job goes on.

    A job that somebody holds was not cut off: another search is at it, and tells its trial's end itself.
    """
    for trial in study.get_trials(states=(_state("RUNNING"),)):
        job = str(trial.user_attrs.get(JOB))
        folder = root / job
        if re.fullmatch("[0-9a-f]{12}", job) and folder.is_dir() and strange_in(folder, of_job=True) is None:
            lock = Lock(folder)
            if not lock.acquire():
                continue
            lock.release()
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=_state("FAIL"))


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]
