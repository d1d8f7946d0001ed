"""Search by Optuna: hopeless trials are stopped, an interrupted search goes on with what it knows."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from src.config import ConfigError
from src.sweeps import search as search_module
from src.sweeps.jobs import lock_of
from src.sweeps.local import Local
from src.sweeps.plan import Job
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
    others: list[dict] = [{"base": [*first.base, "model.dim=32"]}, {"overrides": ["trainer.max_steps=2"]}]
    others += [{"metric": "val/accuracy"}, {"space": {"optimizer.lr": {"low": 1e-5, "high": 1e-2}}}]
    for changes in others:
        assert not search(**changes).study(tmp_path).trials, changes


def test_a_search_whose_files_have_changed_is_another_one(tmp_path: Path, monkeypatch, caplog):
    """An experiment that the base names is edited: the words of the search stay as they are, its trials do not."""
    import optuna

    first = search()
    first.study(tmp_path).add_trial(optuna.trial.create_trial(value=1.0))
    before, composed = first.now(), search_module.job_of

    def edited(task: str, variant: str, settings: dict, overrides: list[str], **more: Any) -> Job:
        return composed(task, variant, settings, [*overrides, "trainer.max_steps=3"], **more)

    monkeypatch.setattr(search_module, "job_of", edited)
    assert not search().study(tmp_path).trials
    assert "trials of other settings" in caplog.text
    assert first.now() != before


def test_a_journal_that_leads_elsewhere_is_not_waited_for(tmp_path: Path):
    for name in ("optuna.journal", "optuna.journal.lock"):
        (tmp_path / name).symlink_to("nothing")
        with pytest.raises(ConfigError, match=rf"{name} is a link or no file"):
            search().study(tmp_path)
        (tmp_path / name).unlink()


def on_text(folder: Path, word: str, **changes) -> Search:
    """A search on a corpus of text files, which are written anew."""
    folder.mkdir(exist_ok=True)
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"{word} {number}, and {word} once more. " * 8)
    base = [option for option in TINY if not option.startswith("data")]
    base += ["data=text_files", f"data.path={folder}", f"data.cache_dir={folder.parent / 'cache'}"]
    base += ["data.tokenizer=bytes", "data.window=32", "data.batch_size=4", "data.val_share=0.2", "data.test_share=0.2"]
    return search(base=base, space={"optimizer.lr": {"choices": [1e-3, 2e-2]}}, **changes)


def test_scores_on_files_that_were_replaced_are_those_of_another_study(tmp_path: Path, caplog):
    """All trials were finished; best and table are of the new files, and the old study is kept."""
    import optuna

    folder, root = tmp_path / "search", tmp_path / "jobs"
    first = on_text(tmp_path / "texts", "one", trials=2).run(Local(threads=1), folder, root, lambda *_: None)
    scores = {trial.value for trial in first.trials}
    assert not caplog.records
    told: list[str] = []
    described = on_text(tmp_path / "texts", "Quite another", trials=2)
    second = described.run(Local(threads=1), folder, root, lambda j, what, s: told.append(what))
    assert "trials of other settings, on other data" in caplog.text
    assert "started" in told
    assert not scores & {trial.value for trial in second.trials}
    with write_trials(second, described, folder).open() as file:
        assert {float(row["val/loss"]) for row in csv.DictReader(file)} == {trial.value for trial in second.trials}
    kept = optuna.load_study(study_name=first.study_name, storage=first._storage)
    assert {trial.value for trial in kept.trials} == scores


def test_trials_of_more_than_one_state_of_the_code_are_told(tmp_path: Path, caplog):
    described, root = search(trials=2), tmp_path / "jobs"
    described.run(Local(threads=1), tmp_path / "search", root, lambda *_: None)
    assert "states of the code" not in caplog.text
    record = next(root.glob("*/run.json"))
    git = {"commit": "b3059359c0", "dirty": True, "diff_sha256": "1a2b3c4d"}
    record.write_text(json.dumps(json.loads(record.read_text()) | {"git": git}))
    other = next(path for path in root.glob("*/run.json") if path != record)
    other.write_text(json.dumps(json.loads(other.read_text()) | {"git": git | {"diff_sha256": "9f8e7d6c"}}))
    described.run(Local(threads=1), tmp_path / "search", root, lambda *_: pytest.fail("run again"))
    assert "made by 2 states of the code: b3059359c with changes" in caplog.text


def test_files_replaced_in_the_course_of_a_search_end_it(tmp_path: Path):
    described = on_text(tmp_path / "texts", "one", trials=3)

    def replace(job, what: str, seconds: float) -> None:
        if what == "finished":
            on_text(tmp_path / "texts", "two")

    with pytest.raises(ConfigError, match="files of the data, or of the configuration"):
        described.run(Local(threads=1), tmp_path / "search", tmp_path / "jobs", replace)


def test_the_data_of_every_choice_are_looked_at(tmp_path: Path):
    """A corpus that is one of several choices is no part of the base's own data."""
    described = on_text(tmp_path / "texts", "one")
    on_text(tmp_path / "other", "one")
    described = search(base=described.base, space={"data.path": {"choices": [str(tmp_path / "other")]}})
    before = described.data_now()
    on_text(tmp_path / "other", "two")
    assert described.data_now() != before


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
    trial.set_user_attr("job", job.name)
    other = lock_of(job, tmp_path)  # another search runs it at this moment
    assert other.acquire()
    _take_up_what_was_cut_off(study, tmp_path)
    assert [t.state for t in study.trials] == [TrialState.RUNNING]
    other.release()
    _take_up_what_was_cut_off(study, tmp_path)
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
