"""Going on is what the straight run would have done: validations, ends of epochs, curves, and whatever listens to them.

Each case is one in which a run that was killed, or given more steps, had become another run under the same name.
"""

import csv
import inspect
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from src.callbacks.preemption import Preempted
from src.checkpoints import CheckpointError, read_checkpoint
from src.checkpoints.files import find_checkpoint
from src.config import ConfigError
from src.evaluate import evaluate
from src.modules.language_model import LanguageModel
from src.runs.runs import Run
from tests.runs import compose_run, tiny_run
from tests.trust.test_resumed import EVERY, killed_after, results

EPOCHS = ["trainer.val_check_interval=null", "trainer.check_val_every_n_epoch=1", "+trainer.limit_train_batches=2"]


def early(patience: int, **more: object) -> str:
    options = {"monitor": "val/loss", "patience": patience, "min_delta": 100.0} | more
    words = ", ".join(f"{key}: {value}" for key, value in options.items())
    return f"+callbacks.early={{_target_: lightning.pytorch.callbacks.EarlyStopping, {words}}}"


def validated(folder: Path) -> list[int]:
    """After which steps."""
    return list(Run(folder).curves(["val/loss"])["val/loss"])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> dict[str, Path]:
    """Runs that a callback stops at the third of its validations, after step 6, by steps and by epochs."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("steps", "epochs")}
    for name, folder in folders.items():
        tiny_run(folder, *EVERY, early(2), "trainer.max_steps=12", *(EPOCHS if name == "epochs" else []))
        assert (results(folder)["steps"], validated(folder)) == (6, [2, 4, 6])
    return folders


@pytest.mark.parametrize("where", ["in its own folder", "in another"])
@pytest.mark.parametrize("kind", ["steps", "epochs"])
def test_a_validation_that_a_kill_has_cut_off_is_made_up_for(tmp_path, stopped, kind, where):
    """The checkpoint of step 4 is written before step 4 is validated."""
    killed = killed_after(4, tmp_path / "killed", stopped[kind])
    folder = killed if where == "in its own folder" else tmp_path / "new"
    more = EPOCHS if kind == "epochs" else []
    tiny_run(folder, *EVERY, early(2), "trainer.max_steps=12", *more, f"ckpt_path={killed}")
    assert results(folder)["steps"] == 6
    assert validated(folder)[-2:] == [4, 6]
    assert results(folder)["metrics"] == results(stopped[kind])["metrics"]


def test_the_validation_of_a_former_last_step_is_forgotten(tmp_path):
    options = [*EVERY, early(3), "scheduler=constant"]
    tiny_run(tmp_path / "straight", *options, "trainer.max_steps=12")
    tiny_run(tmp_path / "longer", *options, "trainer.max_steps=5")
    tiny_run(tmp_path / "longer", *options, "trainer.max_steps=12", "ckpt_path=auto")
    assert results(tmp_path / "longer")["steps"] == results(tmp_path / "straight")["steps"] == 8
    assert results(tmp_path / "longer")["metrics"] == results(tmp_path / "straight")["metrics"]


def test_what_a_callback_has_ended_is_over_elsewhere_too(tmp_path, stopped):
    with pytest.raises(CheckpointError, match="training ended after step 6 .*EarlyStopping.* nothing is left to train"):
        tiny_run(tmp_path, *EVERY, early(2), "trainer.max_steps=12", f"ckpt_path={stopped['steps']}")


def test_an_extra_validation_that_was_made_up_for_is_forgotten_too(tmp_path):
    options = [*EVERY, early(3), "scheduler=constant"]
    tiny_run(tmp_path / "straight", *options, "trainer.max_steps=12")
    tiny_run(tmp_path / "short", *options, "trainer.max_steps=5")
    longer = killed_after(5, tmp_path / "longer", tmp_path / "short")
    tiny_run(longer, *options, "trainer.max_steps=5", "ckpt_path=auto")
    tiny_run(longer, *options, "trainer.max_steps=12", "ckpt_path=auto")
    assert results(longer)["metrics"] == results(tmp_path / "straight")["metrics"]


def test_by_epochs_another_cut_changes_no_validation(tmp_path):
    options = [*EVERY, *EPOCHS[:2], "callbacks=best", "callbacks.best.save_top_k=-1", "trainer.max_steps=8"]
    tiny_run(tmp_path / "straight", *options, "+trainer.limit_train_batches=2")
    killed = killed_after(4, tmp_path / "killed", tmp_path / "straight")
    cut = ["+trainer.limit_train_batches=4", "trainer.accumulate_grad_batches=2"]
    tiny_run(killed, *options, *cut, "ckpt_path=auto")
    assert validated(killed) == validated(tmp_path / "straight") == [2, 4, 6, 8]
    assert (killed / "checkpoints" / "best_step00000004.ckpt").exists()


@pytest.mark.parametrize("step", [2, 4, 5, 6])
def test_the_last_step_by_epochs_is_validated_after_a_kill_too(tmp_path, step):
    options = [*EVERY, "trainer.val_check_interval=null", "trainer.check_val_every_n_epoch=2", "+trainer.max_epochs=3"]
    options += ["+trainer.limit_train_batches=2", "trainer.max_steps=20"]
    tiny_run(tmp_path / "straight", *options)
    assert validated(tmp_path / "straight") == [4, 6]
    killed = killed_after(step, tmp_path / "killed", tmp_path / "straight")
    tiny_run(killed, *options, "ckpt_path=auto")
    assert results(killed)["metrics"] == results(tmp_path / "straight")["metrics"]


@pytest.mark.parametrize("more", [{}, {"patience": 9}], ids=["plain", "early stopping"])
@pytest.mark.parametrize(("every", "first", "last"), [(2, 4, 6), (2, 8, 14), (1, 3, 7), (3, 6, 8)])
def test_a_finished_run_by_epochs_is_the_longer_run(tmp_path, every, first, last, more):
    """Each step has all of its micro-batches, epochs end where they would have, and each of them once."""
    options = [*EVERY, "trainer.val_check_interval=null", f"trainer.check_val_every_n_epoch={every}"]
    options += ["+trainer.limit_train_batches=4", "trainer.accumulate_grad_batches=2", "scheduler=constant"]
    options += [early(**more)] if more else []
    tiny_run(tmp_path / "straight", *options, f"trainer.max_steps={last}")
    tiny_run(tmp_path / "longer", *options, f"trainer.max_steps={first}")
    tiny_run(tmp_path / "longer", *options, f"trainer.max_steps={last}", "ckpt_path=auto")
    assert results(tmp_path / "longer")["metrics"] == results(tmp_path / "straight")["metrics"]
    loss = [Run(tmp_path / name).curves(["train/loss"])["train/loss"] for name in ("longer", "straight")]
    assert loss[0] == loss[1]
    assert set(validated(tmp_path / "longer")) - {first} == set(validated(tmp_path / "straight")) - {first}


SIX = ["trainer.val_check_interval=null", "trainer.check_val_every_n_epoch=1", "+trainer.limit_train_batches=6"]


@pytest.mark.parametrize(("lengths", "epochs"), [((7, 12), 2), ((3, 8, 9, 12), 9), ((5, 12), None)])
def test_an_epoch_that_training_has_broken_off_goes_on(tmp_path, lengths, epochs):
    """Lightning counts it as a whole one. Without epochs there is one that never ends."""
    options = [*EVERY, "scheduler=constant", *(SIX if epochs else []), f"+trainer.max_epochs={epochs or -1}"]
    tiny_run(tmp_path / "straight", *options, "trainer.max_steps=12")
    for steps in lengths:
        tiny_run(tmp_path / "longer", *options, f"trainer.max_steps={steps}", "ckpt_path=auto")
        assert (results(tmp_path / "longer")["steps"], validated(tmp_path / "longer")[-1]) == (steps, steps)
    assert results(tmp_path / "longer")["metrics"] == results(tmp_path / "straight")["metrics"]
    numbers = [Run(tmp_path / name).curves(["epoch", "train/loss"]) for name in ("longer", "straight")]
    for of in ("epoch", "train/loss"):
        assert {step: numbers[0][of][step] for step in numbers[1][of]} == numbers[1][of]


def test_a_callback_does_not_hear_of_an_epoch_that_was_broken_off(tmp_path):
    listening = early(1, monitor="train/loss", check_on_train_epoch_end="true")
    options = [*EVERY, "scheduler=constant", listening, *SIX[:2], "+trainer.limit_train_batches=3"]
    tiny_run(tmp_path / "straight", *options, "trainer.max_steps=12")
    assert results(tmp_path / "straight")["steps"] == 6
    for steps in (2, 4, 5, 12):
        tiny_run(tmp_path / "longer", *options, f"trainer.max_steps={steps}", "ckpt_path=auto")
    assert results(tmp_path / "longer")["metrics"] == results(tmp_path / "straight")["metrics"]


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (["+trainer.limit_train_batches=6"], ["+trainer.limit_train_batches=8"]),
        (["+trainer.limit_train_batches=6"], ["+trainer.limit_train_batches=4"]),
        ([], ["+trainer.limit_train_batches=3", "+trainer.max_epochs=3"]),
        (["+trainer.limit_train_batches=6"], ["+trainer.limit_train_batches=6", "trainer.accumulate_grad_batches=2"]),
    ],
    ids=["longer", "shorter", "none before", "twice as many batches a step"],
)
def test_epochs_may_be_cut_otherwise(tmp_path, then, now):
    """They are those of the new length, from the beginning of the run."""
    options = [*EVERY, *SIX[:2], "trainer.max_steps=12"]
    before = SIX[:0] if then else ["trainer.val_check_interval=2", "trainer.check_val_every_n_epoch=null"]
    tiny_run(tmp_path / "straight", *options, *now)
    tiny_run(tmp_path / "before", *options, *before, *then)
    killed = killed_after(5, tmp_path / "killed", tmp_path / "before")
    tiny_run(killed, *options, *now, "ckpt_path=auto")
    ours, theirs = results(killed), results(tmp_path / "straight")
    assert (ours["steps"], ours["ended"]) == (theirs["steps"], theirs["ended"])
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-6)
    assert validated(killed)[-1] == ours["steps"]


def test_fewer_epochs_than_have_begun_are_refused(tmp_path):
    options = [*EVERY, *EPOCHS, "trainer.max_steps=6"]
    tiny_run(tmp_path / "before", *options, "+trainer.max_epochs=3")
    killed = killed_after(5, tmp_path / "killed", tmp_path / "before")
    with pytest.raises(CheckpointError, match=r"is at step 5, in epoch 3, and trainer.max_epochs=1: nothing is left"):
        tiny_run(killed, *options, "+trainer.max_epochs=1", "ckpt_path=auto")


def test_a_run_that_is_stopped_at_the_end_of_an_epoch_is_validated(tmp_path):
    """Where no validation is due: Lightning has none there."""
    listening = early(1, monitor="train/loss", check_on_train_epoch_end="true")
    options = [listening, "+trainer.limit_train_batches=3", "+trainer.max_epochs=-1", "trainer.val_check_interval=4"]
    metrics = tiny_run(tmp_path / "run", *options, "trainer.max_steps=12")
    assert (results(tmp_path / "run")["steps"], validated(tmp_path / "run")) == (6, [4, 6])
    assert metrics["val/loss"] == Run(tmp_path / "run").curves(["val/loss"])["val/loss"][6]


def test_validations_by_time(tmp_path):
    """As often as that, and at the end."""
    options = ["trainer.val_check_interval='00:00:00:00'", "trainer.max_steps=3"]
    tiny_run(tmp_path, *options)
    assert validated(tmp_path) == [1, 2, 3]


def test_a_stop_that_is_asked_for_waits_for_every_callback(tmp_path, monkeypatch):
    """What averages weights comes after it in the configuration, and had no part in the step that was kept."""
    average = "+callbacks.ema={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.5}"
    options = [*EVERY, average, "trainer.max_steps=6"]
    tiny_run(tmp_path / "straight", *options)
    step = LanguageModel.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "training_step", training_step)
        with pytest.raises(Preempted):
            tiny_run(tmp_path / "stopped", *options)
    tiny_run(tmp_path / "stopped", *options, "ckpt_path=auto")
    assert results(tmp_path / "stopped")["metrics"] == results(tmp_path / "straight")["metrics"]


def test_a_run_that_has_kept_its_best_only_goes_on_from_it(tmp_path):
    options = [*EVERY, "callbacks=best", "trainer.max_steps=6"]
    tiny_run(tmp_path / "straight", *options)
    killed = Path(shutil.copytree(tmp_path / "straight", tmp_path / "killed"))
    for path in (killed / "checkpoints").iterdir():
        if not path.name.startswith("best_"):
            path.unlink()
    (killed / "results.json").unlink()
    tiny_run(killed, *options, "ckpt_path=auto")
    assert results(killed)["metrics"] == results(tmp_path / "straight")["metrics"]


def test_a_best_one_that_is_damaged_is_named(tmp_path):
    options = [*EVERY, "callbacks=best"]
    tiny_run(tmp_path, *options)
    for path in (tmp_path / "checkpoints").iterdir():
        if not path.name.startswith("best_"):
            path.unlink()
    best = next((tmp_path / "checkpoints").glob("best_*.ckpt"))
    best.write_bytes(best.read_bytes()[:-9])
    (tmp_path / "results.json").unlink()
    with pytest.raises(CheckpointError, match=rf"every checkpoint in it is damaged: checkpoints/{best.name}"):
        tiny_run(tmp_path, *options, "ckpt_path=auto")


def test_tests_of_former_lengths_stay_in_the_curve(tmp_path):
    """Also where the last attempt has nothing left to do but its test."""
    options = [*EVERY, "scheduler=constant"]
    for steps in (2, 4):
        tiny_run(tmp_path, *options, f"trainer.max_steps={steps}", "ckpt_path=auto")
    (tmp_path / "results.json").unlink()
    tiny_run(tmp_path, *options, "trainer.max_steps=4", "ckpt_path=auto")
    assert list(Run(tmp_path).curves(["test/loss"])["test/loss"]) == [2, 4]


def test_a_test_belongs_to_the_last_step(trained, tmp_path):
    """In the curve too, also where it is made again with other questions."""
    assert list(Run(trained).curves(["test/loss"])["test/loss"]) == [4]
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    (folder / "results.json").unlink()
    tiny_run(folder, *EVERY, "+trainer.limit_val_batches=1", "ckpt_path=auto")
    curves = Run(folder).curves(["test/loss", "val/loss"])
    assert (list(curves["test/loss"]), list(curves["val/loss"])) == ([4], [2, 4])
    assert curves["val/loss"][4] == results(folder)["metrics"]["val/loss"]


def test_validations_by_batches_do_not_ask_for_ends_of_epochs(tmp_path):
    options = ["trainer.val_check_interval=4", "+trainer.limit_train_batches=3", "+trainer.max_epochs=3"]
    tiny_run(tmp_path, *options, "trainer.max_steps=20")
    assert validated(tmp_path) == [4, 8, 9]


def test_the_best_is_chosen_among_answers_to_the_same_questions(tmp_path):
    options = [*EVERY, "callbacks=best", "trainer.max_steps=4"]
    tiny_run(tmp_path / "straight", *options)
    killed = killed_after(2, tmp_path / "killed", tmp_path / "straight")
    with pytest.raises(CheckpointError, match=r"data\.val_windows: 6 there, 4 here"):
        tiny_run(killed, *options, "data.val_windows=4", "ckpt_path=auto")
    limited = [*options, "+trainer.limit_val_batches=1"]
    tiny_run(tmp_path / "limited", *limited)
    killed = killed_after(2, tmp_path / "killed too", tmp_path / "limited")
    with pytest.raises(CheckpointError, match=r"data\.eval_batch_size: 4 there, 2 here"):
        tiny_run(killed, *limited, "data.eval_batch_size=2", "ckpt_path=auto")


@pytest.mark.parametrize("by", ["val/loss", "train/loss"])
@pytest.mark.parametrize("cut", [1, 2])
def test_a_cut_that_moves_validations_is_refused_where_a_callback_listens(tmp_path, by, cut):
    options = [*EVERY, early(2, monitor=by), "trainer.max_steps=4"]
    tiny_run(tmp_path / "straight", *options)
    killed = killed_after(2, tmp_path / "killed", tmp_path / "straight")
    again = [*options, "trainer.accumulate_grad_batches=2", f"trainer.val_check_interval={2 * cut}", "ckpt_path=auto"]
    if cut == 1:  # every step
        with pytest.raises(CheckpointError, match="accumulate_grad_batches"):
            tiny_run(killed, *again)
    else:  # every two steps, as before
        assert tiny_run(killed, *again)


@pytest.mark.parametrize("name", ["NAdam", "ASGD", "Adafactor"])
def test_optimizers_with_states_of_their_own_are_gone_on_with(tmp_path, name):
    known = {"betas", "weight_decay"} & set(inspect.signature(getattr(torch.optim, name)).parameters)
    left_out = [f"~optimizer.{key}" for key in {"betas", "eps", "no_decay", "fused", "weight_decay"} - known]
    options = [*EVERY, *left_out, f"optimizer._target_=torch.optim.{name}", "scheduler=constant"]
    tiny_run(tmp_path / "straight", *options)
    killed = killed_after(2, tmp_path / "killed", tmp_path / "straight")
    assert tiny_run(killed, *options, "ckpt_path=auto") == results(tmp_path / "straight")["metrics"]


@pytest.mark.parametrize("override", ["trainer.val_check_interval=3", "data.val_windows=4"])
def test_what_a_callback_decides_by_cannot_be_changed(tmp_path, stopped, override):
    killed = killed_after(4, tmp_path / "killed", stopped["steps"])
    with pytest.raises(CheckpointError, match=override.partition("=")[0]):
        tiny_run(killed, *EVERY, early(2), "trainer.max_steps=12", override, "ckpt_path=auto")


def test_a_checkpoint_that_a_validation_has_written_leads_on_from_its_step(tmp_path):
    by_loss = ["callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min", "trainer.max_steps=8"]
    by_loss += ["callbacks.checkpoint.every_n_train_steps=null", "callbacks.checkpoint.save_top_k=-1"]
    tiny_run(tmp_path / "straight", *by_loss)
    killed = killed_after(4, tmp_path / "killed", tmp_path / "straight")
    tiny_run(killed, *by_loss, "ckpt_path=auto")
    for metric in ("train/loss", "val/loss"):
        straight, gone_on = (Run(folder).curves([metric])[metric] for folder in (tmp_path / "straight", killed))
        assert gone_on == straight


def test_a_stop_that_the_checkpoint_knows_of_is_a_stop(tmp_path):
    """The validation that stops a run has written the checkpoint, and then the run is killed."""
    by_loss = ["callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min", "trainer.max_steps=12"]
    by_loss += ["callbacks.checkpoint.every_n_train_steps=null", "callbacks.checkpoint.save_top_k=-1", early(2)]
    tiny_run(tmp_path / "straight", *by_loss)
    killed = killed_after(6, tmp_path / "killed", tmp_path / "straight")
    tiny_run(killed, *by_loss, "ckpt_path=auto")
    assert results(killed)["steps"] == results(tmp_path / "straight")["steps"] == 6
    assert results(killed)["metrics"] == results(tmp_path / "straight")["metrics"]


@pytest.mark.parametrize("more", [{"stopping_threshold": 100.0, "patience": 50}, {"divergence_threshold": 0.0}])
def test_a_stop_for_any_reason_is_a_stop(tmp_path, more):
    by_loss = ["callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min", "trainer.max_steps=12"]
    by_loss += ["callbacks.checkpoint.every_n_train_steps=null", early(**({"patience": 3} | more))]
    tiny_run(tmp_path / "straight", *by_loss)
    assert results(tmp_path / "straight")["steps"] == 2
    killed = killed_after(2, tmp_path / "killed", tmp_path / "straight")
    tiny_run(killed, *by_loss, "ckpt_path=auto")
    assert results(killed)["steps"] == 2


def test_going_on_from_an_earlier_checkpoint_leaves_no_later_one(tmp_path, caplog):
    options = [*EVERY, "scheduler=constant"]
    tiny_run(tmp_path, *options, "trainer.max_steps=8")
    checkpoints = tmp_path / "checkpoints"
    tiny_run(tmp_path, *options, "trainer.max_steps=5", f"ckpt_path={checkpoints / 'step00000004.ckpt'}")
    assert results(tmp_path)["steps"] == 5
    assert read_checkpoint(find_checkpoint(tmp_path))["global_step"] == 5
    assert (checkpoints / "step00000008.ckpt.superseded").exists()
    assert (checkpoints / "step00000008.ckpt.superseded.sha256").exists()
    assert "step00000008.ckpt is of a later step" in caplog.text
    scored = evaluate(compose_run(tmp_path / "scored", f"ckpt_path={tmp_path}", config_name="evaluate"))
    assert scored["test/loss"] == results(tmp_path)["metrics"]["test/loss"]


def test_rows_of_an_abandoned_attempt_go(tmp_path):
    """The new attempt logs more coarsely than the old one; no row of steps that are run again may stay."""
    tiny_run(tmp_path / "straight", *EVERY, "scheduler=cosine", "trainer.max_steps=8")
    killed = killed_after(4, tmp_path / "killed", tmp_path / "straight")
    shutil.copy(tmp_path / "straight" / "csv" / "metrics.csv", killed / "csv" / "metrics.csv")
    coarse = ["trainer.max_steps=12", "trainer.val_check_interval=12", "trainer.log_every_n_steps=6"]
    tiny_run(killed, *EVERY, "scheduler=cosine", *coarse, "ckpt_path=auto")
    assert list(Run(killed).curves(["train/lr"])["train/lr"]) == [1, 2, 3, 4, 6, 12]
    assert validated(killed) == [2, 4, 12]


def test_batches_that_are_repeated_are_not_gone_on_with(tmp_path):
    options = [*EVERY, "+trainer.overfit_batches=2"]
    tiny_run(tmp_path / "straight", *options)
    killed = killed_after(3, tmp_path / "killed", tmp_path / "straight")
    with pytest.raises(CheckpointError, match="overfit_batches=2 begins again with the first batches"):
        tiny_run(killed, *options, "ckpt_path=auto")


def test_weights_in_double_precision_are_taken_over_as_they_are(tmp_path):
    options = [*EVERY, "trainer.precision=64-true"]
    tiny_run(tmp_path / "straight", *options)
    killed = killed_after(2, tmp_path / "killed", tmp_path / "straight")
    tiny_run(killed, *options, "ckpt_path=auto")
    ours, straight = (
        read_checkpoint(folder / "checkpoints" / "final.ckpt")["state_dict"]
        for folder in (killed, tmp_path / "straight")
    )
    assert all(torch.equal(ours[name], straight[name]) for name in straight)


def test_a_least_number_of_steps_does_not_switch_early_stopping_off(tmp_path):
    tiny_run(tmp_path, early(1), "trainer.max_steps=12", "+trainer.min_steps=5")
    assert results(tmp_path)["steps"] == 5  # Lightning remembers that it was to stop


# ---- records --------------------------------------------------------------------------------------------------------


def test_a_refused_start_is_no_attempt_of_a_killed_run(tmp_path):
    tiny_run(tmp_path / "straight", *EVERY)
    folder = tmp_path / "killed"
    record = json.loads((tmp_path / "straight" / "run.json").read_text()) | {"status": "running"}
    killed_after(2, folder, tmp_path / "straight")
    (folder / "run.json").write_text(json.dumps(record))
    for override in ("seed=9", "optimizer.lr=0.5"):
        with pytest.raises(ConfigError):
            tiny_run(folder, *EVERY, override, "ckpt_path=auto")
        assert json.loads((folder / "run.json").read_text()) == record


def test_a_refused_start_of_the_same_run_leaves_its_record(tmp_path, monkeypatch):
    """Here the hash is the same, and what has changed is the data."""
    tiny_run(tmp_path / "straight", *EVERY)
    folder = killed_after(2, tmp_path / "killed", tmp_path / "straight")
    record = json.loads((tmp_path / "straight" / "run.json").read_text()) | {"status": "running"}
    (folder / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr("src.datamodules.task.TaskDataModule.fingerprint", lambda self: {"task": "another"})
    with pytest.raises(CheckpointError, match="other data"):
        tiny_run(folder, *EVERY, "ckpt_path=auto")
    assert json.loads((folder / "run.json").read_text()) | {"earlier": []} == record | {"earlier": []}


def test_only_what_a_run_knows_of_may_average_prune_or_cut(tmp_path):
    for name in ("StochasticWeightAveraging", "ModelPruning", "BatchSizeFinder", "GradientAccumulationScheduler"):
        node = f"+callbacks.x={{_target_: lightning.pytorch.callbacks.{name}}}"
        with pytest.raises(ConfigError, match=f"{name}.* changes weights, steps or batches without the run"):
            tiny_run(tmp_path, node)
    node = "{_target_: lightning.pytorch.callbacks.EMAWeightAveraging, update_starting_at_step: 9}"
    with pytest.raises(ConfigError, match="update_starting_at_step=9: until then"):
        tiny_run(tmp_path, f"+callbacks.x={node}")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.check_val_every_n_epoch=2", "trainer.check_val_every_n_epoch=2: with trainer.val_check_interval=2"),
        ("optimized_metric=test/loss", "optimized_metric=test/loss"),
        (early(1, monitor="train/token_accuracy"), "callbacks.early.mode=min: max, for train/token_accuracy"),
    ],
)
def test_what_would_be_ignored_or_chosen_wrongly_is_refused(tmp_path, override, said):
    with pytest.raises(ConfigError, match=said):
        tiny_run(tmp_path, override)


def test_an_optimizer_that_has_no_fused_kernel(tmp_path):
    left_out = [f"~optimizer.{key}" for key in ("betas", "eps", "no_decay", "fused", "weight_decay")]
    assert tiny_run(tmp_path, *left_out, "optimizer._target_=torch.optim.NAdam", "trainer.max_steps=1")


def test_a_position_that_nothing_takes_is_told(tmp_path, caplog):
    tiny_run(tmp_path / "gla", "model=gla", "trainer.max_steps=1")
    assert "no mixer of this model takes positions" not in caplog.text
    tiny_run(tmp_path / "alibi", "model=gla", "position=alibi", "trainer.max_steps=1")
    assert "position=src.components.position.ALiBi: no mixer of this model takes positions" in caplog.text


def test_a_test_that_is_made_again_has_one_row(tmp_path):
    """A run was killed between the end of its test and its results."""
    first = tiny_run(tmp_path)
    (tmp_path / "results.json").unlink()
    assert tiny_run(tmp_path, "ckpt_path=auto") == first
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(row["test/loss"] != "" for row in rows) == 1
    assert sum(row["train/loss"] != "" for row in rows) == 4
