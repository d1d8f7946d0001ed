"""What is in a checkpoint, is it whole, and another form of it: ``python src/checkpoints verify logs/train/runs/mine``.

inspect PATH              step, model, sizes, data, what it is made of
verify PATH...            exit status 1 if one is damaged; a run's folder stands for all checkpoints in it
consolidate PATH OUT      a folder of shards as one file, which opens under every strategy and on one device
reshard PATH OUT --files  a checkpoint as a folder of shards; any number of processes can go on from any number of files
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

# Run as a folder, Python puts src/checkpoints itself on the path; the package is two levels up.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from src.checkpoints.files import CheckpointError, find_checkpoint, newest_first, problem_of, read_checkpoint
from src.checkpoints.io import write_checkpoint
from src.checkpoints.sharded import describe, is_sharded, write_shards
from src.support.errors import printable


def inspect(path: Path) -> int:
    """Prints what a checkpoint holds; reads no tensors of shards. What is missing or odd in it is shown as it is."""
    found = find_checkpoint(path)
    checkpoint = read_checkpoint(found, tensors="none")
    config = checkpoint["config"]
    model, canon = config["model"], config["model"].get("canon")
    rows: dict[str, Any] = {
        "file": found,
        "step": f"{_number(checkpoint['global_step'])} of {_number(config['trainer'].get('max_steps'))}",
        "run": config.get("name"),
        "format": checkpoint["format"],
        "model": f"{model.get('depth')} x {model.get('dim')} {model.get('pattern')}, vocabulary {_number(model.get('vocab_size'))}",
        "Canon": (canon.get("positions") if isinstance(canon, dict) else canon) or "none",
        "data": checkpoint.get("data"),
    }
    if checkpoint.get("ended"):
        rows["ended"] = checkpoint["ended"].get("why")
    if is_sharded(found):
        rows |= describe(found)
    else:
        weights = checkpoint["state_dict"]
        rows |= {"tensors": len(weights), "numbers": f"{sum(t.numel() for t in weights.values()):,}"}
        rows["optimizer"] = "yes" if checkpoint.get("optimizer_states") else "no"
    files = found.iterdir() if found.is_dir() else [found]
    rows["bytes"] = f"{sum(file.stat().st_size for file in files if file.is_file()):,}"
    problem = problem_of(found, thorough=True)
    rows["whole"] = "yes" if problem is None else f"no: {problem}"
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        print(f"{name:<{width}}  {printable(str(value)[:2000])}")
    return int(problem is not None)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def verify(paths: list[Path]) -> int:
    """Prints a line for each checkpoint."""
    broken = 0
    for path in paths:
        for checkpoint in _all(path):
            problem = problem_of(checkpoint, thorough=True)
            broken += problem is not None
            told = problem or f"step {read_checkpoint(checkpoint, tensors='none')['global_step']:,}"
            print(f"{'damaged' if problem else 'whole':<8} {printable(checkpoint)}  {printable(told)}")
    return int(broken > 0)


def _all(path: Path) -> list[Path]:
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not folder.is_dir() or is_sharded(folder):
        return [find_checkpoint(path)]
    found = newest_first(folder) + sorted(folder.glob("best_*.ckpt"))
    if not found:
        raise CheckpointError(f"{path}: no checkpoint in there")
    return found


def consolidate(path: Path, out: Path) -> int:
    """Writes one file."""
    _refuse_existing(out)
    write_checkpoint(read_checkpoint(path), out)
    print(f"{out}: {out.stat().st_size:,} bytes")
    return 0


def reshard(path: Path, out: Path, files: int) -> int:
    """Writes a folder of shards."""
    _refuse_existing(out)
    if files < 1:
        raise CheckpointError(f"--files {files}: at least 1")
    checkpoint = read_checkpoint(path)
    try:
        write_shards(checkpoint, out, files)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {printable(path)}: {printable(error)}") from error
    print(f"{out}: {describe(out)['files']} files")
    return 0


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise CheckpointError(f"{out} is there already; choose another name")


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    lines = (__doc__ or "").strip().splitlines()
    parser = argparse.ArgumentParser(
        prog="python src/checkpoints",
        description=lines[0],
        epilog="\n".join(lines[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("inspect").add_argument("path", type=Path)
    commands.add_parser("verify").add_argument("paths", type=Path, nargs="+")
    for name in ("consolidate", "reshard"):
        command = commands.add_parser(name)
        command.add_argument("path", type=Path)
        command.add_argument("out", type=Path)
        if name == "reshard":
            command.add_argument("--files", type=int, default=1, help="over which the tensors are spread")
    given = vars(parser.parse_args(arguments))
    command = {"inspect": inspect, "verify": verify, "consolidate": consolidate, "reshard": reshard}[
        given.pop("command")
    ]
    try:
        return command(**given)
    except (CheckpointError, OSError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
