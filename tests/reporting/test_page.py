import csv
import json
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from omegaconf import OmegaConf

from src.config import ConfigError
from src.report import chosen, outside_of, report
from src.reporting import palette
from src.reporting.exports import latex, slugs
from src.reporting.figures import shares_of
from src.reporting.page import write_report
from src.reporting.published import beside, published, table
from src.reporting.results import find_sweeps
from src.reporting.tables import MOST_POINTS, Row, SweepTables
from src.reporting.wording import compact, in_words, interval, metric_words, number, scored
from src.runs.registry import Run, find_runs
from src.support.console import Telling
from src.sweeps.plan import Statement
from tests.reporting.fake_sweeps import VARIANTS, make_sweep, plain_run
from tests.runs import ROOT

HOSTILE = ("<b>&", "</script><script>alert(1)</script>", "%$#_{}~^\\", "@v0 %{x} $x$")


class Page(HTMLParser):
    """Elements and visible text of a page; scripts and styles apart."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.words, self.scripts, self.inside = [], [], [], None
        html = path.read_text(encoding="utf-8")
        self.head = html[: html.index("<script>")]
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        (self.scripts if self.inside == "script" else self.words).append(data)

    @property
    def data(self):
        return next(json.loads(text) for text in self.scripts if text.startswith('{"figures"'))

    def all(self, name):
        return [attrs[name] for _, attrs in self.elements if attrs.get(name) is not None]


def lines(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One report that most tests read."""
    root = tmp_path_factory.mktemp("report")
    names = {"RoPE": "Llama(RoPE) original", "NoPE": "Llama(NoPE) originl"}
    where = {"task": "Depo1(K=4)", "difficulty": "N=225", "size": "12L768D"}
    sweep = make_sweep(root, published={"tasks": {"Depo": where}, "variants": names})
    plain_run(root / "logs" / "train" / "runs" / "one")
    return write_report([sweep], root / "out", [Run(root / "logs" / "train" / "runs" / "one")]).parent


@pytest.fixture(scope="module")
def page(folder):
    return Page(folder / "index.html")


def test_the_page_needs_nothing_else(page):
    assert not page.all("src")
    assert not [attrs for tag, attrs in page.elements if tag == "link" and attrs.get("rel") != "icon"]
    assert "@import" not in page.head
    assert "url(" not in page.head
    assert any("plotly.js v" in script for script in page.scripts)


def test_links_lead_to_anchors_and_files_that_exist(page, folder):
    ids = set(page.all("id"))
    addresses = page.all("href")
    assert len(addresses) > 20
    for address in addresses:
        if address.startswith("#"):
            assert address[1:] in ids
        elif not address.startswith("data:"):
            assert (folder / address).stat().st_size > 0
    assert len(ids) == len(page.all("id"))  # no id twice


def test_it_says_what_was_asked_and_what_came_out_without_any_script(page):
    for words in (
        "NoPE with Canon layers rises to RoPE with them",
        "Part 4.1, Result 3",
        "46 of 48 finished; 1 failed, 1 planned",
        "x86_64, 2 CPUs (47 runs)",
        "python src/sweep.py sweep=results/R3 scale=smoke",
        "RoPE + Canon scores at least 0.3 more than NoPE on Depo (accuracy).",
        "NoPE + Canon scores at most 0.05 less than RoPE + Canon on Depo (accuracy).",
        "0.25 (minimum)",
        "RuntimeError: loss is not finite at step 37",
        "mean over seeds at the best learning rate",
        "Best over learning rates (the paper's measure)",
        "optimizer.lr=0.002",  # commands of runs
    ):
        assert words in page.text
    outcomes = re.findall(r"[✓✕≈] (confirmed|contradicted|inconclusive)", page.text)
    assert outcomes == ["contradicted"] * 2 + ["confirmed"] * 2 + ["contradicted", "inconclusive"]


def test_cells_print_the_numbers_of_the_file(page, folder):
    scores = {
        (line["task"], line["variant"]): line for line in lines(folder / "tables" / "results-R3-smoke_scores.csv")
    }
    assert len(scores) == 8
    heat = next(figure for figure in page.data["figures"].values() if figure.get("cells"))
    texts = heat["data"][1]["text"]
    for (_, variant), line, text in zip(scores, scores.values(), texts, strict=True):
        half = (float(line["high"]) - float(line["low"])) / 2
        assert number(float(line["mean"])) in text
        assert f"±{number(half)}" in text
        assert f"n={line['seeds']}" in text
        assert ("of 6 runs" in text) == (line["runs"] != "6"), variant
    assert [line["unfinished"] for line in scores.values() if line["unfinished"]] == ["1 failed", "1 planned"]


def test_a_cell_has_the_commands_of_all_seeds_at_its_best_rate(page):
    cell = page.data["cells"]["results-R3-smoke"][1]
    assert (cell["where"], cell["title"]) == ("Depo", "NoPE + Canon")
    assert [re.findall(r"seed=(\d)", run["command"]) for run in cell["runs"]] == [[s, s] for s in "123"]
    assert all("optimizer.lr=0.002" in run["command"] for run in cell["runs"])


def test_every_table_and_figure_is_there(folder):
    tables = {path.name.removeprefix("results-R3-smoke_") for path in (folder / "tables").iterdir()}
    kinds = [
        "runs",
        "verdicts",
        "scores",
        "seeds",
        "rates",
        "curves",
        "groups",
        "differences",
        "published",
        "leaderboard",
    ]
    assert tables == {f"{kind}.csv" for kind in kinds} | {"scores.tex", "differences.tex"}
    pictures = list((folder / "figures").iterdir())
    assert len(pictures) == 2 + 2 * 4
    for picture in pictures:
        head = picture.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        assert min(struct.unpack(">II", head[16:24])) > 200


def test_curves_are_means_and_extremes_of_the_seeds(tmp_path):
    tables = SweepTables(make_sweep(tmp_path, tasks=("Depo",), unfinished=0, failed=0))
    cell = tables.cells[Row("Depo", ""), "RoPE"]
    runs = [run.curve("val/accuracy") for run in tables.runs_of(cell)]
    point = [
        line
        for line in tables.curves
        if (line["variant"], line["quantity"], line["step"]) == ("RoPE", "val/accuracy", 500)
    ]
    values = [run[500] for run in runs]
    assert len(point) == 1
    assert (point[0]["mean"], point[0]["low"], point[0]["high"], point[0]["seeds"]) == (
        pytest.approx(np.mean(values)),
        min(values),
        max(values),
        3,
    )


def test_long_curves_are_thinned_by_averaging(tmp_path):
    sweep = make_sweep(tmp_path, tasks=("Depo",), variants=("A",), rates=(1e-3,), seeds=(1,), unfinished=0, failed=0)
    path = next(tmp_path.rglob("metrics.csv"))
    path.write_text("step,train/loss\n" + "".join(f"{step},{step}\n" for step in range(1000)))
    points = [line for line in SweepTables(sweep).curves if line["quantity"] == "train/loss"]
    assert len(points) == 250 <= MOST_POINTS
    assert (points[0]["step"], points[0]["mean"]) == (2, 1.5)  # steps 1 to 4


def test_hostile_names_are_shown_and_do_nothing(tmp_path):
    task = '"><img src=x onerror=alert(1)>'
    sweep = make_sweep(
        tmp_path, "results/<i>", title="<u>&amp;", tasks=(task,), variants=HOSTILE, note="<s>", rates=(1e-3,)
    )
    page = Page(write_report([sweep], tmp_path / "out"))
    assert {"img", "b", "u", "i", "s"} & {tag for tag, _ in page.elements} == {"i"}  # our own, of the colour scale
    assert [attrs for tag, attrs in page.elements if tag == "i"] == [{}]
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 4
    for name in (*HOSTILE, task):
        assert name in page.text
    heat = next(figure for figure in page.data["figures"].values() if figure.get("cells"))
    assert heat["layout"]["xaxis"]["ticktext"][0] == "&lt;b&gt;&amp;"
    assert all(re.fullmatch(r"[\w.-]+", path.name) for path in (tmp_path / "out").rglob("*"))
    text = next((tmp_path / "out" / "tables").glob("*_scores.tex")).read_text()
    assert r"\%\$\#\_\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}" in text
    assert [line["variant"] for line in lines(next((tmp_path / "out" / "tables").glob("*_scores.csv")))] == list(
        HOSTILE
    )


def test_a_sweep_of_which_nothing_has_run_is_a_page_all_the_same(tmp_path):
    sweep = make_sweep(tmp_path, ran=0)
    page = Page(write_report([sweep], tmp_path / "out"))
    assert "0 of 48 finished; 48 planned" in page.text
    assert "inconclusive" in page.text
    assert "runs are missing" in page.text
    assert "No run has finished yet." in page.text
    assert "Learning curves" not in page.text
    assert len(page.data["cells"]["results-R3-smoke"][0]["runs"]) == 6  # all that were planned
    assert not list((tmp_path / "out" / "figures").glob("*"))


def test_one_seed_has_no_interval_and_decides_nothing(tmp_path):
    sweep = make_sweep(tmp_path, tasks=("Depo",), seeds=(1,), rates=(1e-3,), unfinished=0, failed=0, hops=())
    page = Page(write_report([sweep], tmp_path / "out"))
    assert "One seed has no interval." in page.text
    assert {line["outcome"] for line in lines(tmp_path / "out" / "tables" / "results-R3-smoke_verdicts.csv")} == {
        "inconclusive"
    }
    assert "NaN" not in page.text
    assert "inf" not in re.findall(r"\w+", page.text)
    for gone in ("Learning-rate sensitivity", "By difficulty"):
        assert gone not in page.text
    heat = next(figure for figure in page.data["figures"].values() if figure.get("cells"))
    assert all("±" not in text and "n=1" in text for text in heat["data"][1]["text"])


def test_a_run_of_another_configuration_does_not_count_as_finished(tmp_path):
    sweep = make_sweep(
        tmp_path, tasks=("Depo",), variants=("A", "B"), rates=(1e-3,), seeds=(1, 2), unfinished=0, failed=0
    )
    path = next(tmp_path.rglob("results.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config_hash": "other"}))
    tables = SweepTables(sweep)
    assert sum(line["runs"] for line in tables.scores) == 3
    assert [line["unfinished"] for line in tables.scores if line["unfinished"]] == ["1 of another configuration"]


def test_a_run_without_the_metric_does_not_count_as_finished(tmp_path):
    sweep = make_sweep(
        tmp_path, tasks=("Depo",), variants=("A", "B"), rates=(1e-3,), seeds=(1, 2), unfinished=0, failed=0
    )
    path = next(tmp_path.rglob("results.json"))
    path.write_text(path.read_text().replace('"test/accuracy":', '"test/other":'))
    page = Page(write_report([sweep], tmp_path / "out"))
    assert "3 of 4 finished; 1 without a score" in page.text


def test_losses_are_better_when_lower(tmp_path):
    said = (Statement(better="good", than="bad", by=0.1),)
    sweep = make_sweep(
        tmp_path,
        tasks=("text",),
        variants=("bad", "good"),
        rates=(1e-3, 2e-3),
        metrics={"text": "test/bits_per_byte"},
        skill={"bad": 0.3, "good": 0.8},
        expect=said,
        unfinished=0,
        failed=0,
        hops=(),
    )
    tables = SweepTables(sweep)
    bad, good = tables.scores
    assert good["mean"] < bad["mean"]
    assert shares_of([bad, good], "mean") == [0.0, 1.0]
    assert tables.differences[0]["first"] == "good"
    assert tables.differences[0]["difference"] > 0.5
    assert tables.verdicts[0]["outcome"] == "confirmed"
    assert in_words(sweep.verdicts[0]) == "good is lower by at least 0.1 than bad on text (bits per byte)."
    page = Page(write_report([sweep], tmp_path / "out"))
    assert "Colours go from the worst to the best of each row." in page.text
    board = re.findall(
        r">(good|bad)</td>", (tmp_path / "out" / "index.html").read_text().partition('id="leaderboard"')[2]
    )
    assert board[0] == "good"


def test_runs_alone_make_a_page(tmp_path):
    plain_run(tmp_path / "logs" / "a")
    plain_run(tmp_path / "logs" / "b", "<b>", "failed")
    page = Page(write_report([], tmp_path / "out", find_runs(tmp_path / "logs")))
    assert "Runs outside of sweeps" in page.text
    assert "<b>" in page.text
    assert len(lines(tmp_path / "out" / "tables" / "runs.csv")) == 2


def test_the_leaderboard_keeps_other_data_apart(tmp_path):
    first = make_sweep(tmp_path, "results/R3", tasks=("Depo",), variants=("A", "B"), rates=(1e-3,), seeds=(1, 2))
    second = make_sweep(tmp_path, "results/R4", tasks=("Depo",), variants=("A", "C"), rates=(1e-3,), seeds=(1, 2))
    third = make_sweep(tmp_path, "results/R5", tasks=("Depo",), variants=("D", "E"), rates=(1e-3,), seeds=(1, 2))
    for path in third.path.parent.rglob("../../../../jobs/*/results.json"):
        if json.loads(path.read_text())["config_hash"] in {job["name"] for job in third.plan["jobs"]}:
            path.write_text(path.read_text().replace('"N": 8', '"N": 9'))
    page = Page(write_report([first, second, third], tmp_path / "out"))
    assert "task=depo, N=8" in page.text
    assert "task=depo, N=9" in page.text
    board = lines(tmp_path / "out" / "tables" / "leaderboard.csv")
    assert [line["data"] for line in board] == sorted(line["data"] for line in board)
    means = [float(line["mean"]) for line in board if line["data"].endswith("8")]
    assert means == sorted(means, reverse=True)


def test_a_copied_sweep_stands_beside_the_first(tmp_path):
    small = {"tasks": ("Depo",), "variants": ("A", "B"), "ran": 0}
    page = Page(write_report([make_sweep(tmp_path / name, **small) for name in ("one", "two")], tmp_path / "out"))
    assert {"results-R3-smoke", "results-R3-smoke-2"} <= set(page.all("id"))
    assert len(set(page.all("id"))) == len(page.all("id"))


def test_published_numbers():
    assert published("Depo1(K=8)", "Llama(NoPE) Canon-ABCD(res)", "N=225", "12L768D") == [100.0, 100.0]
    assert len(published("Mano", "GDN Canon-AbCD(res)", "L=16", "8L512D")) == 1
    assert published("Depo2(K=16)", "GLA conv1d", "N=75", "8L512D") == []  # the paper has none
    with pytest.raises(ConfigError, match=r"published task='Depo1'.*did you mean 'Depo1\(K="):
        published("Depo1", "GLA conv1d", "N=225", "8L512D")
    assert "lm_eval_avg13" in table("part42_llama_best_tasks")
    with pytest.raises(ConfigError, match="did you mean 'part41_synthetic'"):
        table("part41_syntetic")


def test_published_numbers_stand_beside_ours_in_their_unit(page, tmp_path):
    where = {"task": "Depo1(K=4)", "difficulty": "N=225", "size": "12L768D"}
    plan = {"tasks": {"Depo": where}, "variants": {"RoPE": "Llama(RoPE) original", "NoPE": "Llama(NoPE) originl"}}
    tables = SweepTables(make_sweep(tmp_path, published=plan))
    found, problems = beside(tables)
    assert [(line["quantity"], line["published"]) for line in found] == [
        ("accuracy at k=4, %", 93.0),
        ("accuracy at k=2, %", 100.0),
    ]
    of_hop = {
        line["number"]: line["mean"] for line in tables.groups if (line["task"], line["variant"]) == ("Depo", "RoPE")
    }
    assert [line["mean"] for line in found] == [pytest.approx(100 * of_hop[4]), pytest.approx(100 * of_hop[2])]
    assert found[0]["best"] >= found[0]["mean"]
    assert len(problems) == 1
    assert "did you mean 'Llama(NoPE) original'" in problems[0]
    assert problems[0] in page.text


def config(root, **more):
    plain = {"sweeps": [], "runs": True, "output": str(root / "out"), "paths": {"log_dir": str(root / "logs")}}
    return OmegaConf.create(plain | more)


def test_the_entry_point_reports_what_is_on_disk(tmp_path, capsys):
    make_sweep(tmp_path, tasks=("Depo",), variants=("A", "B"), rates=(1e-3,), hops=())
    plain_run(tmp_path / "logs" / "train" / "runs" / "one")
    assert report(config(tmp_path)) == tmp_path / "out" / "index.html"
    told = capsys.readouterr().out
    assert "results/R3/smoke: inconclusive, 4 of 6 runs finished; NoPE with Canon layers rises" in told
    assert "1 run outside of sweeps" in told
    assert f"report: {tmp_path / 'out' / 'index.html'}" in told


def test_sweeps_are_chosen_by_name(tmp_path):
    small = {"tasks": ("Depo",), "variants": ("A", "B"), "rates": (1e-3,), "ran": 0}
    for name in ("results/R3", "results/R4"):
        make_sweep(tmp_path, name, **small)
    plain_run(tmp_path / "logs" / "one")
    sweeps = find_sweeps(tmp_path)
    assert chosen(sweeps, []) == sweeps
    assert [s.name for s in chosen(sweeps, ["results/R4/smoke"])] == ["results/R4"]
    assert [run.folder.name for run in outside_of(sweeps, tmp_path)] == ["one"]
    with pytest.raises(ConfigError, match=r"no sweep 'R5'.*There are: results/R3, results/R3/smoke, results/R4"):
        chosen(sweeps, ["R5"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "nothing to report below .*: python src/sweep.py .* python src/train.py"),
        ({"sweeps": ["results/R3"]}, "no sweep 'results/R3' has been run; there are none yet"),
        ({"sweeps": "results/R3"}, "sweeps='results/R3': a list of names"),
        ({"runs": "no"}, "runs='no': true or false"),
        ({"output": None}, "output=None: a folder"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        report(config(tmp_path, **more))
    assert not (tmp_path / "out").exists()


def test_numbers_are_written_as_people_read_them():
    assert [number(x) for x in (0.97138, 0.0, -0.0471, 0.0012345, 12345.6, None, float("nan"))] == [
        "0.971", "0.000", "−0.047", "0.0012", "12,346", "–", "–",
    ]  # fmt: skip
    assert number(0.0047, like=0.9) == scored(0.0047, "test/accuracy") == "0.005"
    assert scored(0.00472, "test/kl") == "0.0047"
    assert interval(0.00791, 0.0541, signed=True) == "[+0.008, +0.054]"
    assert interval(None, 1.0) == "no interval"
    assert [compact(x) for x in (5232, 17_696, 999_600, 1.3e6, 12, 1.5)] == [
        "5.23k",
        "17.7k",
        "1.00M",
        "1.30M",
        "12",
        "1.50",
    ]
    assert compact(5.95e13, "FLOP") == "59.5 TFLOP"
    assert metric_words("test/accuracy/hop4") == "accuracy at hop4"
    assert latex("a_b & 50%") == r"a\_b \& 50\%"
    assert list(slugs(["a/b", "a b", "A-B", "<>"]).values()) == ["a-b", "a-b-2", "A-B-3", "unnamed"]


def test_the_scale_is_uniform_and_its_text_can_be_read():
    to_cones = np.linalg.inv(palette._FROM_CONES)
    to_lab = np.linalg.inv(palette._FROM_OKLAB)
    for theme in palette.THEMES:
        colors = [[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in palette.scale(theme, 9)]
        rgb = np.array(colors)
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        lab = np.cbrt(linear @ to_cones.T) @ to_lab.T
        steps = np.linalg.norm(np.diff(lab, axis=0), axis=1)
        assert steps.max() < 1.1 * steps.min()  # colours are whole numbers
        lightness = lab[:, 0] if theme == "dark" else -lab[:, 0]
        assert (np.diff(lightness) > 0).all()
        assert min(palette.contrast(*palette.on_scale(theme, share)) for share in np.linspace(0, 1, 100)) >= 4.5


def test_colours_have_contrast_in_both_themes():
    for theme in palette.THEMES.values():
        for text in ("ink", "muted", "accent", "good", "bad", "unsure"):
            for ground in ("paper", "panel", "faint"):
                assert palette.contrast(theme[text], theme[ground]) >= 4.5
        for tone in ("good", "bad", "unsure"):
            assert palette.contrast(theme[tone], theme[f"{tone}-paper"]) >= 4.5
        for i in range(len(palette.SYMBOLS)):
            assert palette.contrast(theme[f"v{i}"], theme["paper"]) >= 3.4


# What protanopes, deuteranopes and tritanopes see, linear RGB to linear RGB (Machado et al. 2009).
BLIND = [
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
]


@pytest.mark.parametrize("theme", list(palette.HUES))
def test_hues_stay_apart_for_the_colour_blind(theme):
    to_cones = np.linalg.inv(palette._FROM_CONES)
    to_lab = np.linalg.inv(palette._FROM_OKLAB)
    rgb = np.array([[int(hue[i : i + 2], 16) / 255 for i in (1, 3, 5)] for hue in palette.HUES[theme]])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    for seen in (np.eye(3), *map(np.array, BLIND)):
        lab = np.cbrt(np.clip(linear @ seen.T, 0, 1) @ to_cones.T) @ to_lab.T
        apart = np.linalg.norm(lab[:, None] - lab, axis=2) + np.eye(len(lab))
        assert apart.min() > 0.05


def test_a_variant_looks_the_same_everywhere_and_like_no_other_beside_it():
    many = [f"v{i}" for i in range(17)]
    sweeps = [list(VARIANTS), ["GLA", "RoPE"], many, ["GLA", *many[:3]]]
    found = palette.looks(sweeps)
    for names in sweeps:
        assert len({found[name] for name in names}) == len(names)
        assert len({found[name].hue for name in names}) == min(len(names), 7)
    assert found["GLA"].dash == "solid"


def test_the_page_names_what_was_not_validated_and_how_rates_were_chosen(tmp_path, capsys):
    sweep = make_sweep(tmp_path, tasks=("Depo",), variants=("A", "B"), seeds=(1, 2), unfinished=0, failed=0, hops=())
    for job in sweep.plan["jobs"]:
        if job["learning_rate"] == 4e-3:
            path = sweep.path.parent / job["folder"] / "results.json"
            path.write_text(path.read_text().replace('"val/accuracy"', '"val/other"'))
    page = Page(report(config(tmp_path)))
    assert "4 of 8 finished; 4 without a validation" in page.text
    assert "val/accuracy was not measured, by which the learning rate is chosen" in page.text
    assert "its learning rate was chosen while runs are missing (2 of 2 at 0.002, 0 of 2 at 0.004)" in page.text
    assert "4 of its runs are without a validation, and count nowhere" in capsys.readouterr().out
    # Legends list what there is something of: of learning rates there is one left.
    assert page.text.count("Learning-rate sensitivity") == 0


def test_colours_do_not_make_much_of_what_is_uncertain():
    def line(mean, half):
        low, high = (None, None) if half is None else (mean - half, mean + half)
        return {"metric": "test/bits_per_byte", "lower_is_better": True, "mean": mean, "low": low, "high": high}

    close = shares_of([line(2.00, 0.1), line(2.02, 0.1)], "mean")
    better, worse = [share for share in close if share is not None]
    assert 0.5 < better < 0.6  # 1 % better, and nobody knows
    assert better + worse == pytest.approx(1.0)
    assert shares_of([line(2.0, 0.1), line(2.02, 0.1)], "mean", uncertainty=0.001) == [1.0, 0.0]  # paired, it is known
    just = shares_of([line(2.0, 0.1), line(2.1, 0.1)], "mean", uncertainty=0.1)
    assert just == [pytest.approx(0.75), pytest.approx(0.25)]  # no more than the middle half for what is not confirmed
    assert shares_of([line(2.0, None), line(3.0, None)], "mean") == [0.5, 0.5]  # one seed each
    assert shares_of([line(2.0, 0.1)], "mean") == [0.5]
    assert shares_of([line(2.0, 0.1), {}, line(2.0, 0.1)], "mean") == [0.5, None, 0.5]


def test_legends_list_the_variants_that_have_data(tmp_path):
    sweep = make_sweep(tmp_path, tasks=("Depo",), ran=0.5, unfinished=0, failed=0)
    for job in sweep.plan["jobs"]:
        if job["variant"] == "RoPE":
            (sweep.path.parent / job["folder"] / "results.json").unlink(missing_ok=True)
    page = Page(write_report([sweep], tmp_path / "out"))
    assert set(page.all("data-variant")) == {"NoPE", "NoPE + Canon", "RoPE + Canon"}


def test_why_a_run_failed_can_be_read_on_a_phone(page):
    """There a line of such a table is a paragraph, with the heads of columns before the values."""
    labels = page.all("data-label")
    assert {"why", "status", "variant"} <= set(labels)
    assert "stacked" in page.all("class")


def test_long_tables_are_cut_on_the_page_and_whole_in_the_files(tmp_path, monkeypatch):
    for name in "abcdefg":
        plain_run(tmp_path / "logs" / name)
    monkeypatch.setattr("src.reporting.page.MOST_ROWS", 5)
    page = Page(write_report([], tmp_path / "out", find_runs(tmp_path / "logs")))
    assert "The newest 5 of 7 runs; the CSV file has all of them." in page.text
    assert len(lines(tmp_path / "out" / "tables" / "runs.csv")) == 7


def test_large_sweeps_are_drawn_as_files_when_asked(tmp_path, monkeypatch):
    sweep = make_sweep(tmp_path, tasks=("Depo",), variants=("A", "B"))
    monkeypatch.setattr("src.reporting.page.MOST_PANELS", 3)
    page = Page(write_report([sweep], tmp_path / "out"))
    assert "pictures=true draws those too" in page.text
    assert len(list((tmp_path / "out" / "figures").iterdir())) == 2  # scores and verdicts
    write_report([sweep], tmp_path / "out", pictures=True)
    assert len(list((tmp_path / "out" / "figures").iterdir())) > 4


def test_progress_is_told_now_and_then(tmp_path, capsys):
    told: list[str] = []
    sweep = make_sweep(tmp_path, tasks=("Depo",), variants=("A", "B"))
    write_report([sweep], tmp_path / "out", told=told.append)
    assert told[0] == "reading the runs of sweeps, 1 of 12"
    assert "drawing results/R3/smoke, 1 of 1" in told
    with Telling(every=0.0) as telling:
        telling("reading")
    assert "reading ...\n" in capsys.readouterr().out


def test_the_folder_of_a_report_has_one_key(tmp_path):
    make_sweep(tmp_path, tasks=("Depo",), ran=0)
    paths = {"log_dir": str(tmp_path / "logs"), "output_dir": str(tmp_path / "elsewhere")}
    with pytest.raises(ConfigError, match=r"paths.output_dir=.*elsewhere: the folder of a report is output="):
        report(config(tmp_path, paths=paths))


def test_a_report_needs_neither_pytorch_nor_lightning():
    code = "import sys, src.reporting.page; print(sorted({'torch', 'lightning', 'pandas', 'hydra'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_needs_no_pytorch(tmp_path):
    """Half of the memory and most of the time of a small report would be its import."""
    plain_run(tmp_path / "logs" / "a")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['report', {f'paths.log_dir={tmp_path}/logs'!r}, "
    )
    code += f"{f'output={tmp_path}/report'!r}, {f'hydra.run.dir={tmp_path}/run'!r}]; import src.report as r; "
    code += "r.entrypoint('report', r.report); print(sorted({'torch', 'lightning', 'numba'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "report" / "index.html").exists()
