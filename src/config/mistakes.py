"""Which key of a command line, or of a sweep, does not exist, and which of its words cannot be read."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config.compose import CONFIG_DIR, compose_config
from src.config.quoting import as_override, quoted
from src.config.registry import class_of, section_of
from src.support.errors import ConfigError, suggest


def first_misspelt_key(config_name: str, overrides: list[str]) -> str | None:
    """Finds the first override whose key does not exist; the rest of the message lists those that do."""
    parser = OverridesParser.create()
    try:
        parsed = parser.parse_overrides(overrides)
    except HydraException:
        return None
    groups = [o for o in parsed if (CONFIG_DIR / (o.key_or_group or "")).is_dir()]
    for override in groups:
        folder = CONFIG_DIR / override.key_or_group
        choices = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
        if not override.is_sweep_override() and isinstance(override.value(), str) and override.value() not in choices:
            if (CONFIG_DIR / "sweep" / f"{override.value()}.yaml").is_file():
                return f"{override.input_line}: a sweep of many runs; python src/sweep.py sweep={override.value()}"
            return (
                f"{override.key_or_group}={override.value()}: no such choice; {suggest(str(override.value()), choices)}"
            )
    try:
        config = compose_config([_text(o) for o in groups if not o.is_sweep_override()], config_name)
    except (HydraException, OmegaConfBaseException):
        return None
    for override in parsed:
        ours = override not in groups and re.split(r"[./]", override.key_or_group)[0] != "hydra"
        if ours and not (override.is_add() or override.is_force_add() or override.is_delete()):
            message = _missing(config, override.key_or_group)
            if message:
                return message
    return None


def unreadable_override(overrides: list[str]) -> str | None:
    """Finds the first override that is none in Hydra's grammar, and says how its value would be."""
    parser = OverridesParser.create()
    for override in overrides:
        try:
            parser.parse_override(override)
        except HydraException:
            key, equals, value = override.partition("=")
            if not equals:
                return f"{override}: settings are given as key=value"
            if value.startswith(("[", "{")):
                return f"{override}: cannot be read. What holds other signs than letters, digits and . / - is quoted: '{key}=[\"a=1\"]'"
            return (
                f"{override}: cannot be read. A value with other characters than letters, digits and . / - + _ : % @ is quoted, once "
                f"for the shell and once for Hydra: {quoted(f'{key}={as_override(value)}')}"
            )
    return None


def _is_argument(node: DictConfig, where: str, name: str) -> bool:
    try:
        return name in inspect.signature(class_of(node.get("_target_"), where, section_of(where))).parameters
    except ConfigError:
        return False


def _text(override: Override) -> str:
    return override.input_line or ""


def _missing(config: DictConfig, key: str) -> str | None:
    node: Any = config
    path: list[str] = []
    for part in key.split("."):
        if getattr(node, "_is_interpolation", bool)():
            return None  # a reference to another section; Hydra knows better
        if not OmegaConf.is_dict(node):
            return f"{key}: {'.'.join(path)} is a value, it has no key {part!r}"
        if part not in set(node.keys()):  # `in` does not know keys whose values are still to be given
            if _is_argument(node, ".".join(path), part):
                return f"{key}: not set in the configuration so far; to add it write +{key}=..."
            where = ".".join(path)
            if not path and (Path(CONFIG_DIR) / part).is_dir() and key != part:
                return f"{key}: {part} is not chosen here; choose it first, {part}=..."
            known = [str(name) for name in node if not str(name).startswith("_")]
            if not path:
                known += [p.name for p in Path(CONFIG_DIR).iterdir() if p.is_dir()]
            return f"{key}: no key {part!r}{' in ' + where if where else ''}; {suggest(part, set(known))}"
        path.append(part)
        node = node._get_node(part)
    return None
