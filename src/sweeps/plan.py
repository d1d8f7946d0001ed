"""What a sweep runs: tasks x variants x axes, each combination a job that is named by the hash of its configuration.

A sweep is a YAML file (``configs/sweep``); the class below is its schema:

    title: NoPE with Canon layers rises to RoPE with them
    tasks: {Depo: [experiment=quickstart]}                       # what is asked
    variants:                                                    # what is compared
      NoPE: [position=nope, "canon.positions=''"]
      NoPE + Canon: [position=nope, canon.positions=ABCD]
    axes: {optimizer.lr: [2e-3, 4e-3], "seed,data.seed": [1, 2, 3]}   # what each of them is run with
    expect:
      - {better: NoPE + Canon, than: NoPE, by: 0.3}

Jobs of the same configuration are the same job: what one sweep has run, another finds done.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Transformer
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from src.config import ConfigError, experiment_hash, instantiate, suggest, to_plain
from src.config.compose import CONFIG_DIR, compose_config, swept_over
from src.config.mistakes import first_misspelt_key
from src.config.quoting import as_override, quoted
from src.datamodules.base import StreamDataModule
from src.sweeps.compositions import Composer
from src.sweeps.kinds import check_kinds, check_texts
from src.sweeps.matching import match_model
from src.sweeps.statements import SEED, Match, Statement, is_repetition
from src.training.checks import check_measured, checked

RECIPE = "recipe"
SMALLEST = "smoke"


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    task: str
    variant: str
    settings: dict[str, Any]  # of the axes
    overrides: list[str]  # of configs/train.yaml
    config: dict[str, Any]  # resolved
    name: str  # hash of the configuration
    former: str | None = None  # the name under which an earlier version has finished it

    @property
    def seed(self) -> int:
        """Of weights and data order: what runs of different variants are paired by."""
        return self.config["seed"]

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        return self.config["optimizer"]["lr"]

    @property
    def settings_in_words(self) -> str:
        """The axes' values in a line."""
        return ", ".join(
            f"{keys}={value:.4g}" if isinstance(value, float) else f"{keys}={value}"
            for keys, value in self.settings.items()
        )

    @property
    def recorded_name(self) -> str:
        """The hash that its results bear."""
        return self.former or self.name

    def folder(self, root: Path) -> Path:
        """Where the run is, below the folder of all jobs."""
        return root / self.recorded_name

    @property
    def command(self) -> str:
        """What a shell would run again, from the folder of the repository."""
        return "python src/train.py " + " ".join(quoted(override) for override in self.overrides)


@dataclass(frozen=True)
class Sweep:
    """A grid of runs and what it is expected to show.

    Args:
        title: what it asks or says.
        settings: name -> overrides, what ``tasks`` may name.
        tasks: what is asked: names of ``settings``, or name -> overrides.
        architectures: name -> overrides, what ``variants`` may name.
        variants: the architectures compared: names of ``architectures``, or name -> overrides.
        axes: configuration key -> values; every combination is run. Keys joined by commas take the same value, as
            ``seed,data.seed`` does for weights and data. ``seed`` and ``optimizer.lr`` have a meaning in reports.
            The word ``recipe`` in place of values takes those that the task's experiment is swept over (``hydra.sweeper.params``).
        base: overrides of every job, to which those of tasks and variants are added.
        overrides: of every job, stronger than those of tasks and variants; an axis is stronger still.
        metric: what is compared, on the test set.
        metrics: task -> metric, where it is another.
        select: metric by which the best learning rate is chosen, on the validation set; None for the validation counterpart
            of what is compared.
        expect: statements that a report checks.
        match: makes the variants equally large.
        source: where the expectation comes from.
        published: names under which tasks and variants stand in published tables, see ``src/reporting/published.py``.
        scales: name -> what is different at that scale: any of the arguments above; ``base`` is added to, the others are replaced.
        note: what to know about it.
    """

    config_name = "sweep"

    title: str
    settings: dict[str, list[str]] = field(default_factory=dict)
    tasks: dict[str, list[str]] | list[str] = field(default_factory=dict)
    architectures: dict[str, list[str]] = field(default_factory=dict)
    variants: dict[str, list[str]] | list[str] = field(default_factory=dict)
    axes: dict[str, list[Any] | str] = field(default_factory=dict)
    base: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    metric: str = "test/accuracy"
    metrics: dict[str, str] = field(default_factory=dict)
    select: str | None = None
    expect: list[Statement] = field(default_factory=list)
    match: Match | None = None
    source: str | None = None
    published: dict[str, Any] = field(default_factory=dict)
    scales: dict[str, dict[str, Any]] = field(default_factory=dict)
    note: str | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        # YAML has mappings where these have classes.
        object.__setattr__(self, "expect", [_read(Statement, item) for item in self.expect])
        object.__setattr__(self, "match", None if self.match is None else _read(Match, self.match))
        for names, library in (("variants", "architectures"), ("tasks", "settings")):
            wanted, known = getattr(self, names), getattr(self, library)
            if isinstance(wanted, list):
                for name in wanted:
                    if name not in known:
                        raise ConfigError(f"sweep.{names}: {name!r} is not in {library}; {suggest(name, known)}")
                object.__setattr__(self, names, {name: known[name] for name in wanted})

    def at(self, scale: str) -> Sweep:
        """The sweep at one of its scales.

        Raises:
            ConfigError: there is no such scale, or it changes what does not exist.
        """
        if not self.scales:
            if scale != SMALLEST:  # which is what the command line says unless told otherwise
                raise ConfigError(f"scale={scale}: this sweep has no scales; leave it out")
            return self.checked()
        if scale not in self.scales:
            raise ConfigError(f"scale={scale}: this sweep has no such scale; {suggest(scale, self.scales)}")
        changes = dict(self.scales[scale])
        known = set(self.__dataclass_fields__) - {"scales"}
        for key in changes:
            if key not in known:
                raise ConfigError(f"sweep.scales.{scale}.{key}: no such key; {suggest(key, known)}")
        check_texts(f"sweep.scales.{scale}.base", changes.get("base", []), "overrides, [seed=1, model=gla]")
        changes["base"] = [*self.base, *changes.get("base", [])]
        try:
            return replace(self, **changes, scales={}).checked()
        except ConfigError as error:
            raise ConfigError(f"at scale {scale}: {error}") from error

    def along(self, axes: Mapping[str, list[Any] | str]) -> Sweep:
        """With other values for some of its axes, each named by one of its keys.

        Raises:
            ConfigError: there is no such axis.
        """
        changed = dict(self.axes)
        if not isinstance(axes, Mapping):
            raise ConfigError(f"axes={axes!r}: a mapping, as in 'axes={{seed: [1, 2]}}'")
        for name, values in axes.items():
            if not self.axes:
                raise ConfigError(
                    f"axes.{name}: this sweep has no axes, every combination is run once; give a value to all of its jobs with "
                    f"'overrides=[\"{name}=...\"]'"
                )
            keys = next((keys for keys in self.axes if name == keys or name in keys.split(",")), None)
            if keys is None:
                raise ConfigError(f"axes.{name}: this sweep has no such axis; {suggest(str(name), self.axes)}")
            changed[keys] = values
        return replace(self, axes=changed).checked()

    def checked(self) -> Sweep:
        """Itself, if its parts fit together.

        Raises:
            ConfigError: something is empty, or names what does not exist.
        """
        for name in ("tasks", "variants"):
            if not getattr(self, name):
                raise ConfigError(f"sweep.{name}: at least one is needed, as in {{name: [overrides]}}")
        for key, values in self.axes.items():
            if values != RECIPE and (not isinstance(values, list) or not values):
                raise ConfigError(f"sweep.axes.{key}={values!r}: a list of values, or {RECIPE}")
        for key, metric in {
            "metric": self.metric,
            **{f"metrics.{task}": m for task, m in self.metrics.items()},
        }.items():
            if not metric.startswith("test/"):
                raise ConfigError(f"sweep.{key}={metric}: what is compared is measured on the test set, test/...")
        if self.select is not None and not self.select.startswith("val/"):
            raise ConfigError(f"sweep.select={self.select}: a learning rate is chosen on the validation set, val/...")
        for task in self.metrics:
            if task not in self.tasks:
                raise ConfigError(f"sweep.metrics: no task {task!r}; {suggest(task, self.tasks)}")
        axes = {key for keys in self.axes for key in keys.split(",")}
        for override in self.overrides:
            if (key := override.partition("=")[0].lstrip("+~")) in axes:
                raise ConfigError(
                    f"overrides: {override} would do nothing, the axis {key} is stronger; give axes={{{key}: [...]}}"
                )
        self._check_names()
        return self

    def _check_names(self) -> None:
        for number, statement in enumerate(self.expect):
            for role in ("better", "than"):
                if (name := getattr(statement, role)) not in self.variants:
                    raise ConfigError(f"sweep.expect[{number}].{role}={name!r}: {suggest(name, self.variants)}")
            if statement.task is not None and statement.task not in self.tasks:
                raise ConfigError(
                    f"sweep.expect[{number}].task={statement.task!r}: {suggest(statement.task, self.tasks)}"
                )
        if self.match is not None and self.match.to not in self.variants:
            raise ConfigError(f"sweep.match.to={self.match.to!r}: {suggest(self.match.to, self.variants)}")

    @property
    def tasks_by_name(self) -> dict[str, list[str]]:
        """Task -> overrides."""
        assert isinstance(self.tasks, dict)  # since __post_init__
        return self.tasks

    @property
    def variants_by_name(self) -> dict[str, list[str]]:
        """Variant -> overrides."""
        assert isinstance(self.variants, dict)  # since __post_init__
        return self.variants

    def metric_of(self, task: str) -> str:
        """What is compared on a task."""
        return self.metrics.get(task, self.metric)

    def selection_of(self, task: str) -> str:
        """By what the learning rate is chosen: never by the test set."""
        return self.select or self.metric_of(task).replace("test/", "val/", 1)

    def jobs(self, told: Callable[[str], object] = lambda words: None) -> list[Job]:
        """Every combination, in the order in which it is worth running: seeds come last, so that each is a whole comparison.

        Args:
            told: hears now and then how far it is.

        Raises:
            ConfigError: one of them cannot be; the message names it.
        """
        with Composer() as composer:
            return self._jobs(composer, told)

    def _jobs(self, composer: Composer, told: Callable[[str], object]) -> list[Job]:
        found: dict[str, Job] = {}
        tried: set[str] = set()  # tasks and variants that have been held against all signatures
        matched: dict[str, list[str]] = {}
        combinations = self._combinations()
        for number, (task, variant, settings) in enumerate(combinations, start=1):
            told(f"planning, {number:,} of {len(combinations):,} jobs")
            try:
                overrides = self._overrides(task, variant) + self._matched(task, variant, settings, matched)
                thorough = not {task, variant} <= tried
                job = job_of(task, variant, settings, overrides, thorough=thorough, composer=composer)
            except ConfigError as error:
                raise ConfigError(f"{task}, {variant}, {settings}: {error}") from error
            if task not in tried:
                for metric in (self.metric_of(task), self.selection_of(task)):
                    check_measured("sweep.metric", metric, job.config["data"], where=f"on {task}")
            tried |= {task, variant}
            if job.name in found:
                other = found[job.name]
                raise ConfigError(
                    f"two jobs of this sweep are the same run: {other.task}, {other.variant}, {other.settings} and "
                    f"{task}, {variant}, {settings}"
                )
            found[job.name] = job
        return list(found.values())

    def _combinations(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Task, variant and the axes' values, all of the first seed before any of the second."""
        found: list[tuple[int, str, str, dict[str, Any]]] = []
        for task in self.tasks_by_name:
            axes = {keys: self._values(task, keys) for keys in self.axes}
            order = sorted(axes, key=lambda keys: SEED not in keys.split(","))
            for values in itertools.product(*(list(enumerate(axes[keys])) for keys in order)):
                settings = {keys: value for keys, (_, value) in zip(order, values, strict=True)}
                seed = values[0][0] if order and SEED in order[0].split(",") else 0
                found += [(seed, task, variant, settings) for variant in self.variants_by_name]
        return [(task, variant, settings) for _, task, variant, settings in sorted(found, key=lambda row: row[0])]

    def _values(self, task: str, keys: str) -> list[Any]:
        values = self.axes[keys]
        if isinstance(values, list):
            return values
        swept = swept_over([*self.base, *self.tasks_by_name[task]])
        if keys not in swept:
            known = ", ".join(swept) or "none"
            raise ConfigError(
                f"sweep.axes.{keys}={RECIPE}: the experiment of {task} is not swept over it, but over: {known}"
            )
        parsed = OverridesParser.create().parse_override(f"{keys}={swept[keys]}")
        if not parsed.is_sweep_override():
            return [parsed.value()]
        return list(parsed.sweep_iterator(transformer=Transformer.identity))

    def _overrides(self, task: str, variant: str) -> list[str]:
        """Without the axes."""
        named = [*self.tasks_by_name[task], "compare=null", *self.variants_by_name[variant]]
        return [*self.base, *named, *self.overrides]

    def _matched(self, task: str, variant: str, settings: dict[str, Any], known: dict[str, list[str]]) -> list[str]:
        """The overrides that make a variant as large as ``match`` says; ``known`` are those found before."""
        if self.match is None or variant == self.match.to:
            return []
        asked = {key: value for keys, value in settings.items() if not is_repetition(keys) for key in keys.split(",")}
        name = repr((task, variant, asked))
        if name not in known:
            asked_for = [f"{key}={as_override(value)}" for key, value in asked.items()]
            config = compose_config([*self._overrides(task, self.match.to), *asked_for])
            if config.model.vocab_size is None:
                data: StreamDataModule = instantiate(to_plain(config.data), "data")
                asked_for.append(f"model.vocab_size={data.expected_vocab_size}")
            budget: Any = self.match.budget
            change: Any = self.match.change
            found = match_model(
                [*self._overrides(task, variant), *asked_for],
                budget=budget,
                target=[*self._overrides(task, self.match.to), *asked_for],
                change=change,
                seq_len=config.data.window - 1,
            ).overrides
            if both := asked.keys() & {override.partition("=")[0] for override in found}:
                raise ConfigError(f"sweep.axes.{both.pop()}: sweep.match decides on it; leave out one of the two")
            known[name] = found
        return known[name]


def job_of(
    task: str,
    variant: str,
    settings: dict[str, Any],
    overrides: list[str],
    *,
    thorough: bool = True,
    composer: Composer | None = None,
) -> Job:
    """The job that these overrides, and then the settings, describe.

    Args:
        task: its name.
        variant: its name.
        settings: configuration key -> value.
        overrides: of everything else.
        thorough: hold the configuration against all signatures, and build its model without memory; else it is only resolved.
        composer: of a plan with many jobs.
    """
    if composer is None:
        with Composer() as alone:
            return job_of(task, variant, settings, overrides, thorough=thorough, composer=alone)
    values = {key: value for keys, value in settings.items() for key in keys.split(",")}
    chosen = {key for key in values if (CONFIG_DIR / key).is_dir()}
    groups = [f"{key}={as_override(values[key])}" for key in sorted(chosen)]
    # A folder that is the same for all: where a job is run does not belong to its configuration.
    base = (*overrides, *groups, "paths.output_dir=here")
    own_values = {key: value for key, value in values.items() if key not in chosen}
    try:
        config = composer.with_values(base, own_values) if thorough else None
        plain = composer.resolved(base, own_values) if config is None else {}
    except (HydraException, OmegaConfBaseException) as error:
        own = [*overrides, *groups, *(f"{key}={as_override(values[key])}" for key in sorted(values.keys() - chosen))]
        raise ConfigError(first_misspelt_key("train", own) or str(error).splitlines()[0]) from error
    plain = {key: value for key, value in plain.items() if key != "compare"} if config is None else checked(config)
    own = [f"{key}={as_override(value)}" for key, value in values.items()]
    return Job(task, variant, settings, [*overrides, *own], plain, experiment_hash(plain))


def _read(kind: type[Any], item: Any) -> Any:
    if isinstance(item, kind):
        return item
    for key in item if isinstance(item, Mapping) else ():
        if key not in kind.__dataclass_fields__:
            known = suggest(str(key), kind.__dataclass_fields__)
            raise ConfigError(f"sweep, {kind.__name__.lower()} {dict(item)}: {key}: no such key; {known}")
    try:
        return TypeAdapter(kind).validate_python(item)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(
            f"sweep, {kind.__name__.lower()} {item}: {where}: {problem['msg']}; there are: {', '.join(kind.__dataclass_fields__)}"
        ) from None
