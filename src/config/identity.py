"""What names a computation: what its configuration says beyond the defaults, under names that no refactoring changes.

``described`` brings a resolved configuration into one form: classes by their declared names (``names.py``), arguments only where they
differ from the default in the class's signature, numbers that are equal written equally, no folder of this machine, and nothing of where
results are written, how a run is watched and what it is called. ``experiment_hash`` is the hash of that form, and two runs may share a
checkpoint if their forms differ in what may differ (``checkpoints/resume.py``).

So a new option changes no hash as long as its default is the old behaviour. A default must not be changed: runs of before and after
would bear the same name (``tests/trust/test_names.py`` holds all of them). Where one has to, declare another class.

Callbacks and plugins are left out one by one, by name: one that is not known to be a mere watcher may change the weights, and counts.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from functools import lru_cache
from typing import Any

from src.config.names import former_paths, name_of
from src.config.registry import class_of, section_of
from src.config.schema import PARTIAL, TARGET, to_plain
from src.support.errors import ConfigError

_LEFT_OUT = (
    *("paths", "logger", "callbacks", "name", "tags", "ckpt_path", "optimized_metric", "compare", "hydra"),
    "activation_checkpointing",  # computes the same again, bit for bit
    *("size", "position", "canon"),  # the model's section refers to them, and they say nothing by themselves
)
_LEFT_OUT_OF_TRAINER = (*("default_root_dir", "callbacks", "logger", "log_every_n_steps", "plugins", "profiler"),)
# Of the keys that are no class's arguments.
_DEFAULTS = {"train": True, "test": True, "compile": False}

# Callbacks that look, write and stop in time for another attempt to go on; none of them touches a weight.
WATCHERS = {
    *("checkpoints", "config_agreement", "heartbeat", "preemption", "profile", "progress", "progress_bar"),
    *("progress_lines", "throughput"),
    *(f"lightning.{name}" for name in ("DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary")),
    *(f"lightning.{name}" for name in ("OnExceptionCheckpoint", "ProgressBar", "RichModelSummary", "RichProgressBar")),
    *(f"lightning.{name}" for name in ("TQDMProgressBar", "ThroughputMonitor")),
}


def config_hash(config: Any) -> str:
    """Twelve hexadecimal digits that differ when any resolved value differs."""
    text = json.dumps(to_plain(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def experiment_hash(plain: dict[str, Any]) -> str:
    """The hash of what a run computes: the same in any folder, on any rank, under any name, and in any later version.

    Args:
        plain: a run's resolved configuration, before the data has filled in ``model.vocab_size``.
    """
    return config_hash(described(plain))


def described(plain: dict[str, Any]) -> dict[str, Any]:
    """The form of a resolved configuration of which the hash is taken; see the head of this file."""
    form = {key: _form(value, key) for key, value in computed(plain).items()}
    return {key: value for key, value in form.items() if not (key in _DEFAULTS and value is _DEFAULTS[key])}


def computed(plain: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that decides what is computed, free of folders, with every value that it has."""
    kept = {key: value for key, value in plain.items() if key not in _LEFT_OUT}
    trainer = plain.get("trainer") or {}
    kept["trainer"] = {key: value for key, value in trainer.items() if key not in _LEFT_OUT_OF_TRAINER}
    if plugins := _plugins(trainer.get("plugins")):
        kept["trainer"]["plugins"] = plugins
    if callbacks := {name: node for name, node in (plain.get("callbacks") or {}).items() if _changes_numbers(node)}:
        kept["callbacks"] = callbacks
        if any(str(node.get("monitor")).startswith("train/") for node in callbacks.values() if isinstance(node, dict)):
            # What is logged of training is all that a callback knows of it.
            kept["trainer"]["log_every_n_steps"] = trainer.get("log_every_n_steps")
    folders = {str(value): f"<{key}>" for key, value in (plain.get("paths") or {}).items() if value}
    return _placeless(kept, folders)


def changed_data(recorded: Any, expected: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between the data that results were obtained on and those that there are now.

    Args:
        recorded: what ``results.json`` says of the data.
        expected: see ``StreamDataModule.expected_fingerprint``.
    """
    known = recorded if isinstance(recorded, dict) else {}
    now = json.loads(json.dumps(expected))  # as a file has it: lists, no tuples
    return {key: (known[key], value) for key, value in now.items() if key in known and known[key] != value}


def with_names(node: Any, where: str = "") -> Any:
    """A configuration in which classes that have declared a name bear it: what is kept in checkpoints."""
    if isinstance(node, list):
        return [with_names(item, where) for item in node]
    if not isinstance(node, dict):
        return node
    named = {key: with_names(value, f"{where}.{key}" if where else str(key)) for key, value in node.items()}
    if TARGET in node and "." not in (name := target_name(node[TARGET], where)):
        named[TARGET] = name
    return named


def target_name(target: Any, where: str) -> str:
    """The name of the class that a ``_target_`` means; as it is written, for what this version does not know."""
    made = _class(str(target), where.split(".", maxsplit=1)[0])
    return former_paths().get(str(target), str(target)) if made is None else name_of(made)


@lru_cache(maxsize=1024)
def _class(target: str, section: str) -> type[Any] | None:
    try:
        return class_of(target, section, section_of(section))
    except ConfigError:  # a class of another version, or of somebody else: its values stand for themselves
        return None


@lru_cache(maxsize=1024)
def defaults_of(made: type[Any]) -> dict[str, Any]:
    """Arguments of a class that may be left out -> their values then."""
    parameters = inspect.signature(made).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def _form(node: Any, where: str) -> Any:
    """A node in the form that is hashed."""
    if isinstance(node, list | tuple):
        return [_form(item, where) for item in node]
    if isinstance(node, float) and node.is_integer():
        return int(node)  # 1.0 and 1 are the same number
    if not isinstance(node, dict):
        return node
    values = {key: _form(value, f"{where}.{key}") for key, value in node.items() if key not in (TARGET, PARTIAL)}
    if TARGET not in node:
        return values
    made = _class(str(node[TARGET]), where.split(".", maxsplit=1)[0])
    if made is not None:
        if (one_form := getattr(made, "one_form", None)) is not None:
            values = one_form(values)
        defaults = defaults_of(made)
        values = {key: value for key, value in values.items() if not _is_default(value, key, defaults)}
    return {TARGET: target_name(node[TARGET], where), **values}


def _is_default(value: Any, key: str, defaults: dict[str, Any]) -> bool:
    if key not in defaults:
        return value is None  # what must be given, and is left to be filled in
    default = _form(defaults[key], "")
    # True is 1 to Python, and not to a reader.
    return value == default and isinstance(value, bool) == isinstance(default, bool)


def _plugins(given: Any) -> list[Any]:
    """All but the one that writes checkpoints."""
    nodes = given if isinstance(given, list) else [given]
    return [node for node in nodes if node and _name(node, "trainer") != "checkpoint_files"]


def _changes_numbers(node: Any) -> bool:
    if not isinstance(node, dict) or (name := _name(node, "callbacks")) in WATCHERS:
        return False
    if name == "guard":  # one that warns or stops leaves a finished run as it would have been
        return bool({"skip", "rollback"} & {node.get("nonfinite"), node.get("spike")})
    return True


def _name(node: Any, section: str) -> str | None:
    return target_name(node.get(TARGET), section) if isinstance(node, dict) else None


def _placeless(node: Any, folders: dict[str, str]) -> Any:
    """Paths below the run's own folders as paths below their names."""
    if isinstance(node, dict):
        return {key: _placeless(value, folders) for key, value in node.items()}
    if isinstance(node, list):
        return [_placeless(value, folders) for value in node]
    if isinstance(node, str):
        # The longest folder first: one may lie in another.
        for folder in sorted(folders, key=len, reverse=True):
            if node == folder or node.startswith(folder + "/"):
                return folders[folder] + node[len(folder) :]
    return node
