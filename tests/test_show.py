"""``src/show.py``: every task's examples and windows in words, marked without colour too, and drawn."""

import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from src.build import CONFIG_DIR, compose_config
from src.config import ConfigError, instantiate, to_plain
from src.datamodules.task import TaskDataModule
from src.datamodules.tasks import MQAR, Brevo, Capo, Copy, Depo, Lano, Mano, Task
from src.reporting.token_text import LEARNT, TURNS, packed_examples, token_text
from src.show import short, show
from tests.runs import command, compose_run, main

TASKS = [
    path.stem
    for path in sorted((CONFIG_DIR / "data").glob("*.yaml"))
    if "task" in compose_config([f"data={path.stem}"], "show").data
]
CORPORA = {"python_source", "text_files"}
SMALL = {
    "brevo1": ["data.task.N=7", "data.window=160"],
    "brevo2": ["data.task.N=5", "data.window=160"],
    "capo": ["data.task.num_people=30", "data.window=200"],
    "copy": ["data.task.N=9", "data.window=50"],
    "depo1": ["data.task.N=6", "data.window=90"],
    "depo2": ["data.task.N=5", "data.window=180"],
    "lano": ["data.task.levels=3", "data.window=60"],
    "mano": ["data.task.L=3", "data.window=50"],
    "mqar": ["data.task.num_pairs=2", "data.task.length=16", "data.window=40"],
}


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")


def run_show(folder: Path, *overrides: str) -> None:
    show(compose_run(folder, *overrides, config_name="show"))


def the_module(data: str) -> TaskDataModule:
    config = compose_config([f"data={data}", *SMALL.get(data, [])], "show")
    return instantiate(to_plain(config.data), "data")


def read_back(text: str) -> tuple[list[int], list[bool]]:
    """Ids and what is learnt, out of the brackets."""
    ids, learnt, inside = [], [], False
    for word in re.findall(r"\[|\]|\d+", re.sub(r"\(\d+ of padding\)", "", text)):
        if word in "[]":
            inside = word == "["
        else:
            ids.append(int(word))
            learnt.append(inside)
    return ids, learnt


def token_block(out: str) -> str:
    return out.split("in brackets:\n", 1)[1].split("\n\n", 1)[0]


# ---- examples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", TASKS)
def test_every_task_is_shown_and_drawn(data, tmp_path, capsys):
    run_show(tmp_path, f"data={data}", *SMALL.get(data, []), "index=3", "split=val")
    out = capsys.readouterr().out
    module = the_module(data)
    tokens, mask = module.task.example(module.seed, "val", 3)
    head, _, rest = out.partition("\ntokens, [")
    assert " ".join(head.split()) == (
        f"{short(module.task)}: val, example 3, seed 42: {len(tokens)} tokens, {int(mask.sum())} learnt"
    )
    assert rest.startswith("learnt ones] in brackets:\n")
    assert read_back(token_block(out)) == (tokens.tolist(), mask.tolist())
    assert module.task.describe(tokens).rstrip() in out  # unwrapped, as this is no terminal
    figure = tmp_path / f"{module.task.name}.png"
    assert f"figure: {figure}\n" in out
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_seed_split_and_index_choose_the_example(tmp_path, capsys):
    seen = set()
    for i, options in enumerate(
        (["seed=1"], ["seed=2"], ["split=test", "seed=1"], ["index=1", "seed=1"], ["data.seed=2"])
    ):
        run_show(tmp_path / str(i), "data=copy", "data.task.N=9", "figure=false", *options)
        seen.add(token_block(capsys.readouterr().out))
    assert len(seen) == 4  # data.seed=2 is seed=2


def test_short_builds_the_task_again():
    for task in (Depo(N=8, K=2, mini_vocab=8, word_length=(1, 1)), Brevo(), Lano(levels=2), Copy(N=9, distinct=False)):
        names = {kind.__name__: kind for kind in (Depo, Brevo, Lano, Copy)}
        assert eval(short(task), names) == task


def test_figure_false_draws_nothing(tmp_path, capsys):
    run_show(tmp_path, "figure=false")
    assert "figure" not in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_figure_goes_where_it_is_told(tmp_path, capsys):
    path = tmp_path / "new" / "a.svg"
    run_show(tmp_path, f"figure={path}")
    assert f"figure: {path}\n" in capsys.readouterr().out
    assert "<svg" in path.read_text()


def test_a_task_without_a_drawing_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("src.reporting.drawings.DRAWERS", {})
    run_show(tmp_path)
    assert "figure: none, depo has no drawing" in capsys.readouterr().out


# ---- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", TASKS)
def test_every_task_shows_its_windows(data, tmp_path, capsys):
    run_show(tmp_path, f"data={data}", *SMALL.get(data, []), "index=2", "window=true")
    out = capsys.readouterr().out
    module = the_module(data)
    windows = module.task.windows(module.seed, "train", 2, 1, module.window)
    block = token_block(out)
    ids, learnt = read_back(block)
    padding = sum(map(int, re.findall(r"\((\d+) of padding\)", block)))
    assert len(ids) + padding == module.window
    assert ids == windows.tokens[0, : len(ids)].tolist()
    assert learnt == windows.loss_mask[0, : len(ids)].tolist()
    assert not windows.loss_mask[0, len(ids) :].any()
    examples = [line for line in out.splitlines() if line.startswith("example ")]
    assert block.count("|") == len(examples) == len(np.unique(windows.segments[0, : len(ids)]))
    assert [line.endswith("whole") for line in examples[:-1]] == [True] * (len(examples) - 1)
    assert (tmp_path / f"{module.task.name}.png").is_file()


@pytest.mark.parametrize(
    ("task", "length"),
    [
        (Depo(N=6, K=2, mini_vocab=9), 70),
        (Brevo(N=7), 60),
        (Lano(levels=1), 12),  # a few sentences only, all of them often
        (Mano(L=2), 30),
        (Copy(N=2), 33),
        (MQAR(num_pairs=2, length=12, vocabulary=16), 30),
        (Capo(num_people=20, exposures=1), 200),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_packed_examples_are_those_of_the_window(task: Task, length: int):
    firsts = []
    for window in range(4):
        windows = task.windows(5, "train", window, 1, length)
        found = packed_examples(task, 5, "train", window, length)
        assert [example.index for example in found] == list(range(found[0].index, found[0].index + len(found)))
        at = 0
        for example in found:
            tokens = task.example(5, "train", example.index)[0]
            assert (example.start, example.size) == (at, len(tokens))
            assert tokens[: example.end - at].tolist() == windows.tokens[0, at : example.end].tolist()
            at = example.end
        if at < length:  # padding
            assert task.name == "capo"
            assert not windows.loss_mask[0, at:].any()
        else:
            assert found[-1].end - found[-1].start <= found[-1].size
        firsts.append(found[0].index)
    assert firsts == [window * firsts[1] for window in range(4)]


def test_a_cut_example_says_how_much_of_it_there_is(tmp_path, capsys):
    run_show(tmp_path, "data=copy", "data.task.N=9", "data.window=50", "window=true", "figure=false")
    out = capsys.readouterr().out
    assert "example 1: tokens 20 to 39, whole\nexample 2: tokens 40 to 49, cut: 10 of its 20 tokens\n" in out


def test_windows_end_where_the_data_end(tmp_path):
    options = ["data=capo", *SMALL["capo"], "data.task.exposures=1", "window=true"]
    with pytest.raises(ConfigError, match=r"index=99: train has the windows 0\.\.14"):
        run_show(tmp_path, *options, "index=99")


# ---- colour ----------------------------------------------------------------------------------------------------------


def console(colour: bool) -> Console:
    return Console(force_terminal=colour, color_system="standard" if colour else None, width=100)


def test_learnt_tokens_have_a_colour_where_there_is_one():
    tokens, mask = Depo(N=6, K=2, mini_vocab=9).example(0, "train", 0)
    text = token_text(console(True), tokens, mask)
    assert [int(word) for word in text.plain.split()] == tokens.tolist()
    coloured = [text.plain[span.start : span.end] for span in text.spans if span.style == LEARNT]
    assert " ".join(coloured).split() == [str(token) for token in tokens[mask]]
    assert "[" not in text.plain


def test_examples_of_a_window_take_turns():
    task = Depo(N=6, K=2, mini_vocab=9)
    windows = task.windows(0, "train", 0, 1, 120)
    tokens, mask, segments = windows.tokens[0], windows.loss_mask[0], windows.segments[0]
    text = token_text(console(True), tokens, mask, segments)
    for turn, colour in enumerate(TURNS):
        for learnt, style in ((False, colour), (True, f"reverse {colour}")):
            spans = [text.plain[span.start : span.end] for span in text.spans if span.style == style]
            ids = [word for word in " ".join(spans).split() if word != "|"]
            assert ids == [str(token) for token in tokens[(segments % 2 == turn) & (mask == learnt)]]


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["split=training"], ["split='training'", "train, val, test"]),
        (["index=-1"], ["index=-1", "0 or more"]),
        (["index=1.5"], ["index=1.5", "whole number"]),
        (["index=null"], ["index=None", "whole number"]),
        (["index=1000000000000000000"], ["index=1000000000000000000"]),
        (["seed=x"], ["seed='x'", "or null"]),
        (["window=3"], ["window=3", "true or false"]),
        (["figure=true"], ["figure=True", ".png"]),
        (["figure=here.doc"], ["here.doc", ".png, .pdf or .svg"]),
        (["data.task.N=2"], ["Depo.N=2: at least 3"]),
        (["data.window=7"], ["data.window=7"]),
        (["data=brevo1", "+data.task.M=2"], ["data.task.M", "no such key"]),
    ],
)
def test_mistakes_are_explained(overrides, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run_show(tmp_path, *overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("data", ["data=text_files", "~data"])
def test_a_corpus_has_no_examples(data, tmp_path):
    with pytest.raises(ConfigError, match="only synthetic tasks have examples") as caught:
        run_show(tmp_path, data)
    listed = re.search(r"data=([\w, ]+);", str(caught.value))
    assert listed
    assert listed[1].split(", ") == TASKS
    assert not CORPORA & set(TASKS)
    assert {"depo_small", "brevo1", "capo", "mqar"} <= set(TASKS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["split=tset"], ["choose train, val, test"]), (["indx=3"], ["did you mean 'index'"])],
)
def test_the_command_line_ends_in_one_message(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(show, "show", *arguments, f"hydra.run.dir={tmp_path}")
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_the_command_itself(tmp_path):
    done = command("show", "data=brevo1", "data.task.N=6", "index=3", f"hydra.run.dir={tmp_path}")
    assert "Brevo(N=6): train, example 3, seed 42" in done.stdout
    assert "question  all that" in done.stdout
    assert (tmp_path / "brevo.png").is_file()
    assert not done.stderr
