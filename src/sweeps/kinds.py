"""Holds the file of a sweep against what its parts should be, with messages that name the part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from src.config import ConfigError
from src.sweeps.statements import Match, Statement

OVERRIDES = "overrides, [seed=1, model=gla]"
SAID = "{better: ..., than: ..., by: 0.1}"


def check_kinds(sweep: Any) -> None:
    """Checks every part of a sweep; those of a scale are checked when the sweep is at that scale.

    Raises:
        ConfigError: names the first part that is something else.
    """
    for name in ("settings", "architectures", "axes", "metrics", "published", "scales"):
        value = getattr(sweep, name)
        _demand(_is_mapping(value), f"sweep.{name}", value, "a mapping, name: ...")
    for name in ("base", "overrides"):
        check_texts(f"sweep.{name}", getattr(sweep, name), OVERRIDES)
    for name in ("title", "metric"):
        _demand(isinstance(getattr(sweep, name), str), f"sweep.{name}", getattr(sweep, name), "a text")
    for name in ("select", "source", "note"):
        _demand(isinstance(getattr(sweep, name), str | None), f"sweep.{name}", getattr(sweep, name), "a text")
    for name, value in sweep.metrics.items():
        _demand(isinstance(value, str), f"sweep.metrics.{name}", value, "the name of a metric, test/accuracy")
    for name, value in sweep.scales.items():
        _demand(_is_mapping(value), f"sweep.scales.{name}", value, "a mapping of what is different at that scale")
    _check_choices(sweep)
    _demand(isinstance(sweep.expect, list), "sweep.expect", sweep.expect, f"a list of statements, [{SAID}]")
    for number, item in enumerate(sweep.expect):
        _demand(isinstance(item, Statement | Mapping), f"sweep.expect[{number}]", item, f"a mapping, {SAID}")
    match: Any = sweep.match
    _demand(isinstance(match, Match | Mapping | None), "sweep.match", match, "{budget: parameters, to: ...}")


def _check_choices(sweep: Any) -> None:
    for name in ("tasks", "variants"):
        value = getattr(sweep, name)
        if isinstance(value, list):
            check_texts(f"sweep.{name}", value, "names, or a mapping from names to overrides")
        else:
            _demand(_is_mapping(value), f"sweep.{name}", value, "a list of names, or a mapping from names to overrides")
    for name in ("settings", "architectures", "tasks", "variants"):
        value = getattr(sweep, name)
        for key in value if isinstance(value, Mapping) else ():
            check_texts(f"sweep.{name}.{key}", value[key], OVERRIDES)


def check_texts(where: str, value: Any, what: str) -> None:
    """Raises a ConfigError for anything but a list of texts."""
    _demand(isinstance(value, list) and all(isinstance(item, str) for item in value), where, value, f"a list of {what}")


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _demand(is_so: bool, where: str, value: Any, what: str) -> None:
    if not is_so:
        raise ConfigError(f"{where}={value!r}: {what}")
