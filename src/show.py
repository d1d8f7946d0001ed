"""Show one example of a synthetic task, in words and as a picture: ``python src/show.py data=brevo1 index=3``.

It is the very example that a run with the same ``data`` settings and seed trains on, or is tested on. ``window=true`` shows a whole
window instead, as it is packed.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

# Run as a script, Python puts src/ itself on the path; the package is one level up.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from matplotlib.figure import Figure  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.text import Text  # noqa: E402

from src.cli.entry import entrypoint  # noqa: E402
from src.config import ConfigError, check_complete, instantiate, to_plain  # noqa: E402
from src.config.compose import CONFIG_DIR, compose_config  # noqa: E402
from src.datamodules.task import TaskDataModule  # noqa: E402
from src.datamodules.tasks import Task  # noqa: E402
from src.datamodules.tasks.base import SPLITS  # noqa: E402
from src.reporting.drawings import draw, draw_window  # noqa: E402
from src.reporting.token_text import legend, packed_examples, token_text  # noqa: E402
from src.support.console import plain_console  # noqa: E402


def show(config: DictConfig) -> None:
    """Prints what was asked for, and draws it."""
    plain = checked(config)
    datamodule: TaskDataModule = instantiate(plain["data"], "data")
    seed = datamodule.seed if plain["seed"] is None else plain["seed"]
    console = plain_console()
    show_it = show_window if plain["window"] else show_example
    figure = show_it(console, datamodule, seed, plain["split"], plain["index"])
    if plain["figure"] is False:
        return
    if figure is None:
        console.print(f"figure: none, {datamodule.task.name} has no drawing (src/reporting/drawings)")
        return
    path = Path(plain["figure"] or Path(plain["paths"]["output_dir"]) / f"{datamodule.task.name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    console.print(f"figure: {path}", soft_wrap=True)


def show_example(console: Console, datamodule: TaskDataModule, seed: int, split: Any, index: int) -> Figure | None:
    """One example: its tokens, its meaning."""
    task = datamodule.task
    tokens, mask = task.example(seed, split, index)
    where = f"{split}, example {index}, seed {seed}"
    headline(console, task, where, len(tokens), int(mask.sum()))
    console.print(legend(console))
    console.print(token_text(console, tokens, mask))
    console.print()
    console.print(Text(task.describe(tokens)), soft_wrap=not console.is_terminal)
    return draw(task, tokens, f"{where}; {short(task)}")


def show_window(console: Console, datamodule: TaskDataModule, seed: int, split: Any, index: int) -> Figure:
    """One window: the tokens of its examples in two styles by turns, and which examples they are."""
    task, length = datamodule.task, datamodule.window
    there_are = task.num_windows(split, length)
    if there_are is not None and index >= there_are:
        raise ConfigError(f"index={index}: {split} has the windows 0..{there_are - 1}")
    windows = task.windows(seed, split, index, 1, length)
    packed = packed_examples(task, seed, split, index, length)
    windows.tokens[0, packed[-1].end :] = -1  # padding
    where = f"{split}, window {index}, seed {seed}"
    headline(console, task, where, length, int(windows.loss_mask.sum()))
    console.print(legend(console, window=True))
    console.print(token_text(console, windows.tokens[0], windows.loss_mask[0], windows.segments[0]))
    console.print()
    console.print("\n".join(map(str, packed)))
    return draw_window(windows, f"{where}; {short(task)}; last is {packed[-1]}")


def headline(console: Console, task: Task, where: str, tokens: int, learnt: int) -> None:
    """One line: whose example it is, and how large."""
    console.print(Text.assemble((short(task), "bold"), f": {where}: {tokens:,} tokens, {learnt:,} learnt"))


def short(task: Task) -> str:
    """The task as Python builds it: its first parameter, and those that are not the default."""
    values = [(part.name, getattr(task, part.name), part.default) for part in fields(task)]  # type: ignore[arg-type]
    said = [f"{name}={value!r}" for i, (name, value, default) in enumerate(values) if i == 0 or value != default]
    return f"{type(task).__name__}({', '.join(said)})"


def checked(config: DictConfig) -> dict[str, Any]:
    """The plain configuration, if it asks for something that can be shown."""
    if config.get("data") is None or "task" not in config.data:
        choices = sorted(path.stem for path in (CONFIG_DIR / "data").glob("*.yaml"))
        tasks = [name for name in choices if "task" in compose_config([f"data={name}"], "show").data]
        raise ConfigError(
            f"data: only synthetic tasks have examples to show, with data={', '.join(tasks)}; "
            "python src/prepare.py shows what is in a corpus"
        )
    check_complete(config)
    plain = to_plain(config)
    if plain["split"] not in SPLITS:
        raise ConfigError(f"split={plain['split']!r}: choose {', '.join(SPLITS)}")
    for key in ("index", "seed"):
        value = plain[key]
        if (value is not None or key == "index") and (type(value) is not int or not 0 <= value < 2**48):
            raise ConfigError(f"{key}={value!r}: a whole number, 0 or more{', or null' if key == 'seed' else ''}")
    if not isinstance(plain["window"], bool):
        raise ConfigError(f"window={plain['window']!r}: true or false")
    figure = plain["figure"]
    if figure is not None and figure is not False and Path(str(figure)).suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(
            f"figure={figure!r}: a path that ends in .png, .pdf or .svg; null for the output folder; or false"
        )
    return plain


if __name__ == "__main__":
    entrypoint("show", show)
