"""The tables that a run, a scoring and a comparison end in: what they show may be the words of somebody else's folder."""

import json

import pytest

from src.reporting.comparison import Variant, print_table
from src.reporting.scores import print_results, print_scores
from src.support.console import Telling, plain_console, print_cells
from src.support.errors import RunError

RESULTS = {"name": "mine", "steps": 5, "seconds": 1.5, "metrics": {"val/loss": 2.0, "test/accuracy": 0.5}}
RESULTS |= {
    "intervals": {"test/accuracy": {"right": 4, "total": 8, "low": 0.2, "high": 0.8}},
    "chance": {"accuracy": 0.1},
}
ODD = [
    "[/x]",
    "[red]a[/red]",
    "[link=http://evil.example/x]acc[/link]",
    ":skull:",
    "\x1b]0;title\x07\x1b[31m",
    "a\nb\u202ec",
]


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    """As on a terminal that shows all that rich can do."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")


def shown(capsys) -> str:
    """What was printed, without the styles of the table's own heading and title."""
    out = capsys.readouterr().out
    for style in ("\x1b[1m", "\x1b[1;35m", "\x1b[3m", "\x1b[0m"):
        out = out.replace(style, "")
    return out


def written(odd: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in odd)


@pytest.mark.parametrize("odd", ODD)
def test_names_are_printed_as_they_are(capsys, tmp_path, odd):
    print_scores(odd, {f"test/{odd}": 0.5}, {}, {odd: None})
    print_table([Variant(odd, tmp_path, {f"test/{odd}": 0.5}, {}), Variant("b", tmp_path, {"test/c": 1.0}, {odd: 0.1})])
    print_table([Variant(f"{odd}{i}", tmp_path, {f"test/{odd}": 0.5}, {}) for i in range(9)])
    print_cells(odd, [odd], [[odd]], left=2)
    out = shown(capsys)
    assert "\x1b" not in out
    assert out.count(written(odd)) >= 15


@pytest.mark.parametrize("odd", [word for word in ODD if "\x1b" not in word])
def test_what_is_being_done_may_be_said_in_any_words(capsys, odd):
    with Telling(plain_console()) as told:
        assert told.status
        told.last = 0.0
        told(f"reading {odd}")
    assert "link=http" not in odd or "\x1b]8;" not in capsys.readouterr().out


def test_results_are_printed(capsys, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    print_results(tmp_path / "results.json")
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown(capsys).splitlines()]
    assert ["test/accuracy", "0.5000", "0.2000 - 0.8000", "8", "0.1000"] in lines
    assert not any("val/loss" in line for line in lines)


@pytest.mark.parametrize("missing", ["name", "steps", "intervals", "chance"])
def test_results_of_earlier_versions_are_printed(capsys, tmp_path, missing):
    (tmp_path / "results.json").write_text(json.dumps({k: v for k, v in RESULTS.items() if k != missing}))
    print_results(tmp_path / "results.json")
    assert "test/accuracy" in shown(capsys)


def test_results_that_would_steer_a_terminal_do_not(capsys, tmp_path):
    odd = "\x1b]52;c;ZXZpbA==\x07[/x]"
    results = RESULTS | {"name": f"x{odd}", "metrics": {f"test/{odd}": 0.5}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    print_results(tmp_path / "results.json")
    out = shown(capsys)
    assert "\x1b" not in out
    assert "ZXZpbA==" in out


@pytest.mark.parametrize(
    "wrong",
    [
        {"intervals": {"test/accuracy": {"low": "a"}}},
        {"intervals": {"test/accuracy": {"low": 0.1, "high": 0.2}}},
        {"intervals": [1]},
        {"chance": {"accuracy": "z"}},
        {"steps": "A" * 5_000},
        {"name": ["mine"]},
        {"metrics": {"test/accuracy": "high"}},
        {"metrics": None},
        {"ended": {"why": 5}},
    ],
)
def test_results_that_are_none_are_named(tmp_path, wrong):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS | wrong))
    with pytest.raises(RunError, match=rf"results\.json: {next(iter(wrong))}.*measures again") as raised:
        print_results(path)
    assert len(str(raised.value)) < 1000
