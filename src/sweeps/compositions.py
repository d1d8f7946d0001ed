"""Configurations of thousands of jobs that differ in few values: composed once for each choice of groups, resolved as rarely as can be.

Composing takes a tenth of a second and resolving a hundredth, nearly all of it bookkeeping. So:

- files are parsed once (``_Kept``), and overrides that only set values are applied to a copy, as Hydra itself applies them last;
- of a resolved configuration, a value may be replaced afterwards if nothing depends on it but plain references to it, ``${seed}``.
  What else depends on a key, such as ``${training_steps:${data}}`` on ``data.seed``, is resolved anew for each of its values.
"""

from __future__ import annotations

import gc
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import omegaconf.base
from hydra import initialize_config_dir
from hydra._internal import defaults_list
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config import to_plain
from src.config.compose import CONFIG_DIR, compose_config
from src.config.quoting import literal

Plain = dict[str, Any]
# Of resolvers, those that look at their arguments only.
PURE = ("repository", "times", "training_steps", "oc.env")
_REFERENCE = re.compile(r"\$\{\s*([^\s:{}$]+)\s*\}")
_CALL = re.compile(r"\$\{\s*([^\s:{}$]+)\s*:")


class Composer:
    """A context in which jobs are planned."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._groups: dict[tuple[str, ...], bytes] = {}
        self._templates: dict[tuple[tuple[str, ...], tuple[str, ...]], _Template] = {}

    def __enter__(self) -> Composer:
        if not GlobalHydra.instance().is_initialized():
            self._stack.enter_context(initialize_config_dir(str(CONFIG_DIR), version_base="1.3"))
        self._stack.enter_context(_files_are_kept(GlobalHydra.instance().config_loader()))
        self._stack.enter_context(_interpolations_are_kept())
        self._stack.enter_context(_choices_are_listed_where_asked_for())
        self._stack.enter_context(_rare_collections())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def compose(self, overrides: tuple[str, ...]) -> DictConfig:
        """What ``compose_config`` gives for these overrides."""
        parsed = [_parsed(override) for override in overrides]
        if not all(parsed):
            return compose_config(list(overrides))
        groups = tuple(o for o, kind in zip(overrides, parsed, strict=True) if kind is None or _is_group(kind))
        if groups not in self._groups:
            self._groups[groups] = pickle.dumps(compose_config(list(groups)))
        config: DictConfig = pickle.loads(self._groups[groups])
        try:
            for override in parsed:
                if override is not None and not _is_group(override):
                    OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except (HydraException, OmegaConfBaseException):
            return compose_config(list(overrides))  # which says what is wrong in Hydra's words
        return config

    def with_values(self, overrides: tuple[str, ...], values: Mapping[str, Any]) -> DictConfig:
        """The configuration of these overrides and then these values; not for changing."""
        return self._template(overrides, values).with_values(values)

    def resolved(self, overrides: tuple[str, ...], values: Mapping[str, Any]) -> Plain:
        """The same in plain containers, which belong to the caller."""
        return self._template(overrides, values).resolved(values)

    def _template(self, overrides: tuple[str, ...], values: Mapping[str, Any]) -> _Template:
        key = (overrides, tuple(values))
        if key not in self._templates:
            self._templates[key] = _Template(self.compose(overrides), values)
        return self._templates[key]


class _Template:
    """A composed configuration some of whose keys take one value after another."""

    def __init__(self, config: DictConfig, values: Mapping[str, Any]):
        # A pickle is copied in a quarter of the time that a deep copy takes.
        self.config = pickle.dumps(config)
        raw = OmegaConf.to_container(_updated(config, values))
        self.copies = {key: _copies(raw, key) for key in values}
        for key in values:  # one key within another, or one that no plain setting reaches
            if any(other != key and (other + ".").startswith(key + ".") for other in values) or not _has(raw, key):
                self.copies[key] = None
        self._resolved: dict[str, Plain] = {}

    def with_values(self, values: Mapping[str, Any]) -> DictConfig:
        """A copy with these values."""
        return _updated(pickle.loads(self.config), values)

    def resolved(self, values: Mapping[str, Any]) -> Plain:
        """With these values in place of the keys."""
        free = {key: value for key, value in values.items() if self.copies[key] is not None and _is_simple(value)}
        fixed = repr([(key, value) for key, value in values.items() if key not in free])
        if fixed not in self._resolved:
            self._resolved[fixed] = to_plain(self.with_values(values))
        found = _copied(self._resolved[fixed])
        for key, value in free.items():
            for path in self.copies[key] or ():
                node = found
                for part in path[:-1]:
                    node = node[part]
                node[path[-1]] = value
        return found


def _updated(config: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    for key, value in values.items():
        OmegaConf.update(config, key, literal(value), merge=False)
    return config


def _is_simple(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, bool | int | float)
        or (isinstance(value, str) and "${" not in value and value != "???")
    )


def _copies(raw: Any, key: str) -> list[tuple[Any, ...]] | None:
    """The places of a configuration that hold the value of a key: its own, and plain references to it. None if more depends on it."""
    interpolations = {path: text for path, text in _leaves(raw) if isinstance(text, str) and "${" in text}
    if any(call not in PURE for text in interpolations.values() for call in _CALL.findall(text)):
        return None
    references = {path: [_absolute(name) for name in _REFERENCE.findall(text)] for path, text in interpolations.items()}
    if any(name.startswith(".") for names in references.values() for name in names):
        return None
    own = tuple(key.split("."))
    found = {key: own}
    changed = True
    while changed:
        changed = False
        for path, names in references.items():
            where = ".".join(map(str, path))
            if where in found or not any(_touches(name, place) for name in names for place in found):
                continue
            plain = re.fullmatch(_REFERENCE, interpolations[path])
            if plain is None or names[0] not in found:
                return None
            found[where] = path
            changed = True
    return list(found.values())


def _touches(name: str, place: str) -> bool:
    """Whether a reference is to a place, to something in it, or to something that holds it."""
    return (name + ".").startswith(place + ".") or (place + ".").startswith(name + ".")


def _absolute(name: str) -> str:
    return name.replace("[", ".").replace("]", "")


def _leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, (*path, key))
    else:
        yield path, node


def _has(raw: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(raw, dict) or part not in raw:
            return False
        raw = raw[part]
    return not isinstance(raw, dict | list)


def _copied(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _copied(value) for key, value in node.items()}
    return [_copied(value) for value in node] if isinstance(node, list) else node


@lru_cache(maxsize=65536)
def _parsed(override: str) -> Override | None:
    """The override, if Hydra would do no more with it than choose from a group or set a value; None for all others."""
    try:
        found = OverridesParser.create().parse_override(override)
    except HydraException:
        return None
    plain = not (found.is_add() or found.is_force_add() or found.is_delete() or found.is_sweep_override())
    return found if plain and found.package is None and not found.is_hydra_override() else None


def _is_group(override: Override) -> bool:
    return (CONFIG_DIR / override.key_or_group).is_dir()


@contextmanager
def _interpolations_are_kept() -> Iterator[None]:
    """Has OmegaConf parse each text that holds ``${...}`` once; a tree is read only."""
    before = omegaconf.base.parse  # type: ignore[attr-defined]
    omegaconf.base.parse = lru_cache(maxsize=4096)(before)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        omegaconf.base.parse = before  # type: ignore[attr-defined]


@contextmanager
def _choices_are_listed_where_asked_for() -> Iterator[None]:
    """Spares Hydra a third of its time: for each file it lists all choices so far, for names such as ``/x: ${y}`` that few have."""
    before = defaults_list._create_interpolation_map

    def listed(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
        return before(overrides, defaults, self_added) if any(d.is_interpolation() for d in defaults) else None

    defaults_list._create_interpolation_map = listed
    try:
        yield
    finally:
        defaults_list._create_interpolation_map = before


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Looking for circles among millions of small objects takes a seventh of the time in which they are made."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def _files_are_kept(loader: ConfigLoader) -> Iterator[None]:
    """Has Hydra read each of its files once and put it below its package once, instead of once for each configuration."""
    before = getattr(loader, "repository", None)
    if before is None:
        yield
        return
    kept, place = _Kept(before), loader._load_single_config  # type: ignore[attr-defined]

    def load(default: Any, repo: Any) -> Any:
        key = (default.config_path, default.package, default.primary)
        if key not in kept.placed:
            kept.placed[key] = pickle.dumps(place(default, repo))
        return pickle.loads(kept.placed[key])

    loader.repository, loader._load_single_config = kept, load  # type: ignore[attr-defined]
    try:
        yield
    finally:
        loader.repository = before  # type: ignore[attr-defined]
        del loader._load_single_config  # type: ignore[attr-defined]


class _Kept:
    """Hydra's repository of configuration files, remembering what it has loaded."""

    def __init__(self, repository: Any):
        self._repository, self._loaded = repository, {}
        self.placed: dict[Any, bytes] = {}  # below their packages

    def __getattr__(self, name: str) -> Any:
        return getattr(self._repository, name)

    def __deepcopy__(self, memory: Any) -> _Kept:
        return self  # Hydra copies its repository for every configuration

    def initialize_sources(self, path: Any) -> None:
        """Another search path: what has been loaded counts no more."""
        self._loaded.clear()
        self.placed.clear()
        self._repository.initialize_sources(path)

    def load_config(self, config_path: str) -> Any:
        """A copy: composing changes what it is given."""
        if config_path not in self._loaded:
            self._loaded[config_path] = pickle.dumps(self._repository.load_config(config_path))
        return pickle.loads(self._loaded[config_path])
