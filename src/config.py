"""Configuration: from YAML to objects, with errors that a stranger can act on.

YAML selects a class by ``_target_`` and sets its arguments; the class signature is the schema. ``instantiate`` checks every node of
a configuration against the signatures *before* anything is built: unknown keys, missing keys and wrong types are errors that name
the key and list what exists. Only classes of this project and of a few libraries may be named.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import typing
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError

ALLOWED_PREFIXES = ("src.", "lightning.", "torch.optim.", "torchmetrics.")
_SPECIAL_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


class ConfigError(ValueError):
    """The user asked for something that does not exist or cannot be; the message says what would be valid."""


class RunError(RuntimeError):
    """Something that went wrong in a run and of which the message says all there is to know: shown without a traceback."""


def to_plain(config: Any) -> Any:
    """Resolves a configuration to dicts, lists, strings, numbers and None."""
    return OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig | ListConfig) else config


def check_complete(config: DictConfig) -> None:
    """Raises a ConfigError that names the values which the user still has to give (``???`` in YAML)."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{', '.join(missing)}: must be given, as in {missing[0]}=...")


def config_hash(config: Any) -> str:
    """Twelve hexadecimal digits that differ when any resolved value differs."""
    text = json.dumps(to_plain(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# Where things are written, how a run is watched and what it is called: none of it changes a number.
_NO_MATTER = (
    *("paths", "logger", "callbacks", "name", "tags", "ckpt_path", "optimized_metric", "compare", "hydra"),
    "activation_checkpointing",  # computes the same again, bit for bit
)


def experiment_hash(plain: dict[str, Any]) -> str:
    """The hash of what a run computes: the same in any folder, on any rank and under any name.

    Args:
        plain: a run's resolved configuration, before the data has filled in ``model.vocab_size``.
    """
    folders = {str(value): f"<{key}>" for key, value in (plain.get("paths") or {}).items() if value}

    def placeless(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: placeless(value) for key, value in node.items()}
        if isinstance(node, list):
            return [placeless(value) for value in node]
        if isinstance(node, str):
            # The longest folder first: one may lie in another.
            for folder in sorted(folders, key=len, reverse=True):
                if node == folder or node.startswith(folder + "/"):
                    return folders[folder] + node[len(folder) :]
        return node

    kept = {key: value for key, value in plain.items() if key not in _NO_MATTER}
    kept["trainer"] = {
        key: value
        for key, value in (plain.get("trainer") or {}).items()
        if key not in ("default_root_dir", "callbacks", "logger", "log_every_n_steps", "plugins", "profiler")
    }
    return config_hash(placeless(kept))


def suggest(word: str, known: Iterable[str]) -> str:
    """A clause that names the closest known word, if one is close, and lists all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"There are: {', '.join(known)}"


def instantiate(config: Any, where: str = "", **arguments: Any) -> Any:
    """Builds what a configuration node describes.

    Args:
        config: a mapping with ``_target_`` (nested nodes with their own), or None, which stays None.
        where: path of the node in the whole configuration, for error messages.
        arguments: further arguments of the outermost target.

    Raises:
        ConfigError: before anything is built, for targets, keys and types that are not allowed; or with the message of a
            constructor that rejected its arguments.
    """
    config = to_plain(config)
    if config is None:
        return None
    check(config, where, set(arguments))
    try:
        return hydra_instantiate(config, _convert_="all", **arguments)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            raise cause from error
        if isinstance(cause, ValueError | TypeError | OSError | ImportError | MisconfigurationException):
            said = where and str(cause).startswith(f"{where}.")  # it names its key by itself
            raise ConfigError(str(cause) if said else f"{where or config.get('_target_')}: {cause}") from error
        raise


def check(node: Any, where: str = "", given: set[str] | None = None) -> None:
    """Checks a plain configuration node, and all below it, against the signatures they name.

    Args:
        node: dict, list or value.
        where: path of the node.
        given: arguments that will be added when the node is built.

    Raises:
        ConfigError: for the first key that does not fit.

    Whole numbers written as floats (1e3) become integers in ``node`` where the signature wants integers.
    """
    if isinstance(node, list):
        for i, item in enumerate(node):
            check(item, f"{where}[{i}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        _check_call(node, where or node["_target_"], given or set())
    for key, value in node.items():
        check(value, f"{where}.{key}" if where else key)


def resolve_target(target: str, where: str = "") -> Any:
    """Imports what a ``_target_`` names, if it is allowed to be named."""
    if not target.startswith(ALLOWED_PREFIXES):
        raise ConfigError(f"{where}._target_={target!r}: only targets under {', '.join(ALLOWED_PREFIXES)} may be built")
    module_name, _, name = target.rpartition(".")
    try:
        return getattr(import_module(module_name), name)
    except ImportError as error:
        raise ConfigError(f"{where}._target_={target!r} cannot be imported: {error}") from error
    except AttributeError:
        public = [n for n in vars(import_module(module_name)) if not n.startswith("_")]
        raise ConfigError(f"{where}._target_={target!r} does not exist; {suggest(name, public)}") from None


def _check_call(node: dict[str, Any], where: str, given: set[str]) -> None:
    target = resolve_target(node["_target_"], where)
    parameters = inspect.signature(target).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and n != "self"}
    keys = [key for key in node if key not in _SPECIAL_KEYS]
    for key in keys:
        if key not in named and not takes_any:
            raise ConfigError(f"{where}.{key}: no such key; {suggest(key, named)}")
    if not node.get("_partial_"):
        missing = [n for n, p in named.items() if p.default is p.empty and n not in keys and n not in given]
        if missing:
            raise ConfigError(f"{where}: {missing[0]!r} must be given")
    hints = _hints(target)
    for key in keys:
        if key in hints:
            node[key] = _checked_value(node[key], hints[key], f"{where}.{key}")


def _hints(target: Any) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # annotations that exist for type checkers only
        return {}


def _checked_value(value: Any, hint: Any, where: str) -> Any:
    """Checks values that YAML can hold; nodes that are built into objects are checked by their own signature.

    Returns:
        The value; whole numbers that were written as floats, such as 1e3, as integers where integers are wanted.
    """
    if _holds_target(value) or hint is Any:
        return value
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(strict=False, arbitrary_types_allowed=True))
    except Exception:  # pydantic has no schema for this annotation (a protocol, a callable's own type)
        try:
            adapter = TypeAdapter(hint)
        except Exception:
            return value
    try:
        read = adapter.validate_python(value)
    except ValidationError as error:
        told = (".".join(map(str, problem["loc"])) for problem in error.errors())
        messages = (
            f"{place}: {problem['msg']}" if place and isinstance(value, list | dict) else problem["msg"]
            for place, problem in zip(told, error.errors(), strict=True)
        )
        expected = "; ".join(dict.fromkeys(messages))
        raise ConfigError(f"{where}={value!r}: {expected}") from None
    if isinstance(value, bool) and not isinstance(read, bool):
        raise ConfigError(f"{where}={value!r}: a number, not true or false")
    if type(value) is float and type(read) is int:
        return read
    return list(read) if isinstance(value, list) and isinstance(read, list | tuple) else value


def _holds_target(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(_holds_target(v) for v in value.values())
    return isinstance(value, list) and any(_holds_target(v) for v in value)
