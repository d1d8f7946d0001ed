"""Search by Optuna: hopeless trials are stopped, an interrupted search goes on with what it knows."""

import csv
from pathlib import Path

import pytest
from optuna.trial import TrialState

from src.config import ConfigError
from src.sweeps.local import Local
from src.sweeps.search import Search, _take_up_what_was_cut_off, write_trials
from tests.runs import TINY

LONG = [
    "trainer.max_steps=3000",
    "trainer.val_check_interval=25",
    "data.val_windows=4",
    "callbacks.checkpoint.every_n_train_steps=25",
]


def search(**changes) -> Search:
    parts = {
        "title": "a test",
        "base": [*TINY, "trainer.max_steps=4", "callbacks.checkpoint.every_n_train_steps=2"],
        "space": {
            "optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True},
            "canon.positions": {"choices": ["A", "AC"]},
        },
        "metric": "val/loss",
        "trials": 3,
        "pruner": "none",
    }
    return Search(**(parts | changes))


def test_a_search_ends_with_its_trials_and_finds_the_best(tmp_path: Path):
    told: list[str] = []
    study = search(trials=2).run(
        Local(threads=1), tmp_path / "search", tmp_path / "jobs", lambda j, what, s: told.append(what)
    )
    assert told.count("finished") == 2
    assert study.best_value == min(trial.value for trial in study.trials)
    # The same command: nothing is left to do; one more trial: only that.
    study = search(trials=2).run(
        Local(threads=1), tmp_path / "search", tmp_path / "jobs", lambda *_: pytest.fail("run again")
    )
    assert len(study.trials) == 2
    study = search(trials=3).run(Local(threads=1), tmp_path / "search", tmp_path / "jobs", lambda *_: None)
    assert len({trial.params["optimizer.lr"] for trial in study.trials}) == 3
    with write_trials(study, search(), tmp_path / "search").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["complete"] * 3
    assert {row["job"] for row in rows} == {path.name for path in (tmp_path / "jobs").iterdir()}


def test_another_search_does_not_answer_with_the_trials_of_the_first(tmp_path: Path):
    """The title and the folder are the same; what decides a score is not."""
    import optuna

    first = search()
    first.study(tmp_path).add_trial(optuna.trial.create_trial(value=1.0))
    assert len(search(trials=9, sampler="random").study(tmp_path).trials) == 1
    others: list[dict] = [{"base": [*first.base, "size.dim=32"]}, {"overrides": ["trainer.max_steps=2"]}]
    others += [{"metric": "val/accuracy"}, {"space": {"optimizer.lr": {"low": 1e-5, "high": 1e-2}}}]
    for changes in others:
        assert not search(**changes).study(tmp_path).trials, changes


def test_a_metric_that_is_not_measured_is_found_before_any_trial(tmp_path: Path):
    with pytest.raises(ConfigError, match="sweep.metric=val/nonsense: not measured"):
        search(metric="val/nonsense").run(Local(threads=1), tmp_path, tmp_path / "jobs", lambda *_: pytest.fail("run"))
    assert not (tmp_path / "optuna.journal").exists()


@pytest.mark.slow
def test_a_hopeless_trial_is_stopped(tmp_path: Path):
    """A learning rate of nearly nothing, after four trials of another that have learnt."""
    described = search(
        base=[*TINY, *LONG],
        space={"optimizer.lr": {"low": 1e-8, "high": 1e-2}},
        pruner="median",
        trials=5,
        warmup_trials=4,
    )
    study = described.study(tmp_path / "search")
    import optuna

    learnt = {step: 3.0 / step for step in range(25, 3001, 25)}
    for _ in range(4):
        study.add_trial(
            optuna.trial.create_trial(
                params={"optimizer.lr": 1e-2},
                distributions={"optimizer.lr": optuna.distributions.FloatDistribution(1e-8, 1e-2)},
                intermediate_values=learnt,
                value=1e-3,
            )
        )
    study.enqueue_trial({"optimizer.lr": 1e-8})
    told: list[str] = []
    study = described.run(
        Local(workers=1), tmp_path / "search", tmp_path / "jobs", lambda j, what, s: told.append(what)
    )
    assert study.trials[-1].state == TrialState.PRUNED
    assert told[-1].startswith("stopped at step ")
    assert study.trials[-1].last_step < 3000


def test_what_was_cut_off_is_asked_for_again(tmp_path: Path):
    described = search()
    study = described.study(tmp_path)
    trial = study.ask()
    job = described.job(trial)
    study = described.study(tmp_path)  # another process
    _take_up_what_was_cut_off(study)
    again = study.ask()
    assert described.job(again).name == job.name
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.RUNNING]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "test/loss"}, "sweep.metric=test/loss: .*validation"),
        ({"trials": 0}, "sweep.trials=0"),
        ({"space": {}}, "sweep.space"),
        ({"space": {"optimizer.lr": {"low": 1}}}, "sweep.space.optimizer.lr"),
        ({"space": {"optimizer.lr": {"choices": [1], "log": True}}}, "sweep.space.optimizer.lr"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ConfigError, match=message):
        search(**changes)
