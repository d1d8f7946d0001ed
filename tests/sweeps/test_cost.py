"""What is expected before anything has run, and how it is corrected by what has."""

import json
from pathlib import Path

import pytest

from src.sweeps.cost import assumptions, corrected, estimates, makespan, print_plan, training_flops
from src.sweeps.progress import Progress
from tests.runs import TINY, tiny_run
from tests.sweeps.test_plan import small


def test_jobs_are_not_divided_among_workers():
    assert makespan([25.0], 2) == 25.0
    assert makespan([3.0, 3.0, 4.0], 2) == 7.0
    assert makespan([1.0] * 10, 2) == 5.0
    assert makespan([], 4) == 0.0


def test_a_guess_is_corrected_by_how_far_it_was_off():
    guesses = {"a": 10.0, "b": 20.0, "c": 40.0}
    assert corrected(guesses, {}) == guesses
    assert corrected(guesses, {"a": [30.0, 30.0, 90.0]}) == {"a": 30.0, "b": 60.0, "c": 120.0}


def finished(job, root: Path, seconds: float) -> None:
    folder = job.folder(root)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "finished", "host": "x", "pid": 1}))
    (folder / "results.json").write_text(json.dumps({"config_hash": job.name, "seconds": seconds, "metrics": {}}))


def test_estimates_use_what_other_kinds_took(tmp_path):
    jobs = small().jobs()
    before = estimates(jobs, tmp_path)
    finished(jobs[0], tmp_path, 10 * before[jobs[0].name])
    after = estimates(jobs, tmp_path)
    other = next(job for job in jobs if job.variant != jobs[0].variant)
    assert after[other.name] == pytest.approx(10 * before[other.name])


def test_what_is_left_follows_what_was_measured(tmp_path, capsys):
    jobs = small().jobs()
    expected = dict.fromkeys((job.name for job in jobs), 30.0)
    progress = Progress(jobs, tmp_path, expected, workers=1)
    progress(jobs[0], "started", 0.0)
    assert f"about {duration_of(30.0 * len(jobs))} left" in capsys.readouterr().out
    finished(jobs[0], tmp_path, 120.0)
    progress(jobs[0], "finished", 121.0)
    assert f"about {duration_of(121.0 * (len(jobs) - 1))} left" in capsys.readouterr().out


def duration_of(seconds: float) -> str:
    from src.sweeps.cost import duration

    return duration(seconds)


def test_the_plan_names_the_rates_and_a_device_that_is_missing(tmp_path, capsys):
    jobs = small(base=["experiment=quickstart", "trainer=gpu"]).jobs()[:1]
    print_plan("title", jobs, tmp_path, {jobs[0].name: 90_000.0}, "2 at a time on the CPU, 1 thread(s) each", 2)
    told = " ".join(capsys.readouterr().out.split())
    assert "about 25.0 h of work, 25.0 h in all" in told
    assert "Times assume 200 TFLOP/s on a GPU, which may be off by a factor of three." in told
    assert "These jobs ask for a GPU, and none is visible here" in told
    finished(jobs[0], tmp_path, 5.0)
    assert assumptions(jobs, tmp_path, "") == "Times are those of finished runs of the same kinds."


def test_the_operations_of_a_plan_are_those_of_the_run(tmp_path):
    """The last token of a window is only predicted."""
    settings = [option for option in TINY if not option.startswith("trainer=")]
    (job,) = small(
        base=[*settings, "trainer=cpu"], variants={"none": []}, axes={"seed": [1]}, tasks={"Depo": []}
    ).jobs()
    tiny_run(tmp_path, "seed=1", "trainer.max_steps=4")
    assert training_flops(job) == json.loads((tmp_path / "results.json").read_text())["training_flops"]


def test_a_row_shows_what_its_cheapest_and_its_dearest_setting_cost(tmp_path, capsys):
    jobs = small(variants={"none": []}, axes={"trainer.max_steps": [10, 1000], "seed": [1, 2]}).jobs()
    steps = {job.name: job.settings["trainer.max_steps"] for job in jobs}
    least, most = (training_flops(next(job for job in jobs if steps[job.name] == count)) for count in (10, 1000))
    assert most == pytest.approx(100 * least)
    print_plan("title", jobs, tmp_path, {name: float(count) for name, count in steps.items()}, "here", 1)
    told = " ".join(capsys.readouterr().out.split())
    assert f"{least:.1e} - {most:.1e}" in told
    assert "10 s - 17 min" in told
    print_plan("title", jobs[:1], tmp_path, {jobs[0].name: 10.0}, "here", 1)
    assert f"{training_flops(jobs[0]):.1e} │ 10 s" in " ".join(capsys.readouterr().out.split())
