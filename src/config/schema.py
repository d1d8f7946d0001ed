"""From YAML to objects, with errors that a stranger can act on.

YAML selects a class by ``_target_`` and sets its arguments; the class signature is the schema. ``instantiate`` checks every node of
a configuration against the signatures *before* anything is built: unknown keys, missing keys and wrong types are errors that name
the key and list what exists. Which classes may be named where, ``registry.py`` says; a node may only stand where the signature wants an
object of its class.
"""

from __future__ import annotations

import collections.abc
import inspect
import reprlib
import types
import typing
from functools import partial
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError

from src.config.registry import Section, class_of, imported, section_of
from src.support.errors import ConfigError, suggest

TARGET, PARTIAL = "_target_", "_partial_"
DEEPEST = 32  # levels of a configuration; ours have seven


def to_plain(config: Any) -> Any:
    """Resolves a configuration to dicts, lists, strings, numbers and None."""
    return OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig | ListConfig) else config


def check_complete(config: DictConfig) -> None:
    """Raises a ConfigError that names the values which the user still has to give (``???`` in YAML)."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{', '.join(missing)}: must be given, as in {missing[0]}=...")


def instantiate(config: Any, where: str, **arguments: Any) -> Any:
    """Builds what a configuration node describes.

    Args:
        config: a mapping with ``_target_`` (nested nodes with their own), or None, which stays None.
        where: path of the node in the whole configuration; its section decides what may be built, and messages name it.
        arguments: further arguments of the outermost target.

    Raises:
        ConfigError: before anything is built, for targets, keys and types that are not allowed; or with the message of a
            constructor that rejected its arguments.
    """
    config = to_plain(config)
    if config is None:
        return None
    if not isinstance(config, dict) or TARGET not in config:
        raise ConfigError(f"{where}={_shown(config)}: a mapping with {TARGET}, which names a class")
    check(config, where, set(arguments))
    try:
        return _built(config, section_of(where), where, arguments)
    except ConfigError:
        raise
    except Exception as error:
        # Lightning's own is known by its name: importing it would import PyTorch, which a report does without.
        known = isinstance(error, ValueError | TypeError | OSError | ImportError)
        if not known and type(error).__name__ != "MisconfigurationException":
            raise
        said = str(error).startswith(f"{where}.")  # it names its key by itself
        raise ConfigError(str(error) if said else f"{where}: {error}") from error


def _built(node: Any, section: Section, where: str, arguments: dict[str, Any]) -> Any:
    """Objects for the nodes in ``node``, copies of the containers, and values as they are: no string is looked into."""
    if isinstance(node, list):
        return [_built(item, section, where, {}) for item in node]
    if not isinstance(node, dict):
        return node
    values = {key: _built(value, section, where, {}) for key, value in node.items() if key not in (TARGET, PARTIAL)}
    if TARGET not in node:
        return values
    built = class_of(node[TARGET], where, section)
    return partial(built, **values, **arguments) if node.get(PARTIAL) else built(**values, **arguments)


def check(node: Any, where: str, given: set[str] | None = None) -> None:
    """Checks a section of a plain configuration, or a node of one, against the registry and the signatures that it names.

    Args:
        node: dict, list or value.
        where: path of the node; where it is the name of a section, that section's own object is expected.
        given: arguments that will be added when the node is built.

    Raises:
        ConfigError: for the first key that does not fit.

    Whole numbers written as floats (1e3) become integers in ``node`` where the signature wants integers.
    """
    if node is None:
        return
    section = section_of(where)
    if section.named and "." not in where:
        if not isinstance(node, dict):
            raise ConfigError(f"{where}={_shown(node)}: a mapping from names to objects")
        for name, item in node.items():
            check(item, f"{where}.{name}", given)
        return
    if isinstance(node, dict) and TARGET in node:
        _check_root(node, where, section)
    _check_node(node, where, section, given or set(), 0)


def _check_root(node: dict[str, Any], where: str, section: Section) -> None:
    found = class_of(node[TARGET], where, section)
    if not any(issubclass(found, imported(root)) for root in section.roots):
        wanted = " or ".join(root.rpartition(".")[2] for root in section.roots)
        raise ConfigError(f"{where}.{TARGET}={node[TARGET]!r}: a {found.__name__}, where a {wanted} belongs")
    if bool(node.get(PARTIAL)) is not section.partial:
        raise ConfigError(f"{where}.{PARTIAL}: must be {str(section.partial).lower()} here")


def _check_node(node: Any, where: str, section: Section, given: set[str], depth: int) -> None:
    if depth > DEEPEST:
        raise ConfigError(f"{where[:200]}: nested more than {DEEPEST} levels deep")
    if isinstance(node, list):
        for i, item in enumerate(node):
            _check_node(item, f"{where}[{i}]", section, set(), depth + 1)
    if not isinstance(node, dict):
        return
    for key in node:
        if not isinstance(key, str) or (key.startswith("_") and key not in (TARGET, PARTIAL)):
            raise ConfigError(f"{where}.{key}: no such key; arguments are given by name")
    if TARGET in node:
        _check_call(node, where, section, given, depth)
    for key, value in node.items():
        _check_node(value, f"{where}.{key}", section, set(), depth + 1)


def _check_call(node: dict[str, Any], where: str, section: Section, given: set[str], depth: int) -> None:
    target = class_of(node[TARGET], where, section)
    if not isinstance(node.get(PARTIAL, False), bool):
        raise ConfigError(f"{where}.{PARTIAL}={node[PARTIAL]!r}: true or false")
    parameters = inspect.signature(target).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and n != "self"}
    keys = [key for key in node if key not in (TARGET, PARTIAL)]
    for key in keys:
        if key not in named and not takes_any:
            raise ConfigError(f"{where}.{key}: no such key; {suggest(key, named)}")
    if not node.get(PARTIAL):
        missing = [n for n, p in named.items() if p.default is p.empty and n not in keys and n not in given]
        if missing:
            raise ConfigError(f"{where}: {missing[0]!r} must be given")
    hints = _hints(target)
    for key in keys:
        # Where nothing is known of an argument, it is no object.
        node[key] = _checked_value(node[key], hints.get(key, inspect.Parameter.empty), f"{where}.{key}", section, depth)


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__)
    except (NameError, TypeError, AttributeError):  # annotations that exist for type checkers only
        return {}


def _checked_value(value: Any, hint: Any, where: str, section: Section, depth: int) -> Any:
    """Checks an argument against its annotation.

    Returns:
        The value; whole numbers that were written as floats, such as 1e3, as integers where integers are wanted.
    """
    if _holds_target(value, depth):
        if not _fits(value, hint, where, section):
            raise ConfigError(f"{where}={_shown(value)}: no object of that class belongs here")
        return value
    if hint is Any or hint is inspect.Parameter.empty:
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
        raise ConfigError(f"{where}={_shown(value)}: {expected}") from None
    if isinstance(value, bool) and not isinstance(read, bool):
        raise ConfigError(f"{where}={value!r}: a number, not true or false")
    if type(value) is float and type(read) is int:
        return read
    return list(read) if isinstance(value, list) and isinstance(read, list | tuple) else value


def _fits(value: Any, hint: Any, where: str, section: Section) -> bool:
    """Whether a value with nodes in it may stand where a signature has this annotation."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option, where, section) for option in inner)
    if isinstance(value, list):
        listed = inspect.isclass(origin) and issubclass(origin, collections.abc.Iterable) and len(inner) == 1
        return listed and all(_fits(item, inner[0], f"{where}[{i}]", section) for i, item in enumerate(value))
    if not isinstance(value, dict):
        return False
    if TARGET not in value:
        mapped = inspect.isclass(origin) and issubclass(origin, collections.abc.Mapping) and len(inner) == 2
        return mapped and all(_fits(item, inner[1], f"{where}.{key}", section) for key, item in value.items())
    made = class_of(value[TARGET], where, section)
    if origin is collections.abc.Callable:
        return bool(value.get(PARTIAL)) and _is_a(made, inner[-1])
    return not value.get(PARTIAL) and _is_a(made, hint)


def _is_a(made: type[Any], hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_a(made, option) for option in typing.get_args(hint))
    return inspect.isclass(hint) and hint is not object and issubclass(made, hint)


def _holds_target(value: Any, depth: int) -> bool:
    if depth > DEEPEST:
        return False  # refused on the way down
    if isinstance(value, dict):
        return TARGET in value or any(_holds_target(v, depth + 1) for v in value.values())
    return isinstance(value, list) and any(_holds_target(v, depth + 1) for v in value)


_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxdict, _repr.maxlist, _repr.maxstring, _repr.maxother = 4, 8, 16, 200, 200


def _shown(value: Any) -> str:
    """As Python writes it, cut where it is long or deep."""
    return _repr.repr(value)
