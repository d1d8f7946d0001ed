"""From runs to verdicts: which learning rate counts, what is paired, what may be said."""

import json
from collections import Counter
from pathlib import Path

import pytest

from src.evaluation import task_evaluators  # noqa: F401 (all evaluators)
from src.evaluation.evaluators import Evaluator
from src.evaluation.names import lower_is_better
from src.reporting.results import SweepResults, compare, find_sweeps, judge, write_manifest
from src.reporting.sections import facts
from src.reporting.statistics import difference
from src.reporting.tables import SweepTables
from src.runs.git import code_of
from src.runs.registry import write_json
from src.sweeps.manifest import data_name
from src.sweeps.plan import Job, Statement, Sweep
from tests.reporting.fake_sweeps import make_sweep


def sweep(**changes) -> Sweep:
    parts = {
        "title": "a test",
        "tasks": {"Depo": []},
        "variants": {"none": [], "ABCD": []},
        "axes": {"optimizer.lr": [0.1, 0.2], "seed,data.seed": [1, 2, 3]},
        "expect": [Statement("ABCD", "none", 0.3)],
    }
    return Sweep(**(parts | changes))


def results(
    folder: Path, scores: dict[tuple[str, float, int], tuple[float, float] | None], described: Sweep | None = None
):
    """``scores``: (variant, rate, seed) -> (validation, test), None for a job that has not finished."""
    described = described or sweep()
    metric = described.metric
    jobs = []
    for (variant, rate, seed), values in scores.items():
        name = f"{variant}-{rate}-{seed}"
        config = {"seed": seed, "optimizer": {"lr": rate}}
        jobs.append(
            Job("Depo", variant, {"optimizer.lr": rate, "seed,data.seed": seed}, [f"seed={seed}"], config, name)
        )
        run = folder / "jobs" / name
        run.mkdir(parents=True)
        status = {"status": "failed" if values is None else "finished", "host": "x", "pid": 1}
        (run / "run.json").write_text(json.dumps(status))
        if values is not None:
            metrics = {described.selection_of("Depo"): values[0], metric: values[1]}
            content = {"config_hash": name, "metrics": metrics, "parameters": 100, "seconds": 5.0}
            (run / "results.json").write_text(json.dumps(content))
    path = folder / "sweeps" / "a" / "manifest.json"
    write_manifest(path, "a", "smoke", described, jobs, folder / "jobs", "python src/sweep.py sweep=a")
    return SweepResults(path)


def grid(none, abcd):
    """Test scores by seed at rate 0.1; at 0.2 the validation is worse, and the test better."""
    found = {}
    for variant, values in (("none", none), ("ABCD", abcd)):
        for seed, value in enumerate(values, start=1):
            found[variant, 0.1, seed] = None if value is None else (0.9, value)
            found[variant, 0.2, seed] = None if value is None else (0.1, 0.99)
    return found


def test_the_learning_rate_is_chosen_on_the_validation_set(tmp_path):
    found = results(tmp_path, grid([0.1, 0.2, 0.3], [0.7, 0.8, 0.9]))
    none, abcd = found.cells
    assert (none.rate, abcd.rate) == (0.1, 0.1)
    assert none.by_seed == {1: 0.1, 2: 0.2, 3: 0.3}
    assert none.mean == pytest.approx(0.2)
    assert none.best == 0.99  # the paper's measure sees all runs
    assert (none.runs, none.planned) == (6, 6)
    assert none.costs["parameters"] == 100
    assert none.commands == [f"python src/train.py seed={seed}" for seed in (1, 2, 3)]


@pytest.mark.parametrize(
    ("none", "abcd", "outcome"),
    [
        ([0.1, 0.2, 0.3], [0.7, 0.8, 0.9], "confirmed"),
        ([0.1, 0.2, 0.3], [0.2, 0.3, 0.41], "contradicted"),
        ([0.1, 0.2, 0.3], [0.2, 0.9, 0.5], "inconclusive"),
        ([0.1, 0.2, 0.3], [0.9, None, None], "inconclusive"),
        ([0.1, 0.2, 0.3], [None, None, None], "inconclusive"),
    ],
)
def test_verdicts(tmp_path, none, abcd, outcome):
    found = results(tmp_path, grid(none, abcd))
    (verdict,) = found.verdicts
    assert verdict.outcome == found.outcome == outcome, verdict


def test_a_verdict_needs_both_intervals():
    clear = difference({(1,): 0.50, (2,): 0.52, (3,): 0.51}, {(1,): 0.0, (2,): 0.0, (3,): 0.0})
    assert judge(clear, 0.45)[0] == "confirmed"
    assert judge(clear, 0.505)[0] == "inconclusive"
    assert judge(clear, 0.56)[0] == "contradicted"
    wide = difference({(1,): 0.2, (2,): 0.8, (3,): 0.5}, {(1,): 0.0, (2,): 0.0, (3,): 0.0})
    # The bootstrap of three values says [0.2, 0.8]; Student, [-0.2, 1.2].
    assert wide.bootstrap.low > 0.1
    assert judge(wide, 0.1)[0] == "inconclusive"
    two = difference({(1,): 1.0, (2,): 1.0, (3,): 1.0}, {(1,): 0.0, (2,): 0.0})
    assert judge(two, 0.1) == (
        "inconclusive",
        "+1.000, 95% t [+1.000, +1.000], bootstrap [+1.000, +1.000], 2 pairs "
        "(1 runs without a partner); fewer than 3 seeds",
    )


@pytest.mark.parametrize(("a", "b"), [(0.7, 0.4), (0.9, 0.6), (0.3, 0.0)])
def test_rounding_does_not_decide(a, b):
    assert judge(difference({1: a, 2: a, 3: a}, {1: b, 2: b, 3: b}), 0.3)[0] == "confirmed"
    assert judge(difference({1: a, 2: a, 3: a}, {1: b, 2: b, 3: b}), 0.31)[0] == "contradicted"


def test_a_vain_repetition():
    assert judge(difference({1: 1.0}, {1: 0.0}), 0.1)[0] == "inconclusive"


def test_losses_are_better_when_lower(tmp_path):
    described = sweep(metric="test/bits_per_byte", expect=[Statement("ABCD", "none", 0.05)])
    scores = {}
    for seed in (1, 2, 3):
        scores["none", 0.1, seed], scores["ABCD", 0.1, seed] = (2.2, 2.2 + seed / 100), (2.0, 2.0 + seed / 100)
        scores["none", 0.2, seed], scores["ABCD", 0.2, seed] = (3.0, 3.0), (1.9, 1.9)
    found = results(tmp_path, scores, described)
    none, abcd = found.cells
    assert (none.rate, abcd.rate) == (0.1, 0.2)
    assert abcd.best == 1.9
    assert found.outcome == "confirmed"
    assert found.verdicts[0].best_difference == pytest.approx(2.21 - 1.9)


@pytest.mark.parametrize(("metric", "select"), [("test/accuracy", "val/loss"), ("test/loss", "val/accuracy")])
def test_what_chooses_the_learning_rate_has_a_direction_of_its_own(metric, select, tmp_path):
    """The better validation goes with the better test: a loss of 0.5 with 0.9 right, an accuracy of 0.9 with a loss of 0.5."""
    better, worse = ((0.5, 0.9), (2.6, 0.1)) if metric == "test/accuracy" else ((0.9, 0.5), (0.1, 2.6))
    scores: dict[tuple[str, float, int], tuple[float, float] | None] = {}
    for variant in ("none", "ABCD"):
        for seed in (1, 2, 3):
            scores[variant, 0.1, seed], scores[variant, 0.2, seed] = better, worse
    found = results(tmp_path, scores, sweep(metric=metric, select=select))
    assert [cell.rate for cell in found.cells] == [0.1, 0.1]
    assert [cell.mean for cell in found.cells] == pytest.approx([better[1]] * 2)


LOWER = {"loss", "kl", "leaked", "name_nats", "value_nats", "bits_per_byte"}
# What is no score: bounds, counts, and what describes the data.
NEITHER = {"bits_per_person_ceiling", "bits_per_parameter_ceiling", "kl_sentences", "entropy"}


def test_every_measure_has_its_direction():
    """Of all evaluators, and of what text adds: a measure that is new must be put into one of these lists."""
    evaluators, waiting = [], [Evaluator]
    while waiting:
        evaluators.append(waiting.pop())
        waiting += evaluators[-1].__subclasses__()
    measures = {measure for evaluator in evaluators for measure in evaluator.measures}
    assert len(evaluators) >= 5
    assert {name for name in measures - NEITHER if lower_is_better(f"test/{name}")} == LOWER
    assert measures - NEITHER - LOWER == {"token_accuracy", "bits_per_person", "bits_per_parameter"}


def test_pairs_share_the_seed(tmp_path):
    """A level that differs between seeds drops out of paired differences."""
    found = results(tmp_path, grid([0.1, 0.4, 0.5], [0.6, 0.9, 0.99]))
    paired = compare([found.cells[1]], [found.cells[0]])
    assert paired is not None
    assert paired.pairs == 3
    assert paired.student.high - paired.student.low < 0.05
    assert compare([found.cells[1]], []) is None


def test_sweeps_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("results/R10", "results/R2", "results/R2+ab12", "other"):
        path = results(tmp_path / name.replace("/", "-"), grid([0.1], [0.9])).path
        path.write_text(path.read_text().replace('"name": "a"', f'"name": "{name}"'))
    assert [found.name for found in find_sweeps(tmp_path)] == ["other", "results/R2", "results/R2+ab12", "results/R10"]


def test_a_manifest_of_another_version_is_left_out_and_named(tmp_path, caplog):
    results(tmp_path / "good", grid([0.1], [0.9]))
    for name, text in (("old", '{"name": "b", "scale": "", "expect": [{"metric": "x"}]}'), ("half", '{"name": ')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    assert [found.name for found in find_sweeps(tmp_path)] == ["a"]
    assert str(tmp_path / "old" / "manifest.json") in caplog.text
    assert str(tmp_path / "half" / "manifest.json") in caplog.text


def test_unfinished_jobs_are_told(tmp_path):
    found = results(tmp_path, grid([0.1, 0.2, None], [0.7, 0.8, 0.9]))
    assert found.cells[0].runs == 4
    assert found.cells[0].planned == 6
    assert sorted(found.table["status"].unique()) == ["failed", "finished"]
    assert find_sweeps(tmp_path)[0].name == "a"


def test_a_result_of_another_configuration_is_not_taken(tmp_path):
    found = results(tmp_path, grid([0.1, 0.2, 0.3], [0.7, 0.8, 0.9]))
    path = tmp_path / "jobs" / "none-0.1-1" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config_hash": "other"}))
    again = SweepResults(found.path)
    assert again.cells[0].by_seed.keys() == {2, 3}
    assert again.rows[0]["status"] == "of another configuration"


def test_a_run_that_diverged_has_no_score(tmp_path):
    scores = grid([0.1, 0.2, 0.3], [0.7, 0.8, 0.9])
    scores["ABCD", 0.1, 3] = (float("nan"), float("nan"))
    found = results(tmp_path, scores)
    assert found.cells[1].by_seed.keys() == {1, 2}
    (verdict,) = found.verdicts
    assert verdict.difference is not None
    assert verdict.difference.pairs == 2


# ---- what the learning rate is chosen by -------------------------------------------------------------------------------


def without_validation(found: SweepResults, keys: list[str]) -> SweepResults:
    """The same sweep, of which these jobs have not been validated."""
    for key in keys:
        path = found.path.parent / "../../jobs" / key / "results.json"
        content = json.loads(path.read_text())
        del content["metrics"]["val/accuracy"]
        path.write_text(json.dumps(content))
    return SweepResults(found.path)


def test_a_run_without_a_validation_is_never_judged_by_its_test(tmp_path):
    """At the second rate the test scores are better; without validations there it must not be chosen, nor count."""
    found = results(tmp_path, grid([0.1, 0.2, 0.3], [0.7, 0.8, 0.9]))
    found = without_validation(found, [f"ABCD-0.2-{seed}" for seed in (1, 2, 3)])
    cell = found.cells[1]
    assert (cell.rate, cell.best, cell.runs, cell.planned) == (0.1, 0.9, 3, 6)
    assert cell.remarks == ["its learning rate was chosen while runs are missing (3 of 3 at 0.1, 0 of 3 at 0.2)"]
    left = [row for row in found.rows if row["status"] == "without a validation"]
    assert {row["job"] for row in left} == {"ABCD-0.2-1", "ABCD-0.2-2", "ABCD-0.2-3"}
    assert left[0]["reason"] == (
        "val/accuracy was not measured, by which the learning rate is chosen; its test score, 0.99, counts nowhere"
    )
    assert "ABCD: its learning rate was chosen while runs are missing" in str(found.verdicts[0])


def test_without_any_validation_nothing_is_said(tmp_path):
    found = results(tmp_path, grid([0.1, 0.2, 0.3], [0.7, 0.8, 0.9]))
    found = without_validation(found, [row["job"] for row in found.rows])
    assert found.cells == []
    assert found.verdicts[0].reason == "runs are missing (12 without a validation)"
    assert found.outcome == "inconclusive"


def test_with_one_learning_rate_nothing_is_chosen_and_that_is_said(tmp_path):
    scores = {key: value for key, value in grid([0.1, 0.2, 0.3], [0.7, 0.8, 0.9]).items() if key[1] == 0.1}
    found = results(tmp_path, scores)
    assert found.cells[0].remarks == []
    found = without_validation(found, ["none-0.1-1"])
    assert found.cells[0].by_seed == {1: 0.1, 2: 0.2, 3: 0.3}
    assert found.cells[0].remarks == [
        "1 of 3 finished runs have no validation; there is one learning rate, so nothing was chosen"
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_validation_that_is_no_number_chooses_nothing(tmp_path, value):
    scores = grid([0.1, 0.2, 0.3], [0.7, 0.8, 0.9])
    scores["ABCD", 0.2, 1] = (value, 0.99)
    found = results(tmp_path, scores)
    assert found.cells[1].rate == 0.1
    (row,) = [row for row in found.rows if row["status"] == "without a validation"]
    assert row["reason"].startswith(f"val/accuracy is {value}")


def test_equally_good_rates_are_told_and_the_smallest_is_taken(tmp_path):
    scores = {}
    for seed in (1, 2, 3):
        for variant in ("none", "ABCD"):
            scores[variant, 0.2, seed] = (1.0, 0.9)  # written down first
            scores[variant, 0.1, seed] = (1.0, 0.8)
    found = results(tmp_path, scores)
    assert [cell.rate for cell in found.cells] == [0.1, 0.1]
    assert found.cells[0].remarks == [
        "learning rates 0.1 and 0.2 are equally good on the validation set: the smallest was taken"
    ]


def test_a_rate_chosen_from_fewer_seeds_is_told(tmp_path):
    scores = grid([0.1, 0.2, 0.3], [0.7, 0.8, 0.9])
    scores["ABCD", 0.2, 3] = None
    cell = results(tmp_path, scores).cells[1]
    assert cell.remarks == ["its learning rate was chosen while runs are missing (3 of 3 at 0.1, 2 of 3 at 0.2)"]


def test_one_seed_has_no_interval_and_says_so():
    outcome, numbers = judge(difference({1: 0.9}, {1: 0.4}), 0.1)
    assert (outcome, numbers) == ("inconclusive", "+0.500, one seed, so no interval, 1 pair; fewer than 3 seeds")


def test_runs_on_files_that_were_replaced_are_not_compared_with_those_on_the_new_ones(tmp_path):
    """The data of the latest run count; others are listed with the reason."""
    sweep = make_sweep(tmp_path, tasks=("Text",), rates=(2e-3,), unfinished=0, failed=0)
    folders = [sweep.path.parent / job["folder"] for job in sweep.plan["jobs"]]
    for number, folder in enumerate(folders):
        results = json.loads((folder / "results.json").read_text())
        record = json.loads((folder / "run.json").read_text())
        version = "new" if number >= len(folders) // 2 else "old"
        write_json(folder / "results.json", results | {"data": {"corpus": "x", "fingerprint": version, "seed": number}})
        write_json(folder / "run.json", record | {"ended": f"2026-01-0{1 + (version == 'new')}T00:00:00"})
    rows = SweepResults(sweep.path).rows
    assert {row["status"] for row in rows} == {"finished", "of other data"}
    assert sum(row["value"] is None for row in rows) == len(folders) // 2


def of_code(sweep: SweepResults, states: list[dict | None]) -> SweepResults:
    """The runs of a sweep as states of the code have made them, another for each seed."""
    for job in sweep.plan["jobs"]:
        path = sweep.path.parent / job["folder"] / "run.json"
        write_json(path, json.loads(path.read_text()) | {"git": states[job["seed"] % len(states)]})
    return SweepResults(sweep.path)


def changed(hash_of_changes: str, commit: str = "b3059359c0") -> dict:
    return {"commit": commit, "dirty": True, "diff_sha256": hash_of_changes}


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (
            [changed("1a2b3c4d"), changed("9f8e7d6c")],
            ["b3059359c with changes 1a2b3c", "b3059359c with changes 9f8e7d"],
        ),
        ([changed("1", "b" * 40), changed("1", "c" * 40)], ["bbbbbbbbb with changes 1", "ccccccccc with changes 1"]),
        (
            [{"commit": "b" * 40, "dirty": False}, {"commit": "b" * 40, "dirty": True}],
            ["bbbbbbbbb", "bbbbbbbbb with changes"],
        ),
    ],
)
def test_runs_of_more_than_one_state_of_the_code_are_told(tmp_path, states, said):
    found = of_code(make_sweep(tmp_path, tasks=("Depo",), rates=(2e-3,), unfinished=0, failed=0), states)
    expected = f"2 states of the code: {said[1]} ({{}} runs), {said[0]} ({{}} run"
    assert all(len(cell.remarks) == 1 and expected.format(2, 1) in cell.remarks[0] for cell in found.cells)
    for verdict in found.verdicts:
        assert len(verdict.remarks) == 1
        assert expected.format(4, 2) in verdict.remarks[0]
    assert dict(facts(SweepTables(found), Counter()))["code"] == f"{said[1]} (8 runs); {said[0]} (4 runs)"


def test_variants_that_take_their_data_otherwise_are_told(tmp_path):
    sweep = make_sweep(tmp_path, tasks=("Depo",), variants=("none", "ABCD"), rates=(2e-3,), unfinished=0, failed=0)
    assert not any(verdict.remarks for verdict in sweep.verdicts)
    plan = json.loads(sweep.path.read_text())
    for job in plan["jobs"]:
        job["taking"] |= {"window": 14 if job["variant"] == "none" else 20}
    write_json(sweep.path, plan)
    assert SweepResults(sweep.path).verdicts[0].remarks == [
        "the two differ in data.window (20 and 14): they were not trained or asked alike"
    ]
    assert "data.window (20 and 14)" in SweepTables(SweepResults(sweep.path)).differences[0]["remarks"]
    for job in plan["jobs"]:
        job["data"] = job["variant"]  # as of two tasks with other settings
    write_json(sweep.path, plan)
    assert "differ in what they ask for as data" in SweepResults(sweep.path).verdicts[0].remarks[0]


def test_each_variant_has_its_own_level_of_chance(tmp_path):
    sweep = make_sweep(tmp_path, tasks=("Depo",), variants=("none", "ABCD"), rates=(2e-3,), unfinished=0, failed=0)
    for job in sweep.plan["jobs"]:
        path = sweep.path.parent / job["folder"] / "results.json"
        level = 0.4 if job["variant"] == "none" else 0.25
        write_json(path, json.loads(path.read_text()) | {"chance": {"accuracy": level}})
    tables = SweepTables(SweepResults(sweep.path))
    assert {line["variant"]: line["chance"] for line in tables.scores} == {"none": 0.4, "ABCD": 0.25}
    assert tables.chance(tables.rows[0]) is None  # no one line is that of both


def test_variants_that_other_code_has_run_are_told_in_the_verdict_alone(tmp_path):
    """Each cell is of one state; what is compared is not."""
    sweep = make_sweep(tmp_path, tasks=("Depo",), variants=("none", "ABCD"), rates=(2e-3,), unfinished=0, failed=0)
    for job in sweep.plan["jobs"]:
        path = sweep.path.parent / job["folder"] / "run.json"
        write_json(path, json.loads(path.read_text()) | {"git": changed(job["variant"])})
    found = SweepResults(sweep.path)
    assert not any(cell.remarks for cell in found.cells)
    assert "2 states of the code" in found.verdicts[0].remarks[0]


def test_runs_that_do_not_say_which_code_made_them_are_silent(tmp_path):
    sweep = make_sweep(tmp_path, tasks=("Depo",), rates=(2e-3,), unfinished=0, failed=0)
    found = of_code(sweep, [None, {}, {"commit": None, "dirty": True}, changed("1")])
    assert not any(cell.remarks for cell in found.cells)
    assert not any(verdict.remarks for verdict in found.verdicts)


def test_a_run_that_went_on_under_other_code_is_of_both(tmp_path):
    first = {"git": changed("1"), "resumed_from": None}
    assert code_of({"git": changed("2"), "resumed_from": "a.ckpt", "earlier": [first]}) == (
        "b3059359c with changes 1, then b3059359c with changes 2"
    )
    # One that began anew has nothing of what was before.
    assert code_of({"git": changed("2"), "resumed_from": None, "earlier": [first]}) == "b3059359c with changes 2"


def test_variants_that_ask_for_other_data_keep_their_runs(tmp_path):
    """One variant reads bytes and the other pieces of words: nothing was replaced."""
    sweep = make_sweep(tmp_path, tasks=("Text",), variants=("bytes", "bpe"), rates=(2e-3,), unfinished=0, failed=0)
    plan = json.loads(sweep.path.read_text())
    for job in plan["jobs"]:
        folder = sweep.path.parent / job["folder"]
        job["data"] = data_name({"tokenizer": job["variant"], "seed": job["seed"]})
        results = json.loads((folder / "results.json").read_text())
        write_json(folder / "results.json", results | {"data": {"corpus": "x", "fingerprint": job["variant"]}})
    for written in (plan, plan | {"jobs": [{k: v for k, v in job.items() if k != "data"} for job in plan["jobs"]]}):
        write_json(sweep.path, written)
        assert {row["status"] for row in SweepResults(sweep.path).rows} == {"finished"}


def test_data_are_named_by_what_they_are_drawn_from():
    asked = {"task": {"N": 5}, "seed": 1, "batch_size": 8, "val_windows": 10}
    assert data_name(asked) == data_name(asked | {"seed": 2, "batch_size": 16, "val_windows": None})
    assert data_name(asked) != data_name(asked | {"task": {"N": 6}})


@pytest.mark.parametrize(("metric", "sign"), [("test/accuracy", 1), ("test/loss", -1)])
def test_best_runs_are_compared_over_the_settings_that_both_have(tmp_path, metric, sign):
    """The easier setting of one variant alone must not speak for it."""
    found = make_sweep(
        tmp_path,
        tasks=("Depo",),
        variants=("A", "B"),
        rates=(1e-3,),
        others={"size": ["small", "large"]},
        unfinished=0,
        failed=0,
        metrics={"Depo": metric},
        expect=(Statement("A", "B", 0.0),),
    )
    values = {("A", "small"): 0.1, ("B", "small"): 0.2, ("A", "large"): 0.6, ("B", "large"): 0.9}
    for job in found.plan["jobs"]:
        path = found.path.parent / job["folder"] / "results.json"
        content = json.loads(path.read_text())
        content["metrics"][metric] = values[job["variant"], job["settings"]["size"]]
        write_json(path, content)
    whole = SweepResults(found.path)
    assert whole.verdicts[0].best_difference == pytest.approx(sign * -0.2)
    for job in found.plan["jobs"]:
        if (job["variant"], job["settings"]["size"]) == ("A", "small"):
            (found.path.parent / job["folder"] / "results.json").unlink()
    assert SweepResults(found.path).verdicts[0].best_difference == pytest.approx(sign * -0.3)
    for job in found.plan["jobs"]:
        if (job["variant"], job["settings"]["size"]) == ("B", "large"):
            (found.path.parent / job["folder"] / "results.json").unlink()
    assert SweepResults(found.path).verdicts[0].best_difference is None
