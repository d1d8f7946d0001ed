"""The rooms of the house, from the top to the ground: what is imported lies on the same floor or below."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = {"train", "evaluate", "sweep", "report", "prepare", "show", "build"}
FLOORS = [
    *("entries", "cli", "reporting", "sweeps", "training", "callbacks", "modules", "checkpoints", "config"),
    *("evaluation", "runs", "datamodules", "components", "support"),
]
# Below these nothing knows of the library: a task is numbers, a component is a torch.nn.Module.
WITHOUT = {
    "src.components": ("lightning", "hydra", "omegaconf"),
    "src.datamodules.tasks": ("torch", "lightning", "hydra", "omegaconf"),
    "src.datamodules.corpora": ("torch", "lightning", "hydra", "omegaconf"),
    "src.support": ("torch", "lightning", "hydra", "omegaconf"),
}


def modules() -> dict[str, Path]:
    paths = sorted((ROOT / "src").rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imports(path: Path) -> set[str]:
    """Every name that a file imports, inside of functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def arrows() -> list[tuple[str, str]]:
    """Which module of ours imports which."""
    known = modules()
    return [
        (module, name if name in known else name.rpartition(".")[0])
        for module, path in known.items()
        for name in sorted(imports(path))
        if name.split(".")[0] == "src" and module != name.rpartition(".")[0] != "src"
    ]


def floor(module: str) -> int:
    room = module.split(".")[1]
    return FLOORS.index("entries" if room in ENTRIES else room)


def test_no_arrow_climbs():
    climbing = [f"{a} imports {b}" for a, b in arrows() if floor(a) > floor(b)]
    assert not climbing


def test_there_is_no_circle():
    known = modules()
    graph: dict[str, set[str]] = {}
    for a, b in arrows():
        if b in known and not a.startswith(b + "."):  # a package's own __init__ gathers what is in it
            graph.setdefault(a, set()).add(b)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' -> '.join(error.args[1])}") from None


def test_nothing_else_lies_at_the_top():
    loose = {path.stem for path in (ROOT / "src").glob("*.py")} - ENTRIES - {"__init__"}
    rooms = {path.name for path in (ROOT / "src").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert (loose, rooms) == (set(), set(FLOORS) - {"entries"})


def test_the_ground_floor_knows_no_framework():
    wrong = [
        f"{module} imports {name}"
        for module, path in modules().items()
        for package, unknown in WITHOUT.items()
        if module == package or module.startswith(package + ".")
        for name in sorted(imports(path))
        if name.split(".")[0] in unknown
    ]
    assert not wrong
