"""Folders that somebody damaged or made up: every one is named in the report and on the console, and none ends it."""

import csv
import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from src.config import ConfigError
from src.report import report
from src.reporting import tables as tables_module
from src.reporting.page import write_report
from src.reporting.results import SweepResults, find_sweeps
from src.reporting.tables import SweepTables
from src.runs import runs as runs_module
from src.runs.foreign import Unreadable, read_json, read_yaml
from src.runs.runs import Run, find_runs, runs_table
from src.runs.schema import MANIFEST, RECORD
from src.sweeps.plan import Statement
from tests.reporting.fake_sweeps import make_sweep, plain_run
from tests.runs import main

BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)) * 20
MERGES = "a: &a {k: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [{', '.join(['*a'] * 50)}]}}\n" for i in range(50))


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


DAMAGES = {
    "empty config": ("config.yaml", ""),
    "a list for a config": ("config.yaml", "- a\n"),
    "a word for a section": ("config.yaml", "model: large\ncanon: [A]\n"),
    "a word for a number": ("config.yaml", "seed: seven\n"),
    "a list for a name": ("config.yaml", "name: [a, b]\n"),
    "no YAML": ("config.yaml", "a: [1\n"),
    "binary config": ("config.yaml", b"\xff\xfe\x00\x01"),
    "nested config": ("config.yaml", "a: " + "[" * 50_000),
    "nested lists": ("config.yaml", "- " * 50_000 + "a"),
    "nested mappings": ("config.yaml", "{a: " * 20_000),
    "aliases": ("config.yaml", BOMB),
    "merge keys": ("config.yaml", MERGES),
    "a number to the base of sixty": ("config.yaml", "seed: 1" + ":1" * 200_000),
    "merge keys by their tag": ("config.yaml", "a: &a {k: 1}\nb: {!!merge k: [*a, *a]}\n"),
    "merge keys by the whole name of their tag": ("config.yaml", "a: {!<tag:yaml.org,2002:merge> k: {b: 1}}\n"),
    "a number by its tag": ("config.yaml", 'a: !!int "1:1:1 "\n'),
    "a list with a tag": ("config.yaml", "a: !!set {b}\n"),
    "numbers for keys, with one hash": (
        "config.yaml",
        "a: {" + ", ".join(f"{k * (2**61 - 1)}: 1" for k in range(1, 9)) + "}\n",
    ),
    "a fraction for a key": ("config.yaml", "a: {b: 1, ? 2305843009213693952.5 : 1}\n"),
    "a list for a key": ("config.yaml", "a: {? [b] : 1}\n"),
    "many values": ("config.yaml", "a: [" + "b," * 100_000 + "b]\n"),
    "an object": ("config.yaml", "a: !!python/object/apply:os.system [exit]\n"),
    "a day that is none": ("config.yaml", "a: 2001-99-99\n"),
    "huge config": ("config.yaml", "a: " + "x" * (2 << 20)),
    "a number for a status": ("run.json", '{"status": 5}'),
    "a list for the machine": ("run.json", '{"status": "finished", "environment": ["x"]}'),
    "a word for the attempts": ("run.json", '{"status": "failed", "earlier": "none"}'),
    "a huge process": ("run.json", '{"status": "running", "host": "x", "pid": 1' + "0" * 60 + "}"),
    "nested record": ("run.json", "[" * 100_000),
    "nested but closed": ("run.json", '{"a": ' + "[" * 500 + "]" * 500 + "}"),
    "no mapping": ("run.json", "[1, 2]"),
    "half a record": ("run.json", '{"status": "fin'),
    "a word for a score": ("results.json", '{"metrics": {"test/loss": "low"}, "seconds": 1}'),
    "true for a score": ("results.json", '{"metrics": {"test/loss": true}, "seconds": 1}'),
    "a list for scores": ("results.json", '{"metrics": [1], "seconds": 1}'),
    "no time": ("results.json", '{"metrics": {}, "seconds": null}'),
    "an endless time": ("results.json", '{"metrics": {}, "seconds": Infinity}'),
    "a word for a cost": ("results.json", '{"metrics": {}, "seconds": 1, "parameters": "many"}'),
    "a list for chance": ("results.json", '{"metrics": {}, "seconds": 1, "chance": [1]}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_and_the_others_are_reported(tmp_path, capsys, damage):
    name, content = DAMAGES[damage]
    plain_run(tmp_path / "logs" / "good")
    plain_run(tmp_path / "logs" / "bad")
    write(tmp_path / "logs" / "bad" / name, content)
    table = runs_table(find_runs(tmp_path / "logs")).set_index("folder")
    assert table.loc[str(tmp_path / "logs" / "good"), "status"] == "finished"
    assert table.loc[str(tmp_path / "logs" / "bad"), "status"] == "unreadable"
    page = reported(tmp_path)
    told = capsys.readouterr().out
    assert f"could not be read: {tmp_path / 'logs' / 'bad'}: {name}" in told
    assert "What could not be read" in page
    assert f"{name}: " in page


def test_numbers_lists_and_names_of_an_honest_configuration_are_read(tmp_path):
    path = tmp_path / "config.yaml"
    text = "a: {4: 2, 100: [x, {b: 1.5}], '2305843009213693952': y, true: z, long-name-1e5: null}\n"
    path.write_text(text + "d: 12345678901\ne: &e [1]\nf: *e\n2024-run: 2001-02-03\n")
    found = read_yaml(path)
    assert found["a"] == {4: 2, 100: ["x", {"b": 1.5}], "2305843009213693952": "y", True: "z", "long-name-1e5": None}
    assert (found["d"], found["f"], found["2024-run"].year) == (12345678901, [1], 2001)


def reported(root: Path) -> str:
    plain = {"sweeps": [], "runs": True, "output": str(root / "out"), "paths": {"log_dir": str(root / "logs")}}
    return report(OmegaConf.create(plain)).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "results.json", "csv/metrics.csv"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "circle", "device"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, name, kind):
    sweep = make_sweep(
        tmp_path, tasks=("Depo",), variants=("A", "B"), rates=(1e-3,), seeds=(1, 2), unfinished=0, failed=0
    )
    folder = sweep.path.parent / sweep.plan["jobs"][0]["folder"]
    path = folder / name
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "circle": lambda: path.symlink_to(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }[kind]()
    problems: list[tuple[str, str]] = []
    write_report(find_sweeps(tmp_path), tmp_path / "out", find_runs(tmp_path / "logs"), problems)
    assert {(Path(where).name, what.partition(":")[0]) for where, what in problems} == {
        (folder.resolve().name, name)
    } or (name == "csv/metrics.csv" and problems)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path):
    plain_run(tmp_path / "logs" / "bad")
    (tmp_path / "logs" / "bad" / "run.json").chmod(0)
    assert Run(tmp_path / "logs" / "bad").problems == ["run.json: Permission denied"]


def test_a_circle_of_folders_ends(tmp_path):
    plain_run(tmp_path / "logs" / "one")
    (tmp_path / "logs" / "one" / "again").symlink_to(tmp_path / "logs")
    assert len(find_runs(tmp_path / "logs")) == 1


def test_odd_jobs_leave_the_sweep_out_and_name_it(tmp_path, capsys):
    good = make_sweep(tmp_path, "results/R1", tasks=("Depo",), variants=("A", "B"), rates=(1e-3,))
    damages = [
        lambda plan: plan["jobs"].append("x"),
        lambda plan: plan["jobs"][0].update(seed="one"),
        lambda plan: plan["jobs"][0].update(learning_rate=[1]),
        lambda plan: plan["jobs"][0].update(task="none"),
        lambda plan: plan["jobs"][0].update(settings=None),
        lambda plan: plan.update(variants={"A": 1}),
        lambda plan: plan.update(metrics=["x"]),
        lambda plan: plan.update(expect=[{"better": "A", "than": "B", "by": "much"}]),
        lambda plan: plan.update(match="parameters"),
        lambda plan: plan.update(published={"tasks": [1]}),
    ]
    for number, damage in enumerate(damages):
        plan = json.loads(good.path.read_text()) | {"name": f"bad{number}"}
        damage(plan)
        write(tmp_path / "logs" / "sweeps" / f"bad{number}" / "manifest.json", json.dumps(plan))
    problems: list[tuple[str, str]] = []
    assert [sweep.name for sweep in find_sweeps(tmp_path, problems)] == ["results/R1"]
    assert len(problems) == len(damages)
    page = reported(tmp_path)
    told = capsys.readouterr().out
    for number in range(len(damages)):
        assert f"bad{number}/manifest.json" in told
        assert f"bad{number}/manifest.json" in page


def test_a_folder_outside_is_at_most_read_as_a_run(tmp_path):
    """It counts only if it says that it is this job."""
    sweep = make_sweep(
        tmp_path, tasks=("Depo",), variants=("A", "B"), rates=(1e-3,), seeds=(1, 2), unfinished=0, failed=0
    )
    plan = json.loads(sweep.path.read_text())
    plan["jobs"][0]["folder"], plan["jobs"][1]["folder"] = "/etc", "../" * 40 + "proc/self"
    third, last = (sweep.path.parent / plan["jobs"][i]["folder"] for i in (2, 3))
    shutil.rmtree(third)
    shutil.copytree(last, third)
    write(sweep.path, json.dumps(plan))
    found = SweepResults(sweep.path)
    assert [row["status"] for row in found.rows] == ["planned", "planned", "of another configuration", "finished"]
    write_report([found], tmp_path / "out")


@pytest.mark.parametrize("how", ["symbolic", "hard"])
def test_one_curve_of_many_runs_is_read_once(tmp_path, monkeypatch, how):
    """A link to it takes no room, and a manifest may list thousands of runs."""
    sweep = make_sweep(
        tmp_path, tasks=("Depo",), variants=("A",), rates=(1e-3,), seeds=(1, 2, 3, 4), unfinished=0, failed=0
    )
    first, *others = [sweep.path.parent / job["folder"] / "csv" / "metrics.csv" for job in sweep.plan["jobs"]]
    first.write_text("step,train/loss\n" + "".join(f"{i},{i}\n" for i in range(5000)))
    for path in others:
        path.unlink(missing_ok=True)
        path.symlink_to(first) if how == "symbolic" else os.link(first, path)
    read = []
    monkeypatch.setattr(runs_module, "read_bytes", lambda path, most: read.append(path) or path.read_bytes())
    monkeypatch.setattr(tables_module, "MOST_READ", 4000)
    found = [line for line in SweepTables(SweepResults(sweep.path)).curves if line["quantity"] == "train/loss"]
    assert len([path for path in read if path.name == "metrics.csv"]) == 1
    assert {line["seeds"] for line in found} == {4}
    assert found[0]["mean"] < 100 < 4900 < found[-1]["mean"]


def test_names_of_metrics_are_no_formulas(tmp_path):
    """In curves, rates and costs too: one that cannot be set would be the end of the whole report."""
    sweep = make_sweep(tmp_path, tasks=("Depo",), variants=("A", "B"), rates=(1e-3, 2e-3), seeds=(1, 2), failed=0)
    for path in tmp_path.rglob("*"):
        if path.suffix in (".json", ".csv"):
            text = path.read_text()
            path.write_text(text.replace("/accuracy", "/$\\\\frac{a}$" if path.suffix == ".json" else "/$\\frac{a}$"))
    found = SweepResults(sweep.path)
    assert found.plan["metrics"]["Depo"].endswith("$\\frac{a}$")
    write_report([found], tmp_path / "out", pictures=True)
    assert (tmp_path / "out" / "index.html").exists()


def test_names_that_are_no_text_are_shown_all_the_same(tmp_path, capsys):
    plain_run(tmp_path / "logs" / "one")
    odd = os.fsencode(tmp_path / "logs") + b"/odd\xff\x1b[31m"
    os.rename(os.fsencode(tmp_path / "logs" / "one"), odd)
    path = Path(os.fsdecode(odd)) / "run.json"
    record = json.loads(path.read_text()) | {"status": "failed", "error": "\ud800 \u001b[31mred \x00"}
    path.write_text(json.dumps(record))
    assert "odd" in reported(tmp_path)
    assert "\x1b" not in capsys.readouterr().out


def test_mutated_files_end_no_report(tmp_path):
    """Bytes are changed, cut and repeated; values are replaced by values of other kinds."""
    rng = random.Random(0)
    odd = [
        None,
        True,
        -1,
        10**30,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x" * 300,
        [],
        [1],
        {},
        {"a": [None]},
        "\ud800",
    ]
    sweep = make_sweep(tmp_path, tasks=("Depo",), variants=("A", "B"), rates=(1e-3, 2e-3), seeds=(1, 2), unfinished=0)
    plain_run(tmp_path / "logs" / "one")
    files = [p for p in (tmp_path / "logs").rglob("*") if p.suffix in (".json", ".yaml", ".csv")]
    before = {path: path.read_bytes() for path in files}

    def replaced(node):
        if isinstance(node, dict) and node:
            key = rng.choice(list(node))
            node[key] = rng.choice(odd) if rng.random() < 0.4 else replaced(node[key])
        elif isinstance(node, list) and node:
            place = rng.randrange(len(node))
            node[place] = rng.choice(odd) if rng.random() < 0.4 else replaced(node[place])
        else:
            return rng.choice(odd)
        return node

    for round_ in range(60):
        for path in rng.sample(files, 3):
            content = before[path]
            if path.suffix == ".json" and rng.random() < 0.7:
                content = json.dumps(replaced(json.loads(content))).encode()
            else:
                start, end = sorted(rng.choices(range(len(content)), k=2))
                content = rng.choice([content[:start], content[:start] + content[end:], content + content[start:end]])
                content = content[: len(content) // 2] + rng.randbytes(2) + content[len(content) // 2 :]
            path.write_bytes(content)
        problems: list[tuple[str, str]] = []
        sweeps = find_sweeps(tmp_path, problems)
        if round_ % 10 == 0:
            write_report(sweeps, tmp_path / "out", find_runs(tmp_path / "logs"), problems)
        else:
            for found in sweeps:
                assert found.rows is not None
                assert found.verdicts is not None
            runs_table(find_runs(tmp_path / "logs"))
        for path, content in before.items():
            path.write_bytes(content)
    assert sweep.rows


def test_reading_is_bounded(tmp_path):
    write(tmp_path / "a.json", b"[" * (17 << 20))
    with pytest.raises(Unreadable, match="larger than"):
        read_json(tmp_path / "a.json", RECORD)
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "b.yaml")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "a.json" / "b", MANIFEST)


def test_all_problems_are_in_a_file(tmp_path):
    for number in range(30):
        plain_run(tmp_path / "logs" / f"bad{number}")
        write(tmp_path / "logs" / f"bad{number}" / "config.yaml", "")
    reported(tmp_path)
    with (tmp_path / "out" / "tables" / "unreadable.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 30


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-32-be", "latin-1"])
def test_json_is_read_in_utf_8_alone(tmp_path, encoding):
    """Python's json looks for other encodings too, in which nobody has looked for what steers a terminal."""
    text = json.dumps({"status": "failed", "error": "\x1b[31m \ud800 \x00", "é": 1}, ensure_ascii=encoding != "latin-1")
    write(tmp_path / "run.json", text.replace("\ud800", "").encode(encoding))
    with pytest.raises(Unreadable, match="no JSON"):
        read_json(tmp_path / "run.json", RECORD)
    write(tmp_path / "run.json", json.dumps({"error": "\x1b[31m é"}).encode("utf-8-sig"))
    assert read_json(tmp_path / "run.json", RECORD) == {"error": "\ufffd[31m é"}


def test_yaml_has_no_escapes_either(tmp_path):
    write(tmp_path / "a.yaml", 'name: &n "\\e[31m\\0\\x9b"\n"\\a": [*n, *n]\n')
    clean = "\ufffd[31m\ufffd\ufffd"
    assert read_yaml(tmp_path / "a.yaml") == {"name": clean, "\ufffd": [clean, clean]}
    twice = 'a0: &a0 ["\\e"]\n' + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(45))
    write(tmp_path / "b.yaml", twice)
    assert read_yaml(tmp_path / "b.yaml")["a0"] == ["\ufffd"]


BIG = 1.7e308
ABSURD = {
    "scores": {"values": (BIG, -BIG)},
    "a score of all": {"values": (BIG, BIG)},
    "steps": {"curve": "step,train/loss\n" + "".join(f"{1.6e308 + i * 1e300},1.0\n" for i in range(900))},
    "a negative step": {"curve": "step,train/loss\n-1e300,2\n5,1\n"},
    "values of a curve": {"curve": "step,train/loss\n" + "".join(f"{i},{(-1) ** i * BIG}\n" for i in range(900))},
    "a group": {"metrics": {"test/accuracy/hop" + "9" * 150: 0.1, "test/accuracy/hop1": 0.2}},
    "a long name": {"metrics": {"test/accuracy/hop" + "9" * 5000: 0.1}},
    "bounds": {"plan": {"expect": [{"better": "A", "than": "B", "by": by} for by in (BIG, -BIG)]}},
    "the name of a sweep": {"plan": {"name": "R" + "9" * 5000}},
    "digits that are none": {"plan": {"name": "²"}},
    "learning rates": {"plan": {"jobs": [{"learning_rate": 1e300}]}},
    "chance": {"results": {"chance": {"accuracy": BIG}}},
    "settings": {"plan": {"jobs": [{"settings": {"N": 10**4000, "seed": 1}}]}},
}
NAMED = {  # what the console says of it
    "scores": "0 of 6 runs finished",
    "a score of all": "0 of 6 runs finished",
    "steps": "csv/metrics.csv: step 1.6e+308",
    "a negative step": "csv/metrics.csv: step -1e+300",
    "a long name": "results.json: metrics.test/accuracy/hop999",
    "bounds": "manifest.json: expect.0.by: input should be less than or equal to",
    "learning rates": "manifest.json: jobs.0.learning_rate: input should be less than or equal to",
}


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_numbers_end_no_report(tmp_path, capsys, what):
    given = {"values": None, "curve": None, "metrics": {}, "plan": {}, "results": {}} | ABSURD[what]
    sweep = make_sweep(tmp_path, tasks=("Depo",), variants=("A", "B"), rates=(1e-3,), unfinished=0, failed=0)
    plan = json.loads(sweep.path.read_text())
    for job in plan["jobs"]:
        folder = sweep.path.parent / job["folder"]
        results = json.loads((folder / "results.json").read_text()) | given["results"]
        results["metrics"] |= given["metrics"]
        if given["values"]:
            results["metrics"]["test/accuracy"] = given["values"][job["variant"] == "B"]
        write(folder / "results.json", json.dumps(results))
        if given["curve"]:
            write(folder / "csv" / "metrics.csv", given["curve"])
    jobs = given["plan"].pop("jobs", [{}]) if what in ("learning rates", "settings") else [{}]
    plan["jobs"][0] |= jobs[0]
    write(sweep.path, json.dumps(plan | given["plan"]))
    plain_run(tmp_path / "logs" / "alone")
    reported(tmp_path)
    assert NAMED.get(what, "report: ") in capsys.readouterr().out


def test_an_absurd_score_is_told_apart_from_a_missing_one(tmp_path):
    sweep = make_sweep(tmp_path, tasks=("Depo",), variants=("A",), rates=(1e-3,), unfinished=0, failed=0)
    path = sweep.path.parent / sweep.plan["jobs"][0]["folder"] / "results.json"
    write(path, json.dumps(json.loads(path.read_text()) | {"metrics": {"test/accuracy": 1e31}}))
    row = SweepResults(sweep.path).rows[0]
    assert (row["status"], row["reason"]) == ("without a score", "test/accuracy is inf, or beyond 1e+30")


def job(number: int, variant: str = "a0", seed: int = 1) -> dict:
    said = {"name": "h", "task": "t0", "variant": variant, "settings": {"k": number}, "command": "c"}
    said["folder"] = f"f{number}-{variant}-{seed}"
    return said | {"seed": seed, "learning_rate": 0.1}


def listed(metrics: int = 1, variants: int = 1, expect: int = 0, jobs: list | None = None) -> dict:
    """A manifest of a sweep that never ran."""
    return {
        "name": "n",
        "scale": "",
        "metrics": {f"t{i}": "test/accuracy" for i in range(metrics)},
        "variants": [f"a{i}" for i in range(variants)],
        "expect": [{"better": "a0", "than": "a0"}] * expect,
        "jobs": jobs or [],
    }


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        (listed(metrics=10_000), "metrics: dictionary should have at most 100"),
        (listed(metrics=100, expect=51), "expect: 5,100 statements, .*; at most 5,000"),
        (listed(expect=10_000), "expect: list should have at most 5000"),
        (listed(variants=5000), "variants: list should have at most 100"),
        (listed(metrics=2, variants=100), "variants: 9,900 pairs of 100 variants on 2 tasks; at most 5,000"),
        (listed(variants=100, jobs=[job(0, seed=i) for i in range(11)]), "jobs: 54,450 seeds .*; at most 50,000"),
        (listed(expect=5000, jobs=[job(0, seed=i) for i in range(11)]), "jobs: 55,000 seeds .*; at most 50,000"),
        (listed(jobs=[job(i) for i in range(20_001)]), "jobs: list should have at most 20000"),
        (listed() | {"variants": ["x" * 5000]}, "variants.0: string should have at most 200"),
        (listed(jobs=[job(1), job(2), job(1)]), "jobs.2.folder: the same as that of jobs.0"),
    ],
)
def test_a_manifest_that_lists_too_much_is_unreadable(tmp_path, capsys, plan, named):
    """What a report makes of it grows with products, without a single run."""
    write(tmp_path / "logs" / "bad" / "manifest.json", json.dumps(plan))
    with pytest.raises(Unreadable, match=named):
        SweepResults(tmp_path / "logs" / "bad" / "manifest.json")
    plain_run(tmp_path / "logs" / "good")
    reported(tmp_path)
    assert "could not be read" in capsys.readouterr().out


def test_a_plan_that_no_report_could_read_is_refused_before_it_is_run(tmp_path):
    with pytest.raises(ConfigError, match=r"sweep: no report could read its plan: variants: 9,900 pairs"):
        make_sweep(tmp_path, tasks=("Depo", "Mano"), variants=[f"a{i}" for i in range(100)], seeds=(1,), expect=())
    with pytest.raises(ConfigError, match=r"plan: expect.0.by: input should be less than"):
        make_sweep(tmp_path, expect=(Statement("RoPE", "NoPE", 1e31),))
    assert not list(tmp_path.rglob("manifest.json"))


def test_the_largest_manifest_is_judged_in_no_time(tmp_path):
    jobs = [job(i, f"a{i % 100}") for i in range(20_000)]
    write(tmp_path / "manifest.json", json.dumps(listed(metrics=1, variants=100, expect=5000, jobs=jobs)))
    began = time.process_time()
    found = SweepResults(tmp_path / "manifest.json")
    assert len(found.verdicts) == 5000
    assert SweepTables(found).differences == []
    assert found.verdicts[0].reason == "runs are missing (200 planned)"
    assert time.process_time() - began < 20


@pytest.mark.parametrize("place", ["report", "sweeps"])
def test_a_link_on_the_way_to_what_is_written_is_refused(tmp_path, place, capsys):
    """The logs of a colleague; what is written below them must lie there."""
    make_sweep(tmp_path)
    logs = tmp_path / "logs"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("mine")
    if (logs / place).exists():
        (logs / place).rename(logs / "there")
    (logs / place).symlink_to(tmp_path / "mine")
    output = logs / place if place == "report" else logs / place / "new"
    with pytest.raises(SystemExit):
        main(report, "report", f"paths.log_dir={logs}", f"output={output}")
    assert "a link on the way leads to" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["index.html"]


@pytest.mark.parametrize(
    ("text", "curve", "said"),
    [
        ("step,train/loss\n0,1.5\n1,2.", {1: 1.5}, None),  # half of 2.75: a writer was killed, or is at it
        ("step,train/loss\n0,1.5\n1,two\n", {1: 1.5}, "1 of its rows are no rows of numbers"),
        ("step,train/loss\n0,1.5\n1,2.5,3\n", {1: 1.5}, "1 of its rows are no rows of numbers"),
        ("steps,train/loss\n0,1.5\n", {}, "it has no column 'step'"),
    ],
)
def test_rows_that_are_none_are_told_and_half_a_number_is_none(tmp_path, text, curve, said):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text(text)
    run = Run(tmp_path)
    assert run.curves(["train/loss"])["train/loss"] == curve
    assert run.problems == ([f"csv/metrics.csv: {said}"] if said else [])
