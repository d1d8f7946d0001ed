"""Budgets that are equal: solves the width or the depth of a model for parameters, FLOPs per token or size of the state.

Two architectures of the same ``size`` are not equally large: a mixture of experts has many times the parameters, and attention remembers a
hundred times as much. A comparison is fair under a budget that it names:

    parameters   Backbone.count_parameters(): what is trained and stored, embeddings included
    flops        Backbone.flops_per_token(seq_len): what a forward pass costs
    state        Backbone.state_size(seq_len): what is remembered of seq_len tokens

>>> from src.sweeps.matching import match_model
>>> match_model(["model=gla5", "size=8L512D"], budget="parameters", target=["model=llama", "size=8L512D"]).overrides
['size.dim=528', 'size.attention.hidden_dim=1584', 'size.linear.hidden_dim=1056', 'size.gdn.head_dim=99']

*Width* scales all widths of the section ``size`` by one factor: every key there whose name ends in ``dim``. What the published sizes do
not scale with the width stays: the numbers of heads, and Mamba2's state width. The number of heads leaves only certain widths (rotary heads
must be even, GLA halves its keys): those that the constructors take, and with which a few tokens get through the model. Where even
the closest of them is off by more than 5%, as with many heads, and the feed-forward can make up for it with 2/3 to 3/2 of its width,
then it does.

*Depth* changes ``size.depth`` alone, in whole blocks.

All counts grow with both, so a bisection finds the closest candidate with some ten models on the meta device, which allocate nothing.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf

from src.components.backbone import Backbone
from src.config import ConfigError, suggest, to_plain
from src.config.building import build_model, model_from_config
from src.config.compose import compose_config

BUDGETS = ("parameters", "flops", "state")
CHANGES = ("width", "depth")
LARGEST = 64  # times the width or depth that the overrides describe
LARGEST_TRIAL = 100_000_000  # parameters of a model that is run to see whether it does
COARSE = 0.05  # off by more than this share, and the feed-forward is fitted as well, if that helps


@dataclass(frozen=True)
class Matched:
    """A model that was fitted to a budget."""

    overrides: list[str]  # to add to those of the model
    value: int  # what the fitted model has of the budget's unit
    target: int | float  # what it should have
    error: float  # value / target - 1
    parameters: int
    flops: int  # forward, per token, in sequences of seq_len tokens
    state: int  # numbers per sequence after seq_len tokens
    dim: int
    depth: int  # blocks, of which some models have more than size.depth


def match_model(
    overrides: list[str],
    *,
    budget: Literal["parameters", "flops", "state"],
    target: int | float | list[str],
    change: Literal["width", "depth"] = "width",
    seq_len: int = 2048,
) -> Matched:
    """Finds the width or depth at which a model comes closest to a budget.

    Args:
        overrides: of ``configs/train.yaml``, such as ``["model=gla", "size=8L512D", "canon.positions=AbCD"]``. Without
            ``model.vocab_size`` among them the vocabulary is the published one of the size, as in ``build_model``; give it to this
            model and to the target where a run will have another one.
        budget: what should be equal.
        target: how much of it (parameters, operations per token, numbers of the state), or the overrides of the model to equal.
        change: what may change.
        seq_len: tokens of a sequence, for FLOPs and state.

    Returns:
        The closest candidate, with what remains of the difference in ``error``: it may be large where candidates are far apart,
        as with depths of few blocks.

    Raises:
        ConfigError: for arguments out of range, overrides that describe no model, a budget that does not depend on what may
            change, or a target outside what the smallest model and one of 64 times the width or depth have.
        hydra.errors.HydraException: for overrides that name nothing in ``configs/``.
    """
    _check_arguments(overrides, budget, change, seq_len)
    goal = _goal(target, budget, seq_len)
    config = compose_config(overrides)
    _net(config, {})  # raises if the overrides describe no model

    def count(settings: dict[str, int]) -> int | None:
        try:
            return _summary(_net(config, settings), seq_len)[budget]
        except ValueError:  # a ConfigError among them: the constructors refuse this width
            return None

    size = config.size
    runs = _Trial(config)
    if change == "depth":
        line = _Line(lambda i: {"size.depth": i}, count, size.depth, 1, LARGEST * size.depth)
    else:
        unit = _unit(size, lambda settings: count(settings) is not None and runs(settings))
        start = size.dim // unit
        line = _Line(lambda i: _widths(size, i * unit), count, start, 1, LARGEST * start)
    low, high = line.bracket(goal)
    if not line[low] <= goal <= line[high]:
        raise _out_of_reach(line, low if line[low] > goal else high, goal, budget, change)
    best = line.closest(goal, low, high)
    while change == "width" and not runs(line.settings(best)) and line.refuse(best):
        best = line.closest(goal, *line.bracket(goal))
    settings = line.settings(best)
    if change == "width" and budget != "state" and abs(line[best] / goal - 1) > COARSE:
        settings |= _fitted_feedforward(config, settings, count, goal)
    added = [f"{key}={value}" for key, value in settings.items()]
    # Counted afresh from the overrides, as whoever uses them will build it.
    found = _summary(build_model([*overrides, *added], device="meta"), seq_len)
    return Matched(overrides=added, value=found[budget], target=goal, error=found[budget] / goal - 1, **found)


class _Line:
    """Candidates numbered in growing order from ``first`` to ``last``, some of which the constructors refuse."""

    def __init__(
        self,
        settings: Callable[[int], dict[str, int]],
        count: Callable[[dict[str, int]], int | None],
        start: int,
        first: int,
        last: int,
    ):
        self.settings, self.start, self.first, self.last = settings, start, first, last
        self._count, self._known = count, {}

    def __getitem__(self, i: int) -> int:
        """What candidate i, which must be an accepted one, has of the budget."""
        value = self._look(i)
        if value is None:
            raise ConfigError(f"{self.describe(i)}: the model cannot be built like this")
        return value

    def _look(self, i: int) -> int | None:
        if i not in self._known:
            self._known[i] = self._count(self.settings(i))
        return self._known[i]

    def refuse(self, i: int) -> bool:
        """Takes a candidate out; not the one that everything starts from, which says whether it does."""
        if i != self.start:
            self._known[i] = None
        return i != self.start

    def describe(self, i: int) -> str:
        """Its first setting, such as size.dim=64."""
        key, value = next(iter(self.settings(i).items()))
        return f"{key}={value}"

    def accepted(self, i: int, below: int, above: int) -> int | None:
        """The accepted candidate nearest to i out of those strictly between ``below`` and ``above``, or None."""
        for distance in range(above - below):
            for j in (i + distance, i - distance):
                if below < j < above and self._look(j) is not None:
                    return j
        return None

    def bracket(self, goal: float) -> tuple[int, int]:
        """Two candidates with the goal between them, by doubling or halving; if there are none, two at the end that is nearer to it."""
        low = high = self.start
        while self[high] < goal and (i := self.accepted(min(2 * high, self.last), high, self.last + 1)) is not None:
            low, high = high, i
        while self[low] > goal and (i := self.accepted(max(low // 2, self.first), self.first - 1, low)) is not None:
            low, high = i, low
        return low, high

    def closest(self, goal: float, low: int, high: int) -> int:
        """The candidate closest to the goal out of those from ``low`` to ``high``, by bisection."""
        while (middle := self.accepted((low + high) // 2, low, high)) is not None:
            low, high = (middle, high) if self[middle] <= goal else (low, middle)
        return min(low, high, key=lambda i: abs(self[i] - goal))


class _Trial:
    """Whether a model of other widths runs: a constructor may accept what its forward pass cannot cut into heads.

    A few tokens go through a model of one turn of the pattern, on the CPU. Models of which even that is too large, and those that
    do not run here at the width that they have, because they need a GPU, are taken at their constructors' word.
    """

    def __init__(self, config: DictConfig):
        self.config = config
        self._known: dict[str, str | None] = {}  # settings -> why it does not run

    def __call__(self, settings: dict[str, int]) -> bool:
        wrong = self._wrong(settings)
        if wrong is None or self._wrong({}) is not None:
            return True
        key, value = next(iter(settings.items()))
        warnings.warn(f"{key}={value}: the model can be built and cannot run ({wrong}); passed over", stacklevel=3)
        return False

    def _wrong(self, settings: dict[str, int]) -> str | None:
        name = repr(settings)
        if name not in self._known:
            self._known[name] = _why_it_does_not_run(self.config, settings)
        return self._known[name]


def _why_it_does_not_run(config: DictConfig, settings: dict[str, int]) -> str | None:
    model = _model_config(config, settings) | {"vocab_size": 2}
    model["depth"] = min(model["depth"], len(str(model.get("pattern") or "x")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if model_from_config(model, "meta").count_parameters() > LARGEST_TRIAL:
            return None
        try:
            net = model_from_config(model, "cpu").eval()
            with torch.inference_mode():
                net(torch.zeros(1, 5, dtype=torch.long))
        except Exception as error:  # whatever a mixer of somebody else raises
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return None


def _model_config(config: DictConfig, settings: dict[str, int]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    for key, value in settings.items():
        OmegaConf.update(config, key, value)
    return to_plain(config.model)


def _net(config: DictConfig, settings: dict[str, int]) -> Backbone:
    """The model of a composed configuration with these settings, on the meta device. (Composing anew takes four times as long.)"""
    model_config = _model_config(config, settings)
    if model_config["vocab_size"] is None:
        model_config["vocab_size"] = config.size.vocab_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said of every candidate, the model that is returned says once
        return model_from_config(model_config, "meta")


def _summary(net: Backbone, seq_len: int) -> dict[str, int]:
    return {
        "parameters": net.count_parameters(),
        "flops": net.flops_per_token(seq_len),
        "state": net.state_size(seq_len),
        "dim": net.dim,
        "depth": net.depth,
    }


def _step(width: int) -> int:
    """Large widths that are multiples of 8, as tensor cores want them, stay so."""
    return 8 if width >= 256 and width % 8 == 0 else 1


def _widths(size: DictConfig, dim: int) -> dict[str, int]:
    """Every key of the size whose name ends in ``dim``, scaled as the model width is when it becomes ``dim``."""
    found = {"size.dim": dim}
    sections = {"size": size} | {f"size.{key}": part for key, part in size.items() if isinstance(part, DictConfig)}
    for path, section in sections.items():
        for key, width in section.items():
            if str(key).endswith("dim") and isinstance(width, int) and section is not size:
                step = _step(width)
                found[f"{path}.{key}"] = step * max(1, round(width * dim / (size.dim * step)))
    return found


def _unit(size: DictConfig, accepted: Callable[[dict[str, int]], bool]) -> int:
    """Of what the width must be a multiple. The present width is one, so only its divisors can be meant: the first that can be added."""
    step = _step(size.dim)
    for unit in range(step, size.dim, step):
        if size.dim % unit == 0 and accepted(_widths(size, size.dim + unit)):
            return unit
    return size.dim


def _fitted_feedforward(
    config: DictConfig, settings: dict[str, int], count: Callable[[dict[str, int]], int | None], goal: float
) -> dict[str, int]:
    """The width of the feed-forward, from 2/3 to 3/2 of what it is, that comes closest; nothing if there is none, or none close enough."""
    feedforward: Any = _net(config, settings).blocks[0].feedforward
    if feedforward is None:
        return {}
    key, width = "model.feedforward.hidden_dim", int(feedforward.hidden_dim)
    step = _step(width)
    first, last = -(-2 * width // (3 * step)), 3 * width // (2 * step)
    line = _Line(lambda i: {key: i * step, **settings}, count, width // step, first, last)
    best = line.closest(goal, *line.bracket(goal))
    return {key: best * step} if abs(line[best] / goal - 1) <= COARSE else {}


def _goal(target: int | float | list[str], budget: str, seq_len: int) -> int | float:
    if isinstance(target, list | tuple):
        target = _summary(build_model(list(target), device="meta"), seq_len)[budget]
    if isinstance(target, bool) or not isinstance(target, Real) or not 0 < target < math.inf:
        raise ConfigError(
            f"target={target!r}: a positive number, or the list of overrides of a model that has {budget}"
        )
    return target


def _check_arguments(overrides: Any, budget: str, change: str, seq_len: int) -> None:
    if isinstance(overrides, str):
        raise ConfigError(f'overrides={overrides!r}: a list, such as ["model=gla", "size=8L512D"]')
    for name, value, known in (("budget", budget, BUDGETS), ("change", change, CHANGES)):
        if value not in known:
            raise ConfigError(f"{name}={value!r}: no such {name}; {suggest(str(value), known)}")
    if seq_len < 1:
        raise ConfigError(f"seq_len={seq_len}: at least 1")


def _out_of_reach(line: _Line, end: int, goal: float, budget: str, change: str) -> ConfigError:
    """``end`` is the candidate that is nearest to the goal, and not near enough."""
    if line[end] == line[line.start]:
        return ConfigError(
            f"change={change!r}: {budget} of this model are {line[end]:,} at {line.describe(line.start)} and at {line.describe(end)} "
            f"alike, so {goal:,} cannot be reached; choose another budget or change, or leave out overrides that fix its size"
        )
    bound = "no less than" if line[end] > goal else "no more than"
    return ConfigError(
        f"target={goal:,}: by its {change} this model comes to {bound} {line[end]:,} ({budget}, at {line.describe(end)}); choose a "
        f"target that it reaches, another size to start from, or what else may change out of {', '.join(CHANGES)}"
    )
