"""Files of sweeps, and command lines, in which something is of the wrong kind: one message, which names the file and the key."""

import copy

import pytest

from src.build import compose_config
from src.config import ConfigError, to_plain
from src.sweep import at_scale, check_file, check_values, read, sweep
from src.sweeps.plan import Sweep
from src.sweeps.search import Search
from tests.runs import main
from tests.sweeps.test_plan import small

ODD = [None, 5, "x", [1], {"a": 1}, [None], {"a": {"b": [1]}}, [["a"]], True]
KEYS = [
    "tasks",
    "variants",
    "axes",
    "expect",
    "scales",
    "title",
    "metric",
    "match",
    "settings",
    "base",
    "note",
    "metrics",
]


@pytest.fixture(scope="module")
def plain():
    composed = compose_config(["sweep=results/R3"], "sweep")
    return {"sweep": to_plain(composed.sweep), "overrides": []}


@pytest.mark.parametrize("key", [*KEYS, "published", "select", "source", "architectures", "overrides", "nokey"])
@pytest.mark.parametrize("scale", [False, True])
def test_a_part_of_the_wrong_kind_names_file_and_key(plain, key, scale):
    refused = 0
    for odd in ODD:
        changed = copy.deepcopy(plain)
        (changed["sweep"]["scales"]["smoke"] if scale else changed["sweep"])[key] = odd
        if message := refused_with(changed):
            refused += 1
            # Another set of scales may be a right one: then it is the command line that names none of them.
            assert message.startswith(("configs/sweep/results/R3.yaml: ", "scale=smoke: ")), message
            assert key.removesuffix("s") in message
    assert refused or key == "overrides"


def refused_with(plain) -> str:
    """What is said of a sweep; nothing of one that is taken."""
    try:
        described = read(plain, "results/R3")
        assert isinstance(described, Sweep)
        at_scale(described, "smoke", "results/R3").along({})
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("text", ["a: [1", "\t- x", "a: 1\na: {", "- a\n", "just words", "", "a: *b\n", "{" * 5000])
def test_a_file_that_is_no_mapping_is_named(tmp_path, monkeypatch, capsys, text):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(text)
    monkeypatch.setattr("src.sweep.CONFIG_DIR", tmp_path)
    with pytest.raises(SystemExit) as ended:
        check_file(["sweep=mine", "--dry-run"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'sweep' / 'mine.yaml'}: ")


def test_a_sweep_without_axes_says_so():
    with pytest.raises(ConfigError, match=r"axes.optimizer.lr: this sweep has no axes, .*overrides=\[.optimizer.lr="):
        small(axes={}).along({"optimizer.lr": "recipe"})
    with pytest.raises(ConfigError, match="axes='x': a mapping"):
        small().along("x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dry_run": "maybe"}, "dry_run='maybe': true or false"),
        ({"scale": 3}, "scale=3: a name"),
        ({"jobs_dir": None}, "jobs_dir=None: a folder"),
        ({"overrides": "seed=1"}, "overrides='seed=1': a list of texts"),
        ({"overrides": [1]}, r"overrides=\[1\]: a list of texts"),
        ({"axes": "seed"}, "axes='seed': a mapping"),
        ({"sweep": None}, "sweep: no sweep"),
    ],
)
def test_values_of_the_command_line(plain, changes, message):
    good = {"dry_run": True, "report": True, "scale": "smoke", "jobs_dir": "jobs", "axes": None, **plain}
    check_values(good)
    with pytest.raises(ConfigError, match=message):
        check_values(good | changes)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ([1], "sweep.space="),
        ({"optimizer.lr": 3}, "sweep.space.optimizer.lr=3"),
        ({"optimizer.lr": {"low": "a", "high": 1}}, "sweep.space.optimizer.lr.low='a': a number"),
        ({"optimizer.lr": {"low": 2, "high": 1}}, "low is at most high"),
        ({"optimizer.lr": {"low": 0.0, "high": 1.0, "log": True}}, "positive on a logarithmic scale"),
        ({"optimizer.lr": {"choices": []}}, "choices=.*a list of values"),
    ],
)
def test_the_space_of_a_search(space, message):
    with pytest.raises(ConfigError, match=message):
        Search(title="a test", space=space)


def test_a_dry_run_says_on_what_its_times_rest(tmp_path, capsys):
    """One job takes as long as it takes, on however many workers."""
    arguments = ["sweep=canon_points", "dry_run=true", f"paths.log_dir={tmp_path}", "launcher.workers=2"]
    main(sweep, "sweep", *arguments, "axes={seed: [1], optimizer.lr: [1e-3]}")
    told = " ".join(capsys.readouterr().out.split())
    assert "Times assume 30 GFLOP/s on the CPU, which may be off by a factor of three." in told


@pytest.mark.parametrize(("key", "metric"), [("select", "test/accuracy"), ("metric", "val/accuracy")])
def test_what_is_chosen_by_and_what_is_compared_are_of_their_own_sets(key, metric):
    from src.sweeps.plan import Sweep

    described = {"title": "x", "tasks": {"a": []}, "variants": {"b": []}, key: metric}
    with pytest.raises(ConfigError, match=f"sweep.{key}={metric}"):
        Sweep(**described).checked()
