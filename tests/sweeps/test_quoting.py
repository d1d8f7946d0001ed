"""Values in Hydra's grammar: what is written is what is read, and jobs run below folders of any name."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from src.build import compose_config
from src.config import ConfigError, to_plain
from src.config.quoting import as_override, quoted
from src.runs.runs import Run
from src.sweep import command_of, read
from src.sweeps.jobs import is_finished, start_of
from src.sweeps.local import Local
from src.sweeps.plan import Sweep
from tests.runs import TINY, command, compose_run
from tests.sweeps.test_local import plan

# Hydra's own signs, and what ends or escapes a quotation; letters of several scripts, and what looks like another type.
SIGNS = "\\'\"${}[]():=,;&~#!%@?|*<> \t\n-+./_"
# "???" is a value that is missing, to OmegaConf, and 1e3 a number that YAML 1.1 takes for text.
TEXTS = (st.text(st.sampled_from(SIGNS + "aé中0"), max_size=12) | st.text(max_size=12)).filter(
    lambda text: text != "???" and not re.fullmatch(r"[+-]?[0-9]+[eE][+-]?[0-9]+", text)
)
NAME = "a, 'b' \"c\" (d) [e] {f} = #g; &h ~i $j \\k 'é中\\"


def read_back(written):
    value = OverridesParser.create().parse_override(f"key={written}").value()
    return to_plain(OmegaConf.create({"key": value}))["key"]


@pytest.mark.parametrize(
    "text",
    ["true", "Null", "1.5e3", "12", "nan", "-inf", "0x1", "1_000", "é", "it's", "a\\", "\\'", "${x}", "\\${x}", ""],
)
def test_text_stays_text(text):
    assert read_back(as_override(text)) == text


@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
@example(text="\\\\${a}\\")
def test_any_text_is_read_as_it_was(text):
    assert read_back(as_override(text)) == text
    assert shlex.split(quoted(f"key={as_override(text)}")) == [f"key={as_override(text)}"]


NODES = st.recursive(
    TEXTS | st.integers() | st.booleans() | st.none(),
    lambda node: (
        st.lists(node, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]+[,. ]?[a-z]+", fullmatch=True), node)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(node=NODES)
def test_any_plain_value_is_read_as_it_was(node):
    assert read_back(as_override(node)) == node


@settings(max_examples=25, deadline=None)
@given(text=TEXTS)
def test_composing_gives_any_text_back(text):
    config = compose_config([f"name={as_override(text)}", f"tags=[{as_override(text)}]", "paths.output_dir=here"])
    assert (config.name, config.tags[0]) == (text, text)


def test_a_key_that_cannot_be_written_is_an_error():
    assert as_override({"seed,data.seed": [1]}) == r"{seed\,data.seed:[1]}"
    with pytest.raises(ConfigError, match="cannot be written"):
        as_override({"a'b": 1})


def test_the_command_of_a_trial_is_what_was_typed(tmp_path):
    compose_run(tmp_path, *TINY)
    axes = {"seed,data.seed": [1, 2]}
    text, _ = command_of({"axes": axes, "overrides": ["name='it is'"]}, "results/R3", "smoke")
    words = shlex.split(text)
    assert read_back(words[-2].partition("=")[2]) == axes
    assert read_back(words[-1].partition("=")[2]) == ["name='it is'"]


def test_a_job_runs_below_a_folder_of_any_name(tmp_path: Path):
    root = tmp_path / NAME / "jobs"
    job = plan().jobs()[0]
    told: list[str] = []
    Local(threads=1).run([job], root, lambda job, what, seconds: told.append(what))
    assert told[-1] == "finished", (job.folder(root) / "output.log").read_text()
    assert is_finished(job, root)
    assert Run(job.folder(root)).config["paths"]["output_dir"] == str(job.folder(root))
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    # Its checkpoint is named to the next attempt in the same grammar.
    overrides = OverridesParser.create().parse_overrides(start_of(job, root).command[2:])
    given = {override.key_or_group: override.value() for override in overrides}
    assert given["ckpt_path"] == str(job.folder(root) / "checkpoints" / "final.ckpt")


def test_a_folder_that_hydra_would_interpolate_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="choose another jobs_dir="):
        start_of(plan().jobs()[0], tmp_path / "${name}")


def test_a_comparison_runs_below_a_folder_of_any_name(tmp_path: Path):
    folder = tmp_path / NAME
    compare = "compare={with: ['canon.positions=A'], without: ['canon.positions=']}"
    command("train", *TINY, compare, f"hydra.run.dir={as_override(str(folder))}")
    assert all(Run(folder / name).status == "finished" for name in ("with", "without"))
    assert (folder / "comparison.png").is_file()


def test_overrides_of_a_sweep_file_are_those_of_its_jobs_too():
    """Those of the command line come after them, and are stronger."""
    plain = {"sweep": {**SWEEP_FILE, "overrides": ["trainer.max_steps=6"]}, "overrides": ["trainer.max_steps=7"]}
    sweep = read(plain, "mine")
    assert isinstance(sweep, Sweep)
    assert sweep.overrides == ["trainer.max_steps=6", "trainer.max_steps=7"]


SWEEP_FILE = {"_target_": "src.sweeps.plan.Sweep", "title": "mine", "tasks": {"Depo": []}, "variants": {"none": []}}
