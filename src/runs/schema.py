"""The shape of what runs and sweeps leave behind, as ``foreign.py`` holds files against it.

Keys that are not named here are left as they are, and most may be missing: earlier versions wrote fewer, later ones may write more. A key
that is there must be of its kind, because a number that somebody has turned into a word, or a list into a mapping, is no record any more.

Numbers beyond ``LARGEST`` have no meaning here, and sums and squares of them may be no numbers any more. Where a run that diverges may
write one, it is read as infinite, which counts as no score; anywhere else it makes the file unreadable. What a sweep may list is bounded
too: real ones have some ten tasks and variants, and at most thousands of jobs.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NotRequired, Required

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict  # that of typing is not enough for pydantic before Python 3.12

_OPEN = ConfigDict(strict=True, extra="allow")
_ONLY = ConfigDict(strict=True, extra="ignore")

LARGEST = 1e30
# How ``config_hash`` is taken (``config/identity.py``). 1 was a hash of every value and class path; records without a number are of it.
IDENTITY = 2


def bounded(value: float) -> float:
    """A measured value; infinite if it is larger than anything that can be reckoned with."""
    return math.copysign(math.inf, value) if abs(value) > LARGEST else value


Measured = Annotated[float, AfterValidator(bounded)]
Amount = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Least = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Named = Annotated[str, Field(max_length=200)]
Whole = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class Git(TypedDict, total=False):
    """The state of the code."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    commit: str | None
    dirty: bool | None


class Machine(TypedDict, total=False):
    """On what a run was made."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    gpus: list[str] | None
    cpus: int | None
    processor: str | None


class Attempt(TypedDict, total=False):
    """One attempt of a run."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    status: str
    config_hash: str | None
    started: str | None
    seconds: Amount | None
    host: str | None
    pid: Whole | None
    error: str | None
    git: Git | None
    environment: Machine | None


class Record(Attempt, total=False):
    """run.json."""

    earlier: list[Attempt]


class Interval(TypedDict):
    """In which a share probably is, by how many answers were right."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    low: Measured
    high: Measured
    total: Amount


class Ended(TypedDict, total=False):
    """How training ended."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    why: str | None
    step: Whole | None
    planned: Whole | None


class Results(TypedDict, total=False):
    """results.json. A metric may be infinite or no number: so ends a run that diverges."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    metrics: Required[Annotated[dict[Named, Measured], Field(max_length=5000)]]
    seconds: Required[Amount]
    name: str | None
    config_hash: str | None
    identity: int | None
    version: Named | None
    data: dict[str, Any] | None
    ended: Ended | None
    intervals: Annotated[dict[Named, Interval], Field(max_length=5000)] | None
    chance: Annotated[dict[Named, Measured | None], Field(max_length=5000)] | None
    parameters: Amount | None
    flops_per_token: Amount | None
    state_size: Amount | None
    steps: Amount | None
    tokens: Amount | None
    training_flops: Amount | None
    tokens_per_second: Amount | None
    peak_memory_bytes: Amount | None


class Target(TypedDict, total=False):
    """A node that names a class."""

    __pydantic_config__ = _ONLY  # type: ignore[misc]
    _target_: str | None


class Model(TypedDict, total=False):
    """What a table shows of a model."""

    __pydantic_config__ = _ONLY  # type: ignore[misc]
    dim: Whole | None
    depth: Whole | None
    pattern: str | None
    mixers: dict[str, Target | None] | None


class Canon(TypedDict, total=False):
    """Where the Canon layers are."""

    __pydantic_config__ = _ONLY  # type: ignore[misc]
    positions: str | None


class Optimizer(TypedDict, total=False):
    """What a table shows of an optimizer."""

    __pydantic_config__ = _ONLY  # type: ignore[misc]
    lr: Amount | None


class Settings(TypedDict, total=False):
    """What a table shows of config.yaml."""

    __pydantic_config__ = _ONLY  # type: ignore[misc]
    name: str | None
    seed: Whole | None
    model: Model | None
    position: Target | None
    canon: Canon | None
    optimizer: Optimizer | None


class ManifestJob(TypedDict):
    """One job of a sweep."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    name: str
    task: str
    variant: str
    settings: dict[str, Any]
    seed: Whole
    learning_rate: Amount
    folder: str
    command: str
    data: NotRequired[str]
    taking: NotRequired[dict[str, bool | int | float | str]]


class ManifestStatement(TypedDict):
    """What a sweep expects."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]
    better: str
    than: str
    by: NotRequired[Least]
    task: NotRequired[str | None]


class ManifestMatch(TypedDict):
    """In what variants were made equal."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    budget: str
    to: str
    change: str


class Published(TypedDict, total=False):
    """Under which names tasks and variants stand in published tables."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    tasks: dict[str, dict[str, str]] | None
    variants: dict[str, str | None] | None


class Manifest(TypedDict):
    """manifest.json: the plan of a sweep."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    name: str
    scale: str
    metrics: Annotated[dict[Named, Named], Field(max_length=100)]
    variants: Annotated[list[Named], Field(max_length=100)]
    expect: Annotated[list[ManifestStatement], Field(max_length=5_000)]
    jobs: Annotated[list[ManifestJob], Field(max_length=20_000)]
    title: NotRequired[str]
    note: NotRequired[str | None]
    source: NotRequired[str | None]
    selections: NotRequired[dict[str, str]]
    axes: NotRequired[dict[str, Any]]
    match: NotRequired[ManifestMatch | None]
    published: NotRequired[Published | None]
    command: NotRequired[str]


RECORD: TypeAdapter[Record] = TypeAdapter(Record)
RESULTS: TypeAdapter[Results] = TypeAdapter(Results)
SETTINGS: TypeAdapter[Settings] = TypeAdapter(Settings)
MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)
