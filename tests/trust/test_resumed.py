"""Going on otherwise than before: another cut of the batch, other settings of the schedule, averaged weights, a folder with a past.

Whatever differs, a run goes on as the straight run would have, or says what it does instead.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from src.callbacks.guard import Guard
from src.checkpoints import read_checkpoint
from src.checkpoints.resume import recut
from src.config import ConfigError
from src.modules.language_model import LanguageModel
from src.runs.runs import Run
from tests.runs import TINY, command, tiny_run

EVERY = ["callbacks.checkpoint.every_n_train_steps=1", "callbacks.checkpoint.save_top_k=-1"]
EMA = "+callbacks.ema={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.5}"


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def curve(folder: Path, metric: str) -> list[float]:
    return list(Run(folder).curves([metric])[metric].values())


def killed_after(step: int, folder: Path, straight: Path) -> Path:
    """What a run of ``straight`` would have left behind, killed after a step."""
    shutil.copytree(straight, folder)
    for path in (folder / "checkpoints").iterdir():
        if not path.name.startswith(f"step{step:08d}"):
            path.unlink()
    for name in ("results.json", "run.json"):
        (folder / name).unlink()
    rows = (folder / "csv" / "metrics.csv").read_text().splitlines(keepends=True)
    place = rows[0].strip().split(",").index("step")
    kept = [row for row in rows[1:] if int(row.split(",")[place]) < step]
    (folder / "csv" / "metrics.csv").write_text("".join([rows[0], *kept]))
    return folder


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 4), (4, 2)])
def test_a_step_of_another_cut_is_whole(tmp_path, before, after):
    """Three steps, a number that none of the cuts divides: the fourth must have all its micro-batches, and only those."""
    options = [*EVERY, "trainer.max_steps=8", "trainer.val_check_interval=32", "scheduler=constant"]
    cut = "trainer.accumulate_grad_batches={}".format
    tiny_run(tmp_path / "straight", *options, cut(after))
    tiny_run(tmp_path / "other", *options, cut(before))
    killed = killed_after(3, tmp_path / "killed", tmp_path / "other")
    tiny_run(killed, *options, cut(after), "ckpt_path=auto")
    assert curve(killed, "train/loss") == pytest.approx(curve(tmp_path / "straight", "train/loss"), abs=1e-5)
    assert results(killed)["metrics"] == pytest.approx(results(tmp_path / "straight")["metrics"], abs=1e-5)


def test_batches_that_are_not_those_of_the_steps_are_refused():
    counts = {"ready": 7, "completed": 6, "started": 7, "processed": 7}
    loops = {"fit_loop": {"epoch_loop.batch_progress": {"total": dict(counts), "current": dict(counts)}}}
    checkpoint = {"global_step": 7, "loops": loops}
    recut(checkpoint, 3)
    total = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert total == {"ready": 21, "completed": 20, "started": 21, "processed": 21}
    with pytest.raises(ValueError, match="21 batches for 5 steps"):
        recut(checkpoint | {"global_step": 5}, 1)


def test_a_run_with_averaged_weights_goes_on_with_its_own(tmp_path):
    """``final.ckpt`` shows the averages, and holds what training goes on with."""
    options = [*EVERY, EMA, "scheduler=constant"]
    tiny_run(tmp_path / "straight", *options, "trainer.max_steps=8")
    tiny_run(tmp_path / "longer", *options, "trainer.max_steps=4")
    tiny_run(tmp_path / "longer", *options, "trainer.max_steps=8", "ckpt_path=auto")
    assert results(tmp_path / "longer")["metrics"] == results(tmp_path / "straight")["metrics"]
    final = read_checkpoint(tmp_path / "longer" / "checkpoints" / "final.ckpt")
    assert not torch.equal(
        final["state_dict"]["net.embedding.weight"], final["current_model_state"]["net.embedding.weight"]
    )


def test_answers_are_written_by_the_weights_that_are_validated(tmp_path, monkeypatch):
    """A callback that averages weights puts its own in for the batches of a validation, and takes them out before its end."""
    seen: dict[str, list[torch.Tensor]] = {"read": [], "wrote": []}
    step = LanguageModel.validation_step

    def validation_step(self, batch, batch_idx):
        seen["read"].append(self.net.embedding.weight.detach().clone())
        evaluator = self.evaluators["val"]
        monkeypatch.setattr(
            evaluator, "examine", lambda net, count: seen["wrote"].append(net.embedding.weight.detach().clone())
        )
        step(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "validation_step", validation_step)
    tiny_run(tmp_path, EMA, "trainer.val_check_interval=4")
    assert len(seen["read"]) == 2
    assert len(seen["wrote"]) == 1
    assert torch.equal(seen["wrote"][0], seen["read"][-1])


def test_the_first_step_of_a_longer_run_follows_its_schedule(tmp_path):
    options = [*EVERY, "scheduler=cosine"]
    tiny_run(tmp_path / "straight", *options, "trainer.max_steps=12")
    tiny_run(tmp_path / "longer", *options, "trainer.max_steps=6")
    tiny_run(tmp_path / "longer", *options, "trainer.max_steps=12", "ckpt_path=auto")
    assert curve(tmp_path / "longer", "train/lr")[6:] == curve(tmp_path / "straight", "train/lr")[6:]


def test_another_schedule_is_noted(tmp_path, caplog):
    options = [*EVERY, "scheduler=cosine"]
    tiny_run(tmp_path / "straight", *options)
    killed = killed_after(2, tmp_path / "killed", tmp_path / "straight")
    tiny_run(killed, *options, "scheduler.total_steps=400", "ckpt_path=auto")
    assert results(killed)["continued"] == [{"step": 2, "planned": 4, "schedule": 4}]
    assert "a run whose schedule was one of 4 steps with one of 400" in caplog.text


def test_a_scaled_gradient_is_clipped_in_its_own_units(tmp_path):
    """The fused optimizer divides by the loss scale in its step, which is after clipping."""
    plugins = "[{_target_: src.checkpoints.io.CheckpointFiles}, {_target_: lightning.pytorch.plugins.MixedPrecision, "
    half = [f"trainer.plugins={plugins}precision: 16-mixed, device: cpu}}]", "~trainer.precision"]
    whole, scaled = tiny_run(tmp_path / "whole"), tiny_run(tmp_path / "half", *half)
    assert curve(tmp_path / "half", "train/grad_norm") == pytest.approx(
        curve(tmp_path / "whole", "train/grad_norm"), rel=0.05
    )
    assert scaled["test/loss"] == pytest.approx(whole["test/loss"], abs=0.01)


def test_a_scale_that_is_still_too_large_is_no_bad_step(tmp_path, monkeypatch):
    """The scaler leaves such a step out and halves its scale; the guard would end the run."""
    plugins = "[{_target_: src.checkpoints.io.CheckpointFiles}, {_target_: lightning.pytorch.plugins.MixedPrecision, "
    half = [f"trainer.plugins={plugins}precision: 16-mixed, device: cpu}}]", "~trainer.precision"]
    monkeypatch.setattr(torch.amp.GradScaler.__init__, "__defaults__", ("cpu", 2.0**60, 2.0, 0.5, 2000, True))
    tiny_run(tmp_path, *half)
    assert results(tmp_path)["steps"] == 4


def test_a_rollback_goes_behind_its_margin(tmp_path, monkeypatch):
    """Updates that are to be left out must not be in the checkpoint that training goes back to."""
    update = Guard.before_update

    def before_update(self, trainer, optimizer, loss, norm):
        update(self, trainer, optimizer, loss * float("nan") if trainer.global_step == 6 else loss, norm)

    monkeypatch.setattr(Guard, "before_update", before_update)
    tiny_run(
        tmp_path,
        *("trainer.max_steps=10", "callbacks.checkpoint.every_n_train_steps=2", "callbacks.checkpoint.save_top_k=-1"),
        *("callbacks.guard.nonfinite=rollback", "callbacks.guard.margin=2"),
    )
    guard = read_checkpoint(tmp_path)["callbacks"]["Guard"]
    assert guard["leave_out"] == guard["skipped"] == [5, 6, 7, 8, 9]


def test_a_new_run_has_no_rows_of_another(tmp_path, caplog):
    tiny_run(tmp_path, "trainer.log_every_n_steps=1")
    shutil.rmtree(tmp_path / "checkpoints")
    tiny_run(tmp_path, "trainer.log_every_n_steps=4", "seed=7", "ckpt_path=auto")
    assert len(curve(tmp_path, "train/loss")) == 1
    assert "is of an earlier run" in caplog.text
    assert (tmp_path / "csv" / "metrics.csv.earlier").is_file()


def test_validation_is_limited_as_the_test_is(tmp_path):
    limits = ["+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1"]
    tiny_run(tmp_path / "straight", *limits, "data.eval_batch_size=2")
    tiny_run(tmp_path / "run", *limits)
    tiny_run(tmp_path / "run", *limits, "data.eval_batch_size=2", "ckpt_path=auto")
    assert results(tmp_path / "run")["metrics"] == results(tmp_path / "straight")["metrics"]


def test_a_run_that_is_only_tested_was_as_fast_as_before(tmp_path):
    tiny_run(tmp_path, "trainer.max_steps=8")
    before = results(tmp_path)
    (tmp_path / "results.json").unlink()
    tiny_run(tmp_path, "trainer.max_steps=8", "ckpt_path=auto")
    assert {key: results(tmp_path)[key] for key in ("tokens_per_second", "data_wait")} == {
        key: before[key] for key in ("tokens_per_second", "data_wait")
    }
    assert before["tokens_per_second"] > 0


def test_a_start_that_is_refused_leaves_what_hydra_has_written(tmp_path):
    """The message points to the overrides of the run that has been there."""
    options = [*TINY, f"hydra.run.dir={tmp_path}", "compare=null"]
    command("train", *options)
    kept = {path.name: path.read_bytes() for path in (tmp_path / ".hydra").iterdir()}
    refused = command("train", *options, "seed=9", "ckpt_path=auto", check=False)
    assert refused.returncode == 2
    assert "seed: 42 there, 9 here" in refused.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / ".hydra").iterdir()} == kept


def test_a_refused_multirun_leaves_what_hydra_has_written_of_the_runs_before(tmp_path):
    options = [*TINY, "trainer.max_steps=1", f"hydra.sweep.dir={tmp_path}", "compare=null"]
    command("train", *options, "seed=1,2", "-m")
    kept = {path: path.read_bytes() for path in tmp_path.glob("*/.hydra/*.yaml")}
    assert len(kept) == 6
    refused = command("train", *options, "seed=3,4", "-m", check=False)
    assert "holds the checkpoints of an earlier run" in refused.stderr
    assert {path: path.read_bytes() for path in tmp_path.glob("*/.hydra/*.yaml")} == kept


def test_a_strategy_that_writes_one_file_replaces_a_folder_of_shards(tmp_path):
    """A finished run of several processes, given more steps on one."""
    tiny_run(tmp_path, *EVERY)
    final = tmp_path / "checkpoints" / "final.ckpt"
    final.unlink()
    final.mkdir()
    (tmp_path / "results.json").unlink()
    killed = tmp_path / "checkpoints" / "step00000004.ckpt"
    killed.unlink()
    tiny_run(tmp_path, *EVERY, "ckpt_path=auto")
    assert final.is_file()


def test_an_error_in_the_first_step_says_where_it_comes_from(tmp_path, monkeypatch):
    tiny_run(tmp_path, *EVERY)
    killed = killed_after(2, tmp_path / "killed", tmp_path)
    monkeypatch.setattr(LanguageModel, "training_step", lambda self, batch, batch_idx: 1 / 0)
    with pytest.raises(ZeroDivisionError) as raised:
        tiny_run(killed, *EVERY, "ckpt_path=auto")
    assert "step00000002.ckpt" in raised.value.__notes__[0]


def test_the_checks_before_training_are_run(tmp_path):
    """A folder that leads elsewhere is refused however the run is started."""
    (tmp_path / "run" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "run" / "deep" / "er" / "metrics.csv").symlink_to(tmp_path / "elsewhere.csv")
    with pytest.raises(ConfigError, match=r"deep/er/metrics\.csv.*a link to"):
        tiny_run(tmp_path / "run")
    assert not (tmp_path / "elsewhere.csv").exists()
