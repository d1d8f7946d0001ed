"""Declared names: what a class is called in hashes, checkpoints and records, wherever it stands and whatever Python calls it.

A class that a configuration may name declares, once and for good, ``config_name = "gla"``. Hashes of experiments and the configurations
in checkpoints hold that name, so a class can be renamed and its file moved without any run, job or checkpoint becoming another one. A
configuration may say ``_target_: gla`` or give the dotted path of the class; the two mean the same.

Names are found by reading source files, not by importing them: whoever looks for one mixer does not load all of them. Before version
0.2.0 checkpoints and records held dotted paths; ``former_paths.json`` says under which name each of them is known now. It is a data
file, not code, so that a search-and-replace over the code does not rewrite history.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DECLARATION = "config_name"

_CLASS = re.compile(r"^class (\w+)|^    config_name = \"(\w+)\"$", re.ASCII | re.MULTILINE)
_LIBRARIES = (
    "lightning",
    "torch",
    "torchmetrics",
)  # whose classes have names of their own, whichever way they are imported


@cache
def former_paths() -> dict[str, str]:
    """Dotted paths that configurations of earlier versions hold -> declared names."""
    return json.loads((Path(__file__).parent / "former_paths.json").read_text())


@cache
def declared_in(package: str) -> dict[str, str]:
    """Declared name -> dotted path of the class, for all classes of a module, or of a package and those below it; nothing is imported.

    Raises:
        ValueError: two classes declare the same name.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return {}
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
    found: dict[str, str] = {}
    for file in files:
        inside = file.relative_to(origin.parent).with_suffix("").parts if spec.submodule_search_locations else ()
        module = ".".join([package, *(part for part in inside if part != "__init__")])
        for name, path in _declarations(file.read_text(encoding="utf-8"), module):
            if name in found:
                raise ValueError(f"{path} and {found[name]} both declare {DECLARATION} = {name!r}")
            found[name] = path
    return found


def _declarations(source: str, module: str) -> list[tuple[str, str]]:
    found, current = [], ""
    for match in _CLASS.finditer(source):
        if match[1]:
            current = match[1]
        elif current:
            found.append((match[2], f"{module}.{current}"))
    return found


def name_of(made: type[Any]) -> str:
    """The name of a class: the one that it declares itself; else ``lightning.Trainer`` for a library's, its dotted path for any other."""
    declared = vars(made).get(DECLARATION)
    if isinstance(declared, str):
        return declared
    root = made.__module__.partition(".")[0]
    return f"{root}.{made.__name__}" if root in _LIBRARIES else f"{made.__module__}.{made.__name__}"


def path_of(target: str, packages: tuple[str, ...]) -> str:
    """The dotted path that a ``_target_`` stands for, in packages that are searched for its name; itself if none of them knows it."""
    name = former_paths().get(target, target)
    return next((known[name] for package in packages if name in (known := declared_in(package))), target)
