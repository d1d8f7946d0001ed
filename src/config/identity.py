"""What names a computation: the hash of a run's configuration, without what changes no number.

Where things are written, how a run is watched and what it is called are left out. Callbacks and plugins are left out one by one, by
name: one that is not known to be a mere watcher may change the weights, and counts.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from src.config.registry import MOVED
from src.config.schema import to_plain

_LEFT_OUT = (
    *("paths", "logger", "callbacks", "name", "tags", "ckpt_path", "optimized_metric", "compare", "hydra"),
    "activation_checkpointing",  # computes the same again, bit for bit
)
_LEFT_OUT_OF_TRAINER = (*("default_root_dir", "callbacks", "logger", "log_every_n_steps", "plugins", "profiler"),)

# Callbacks that look, write and stop in time for another attempt to go on; none of them touches a weight.
WATCHERS = {
    *(f"src.callbacks.{name}" for name in ("agreement.ConfigAgreement", "checkpoints.Checkpoints")),
    *(f"src.callbacks.{name}" for name in ("heartbeat.Heartbeat", "preemption.Preemption", "profile.Profile")),
    *(f"src.callbacks.{name}" for name in ("progress.Progress", "progress.Bar", "progress.Lines")),
    "src.callbacks.throughput.Throughput",
    *(
        f"lightning.pytorch.callbacks.{name}"
        for name in ("DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint")
    ),
    *(f"lightning.pytorch.callbacks.{name}" for name in ("ModelSummary", "OnExceptionCheckpoint", "ProgressBar")),
    *(f"lightning.pytorch.callbacks.{name}" for name in ("RichModelSummary", "RichProgressBar", "TQDMProgressBar")),
    "lightning.pytorch.callbacks.ThroughputMonitor",
}
GUARD = "src.callbacks.guard.Guard"
_CHECKPOINT_FILES = "src.checkpoints.io.CheckpointFiles"

# Classes keep, in the hash, the name under which they were first known.
_FIRST_NAMES = {now: before for before, now in MOVED.items()}


def config_hash(config: Any) -> str:
    """Twelve hexadecimal digits that differ when any resolved value differs."""
    text = json.dumps(to_plain(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def experiment_hash(plain: dict[str, Any]) -> str:
    """The hash of what a run computes: the same in any folder, on any rank and under any name.

    Args:
        plain: a run's resolved configuration, before the data has filled in ``model.vocab_size``.
    """
    return config_hash(computed(plain))


def computed(plain: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that decides what is computed, free of folders: what the hash is taken of."""
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


def _plugins(given: Any) -> list[Any]:
    """All but the one that writes checkpoints."""
    nodes = given if isinstance(given, list) else [given]
    return [
        node for node in nodes if node and not (isinstance(node, dict) and node.get("_target_") == _CHECKPOINT_FILES)
    ]


def _changes_numbers(node: Any) -> bool:
    if not isinstance(node, dict) or node.get("_target_") in WATCHERS:
        return False
    if node.get("_target_") == GUARD:  # one that warns or stops leaves a finished run as it would have been
        return bool({"skip", "rollback"} & {node.get("nonfinite"), node.get("spike")})
    return True


def _placeless(node: Any, folders: dict[str, str]) -> Any:
    """Paths below the run's own folders as paths below their names, and classes under their first names."""
    if isinstance(node, dict):
        return {key: _placeless(value, folders) for key, value in node.items()}
    if isinstance(node, list):
        return [_placeless(value, folders) for value in node]
    if isinstance(node, str):
        # The longest folder first: one may lie in another.
        for folder in sorted(folders, key=len, reverse=True):
            if node == folder or node.startswith(folder + "/"):
                return folders[folder] + node[len(folder) :]
        return _FIRST_NAMES.get(node, node)
    return node
