"""Every logger is there for a whole run: it validates, is stopped, and goes on in the record that it has begun."""

import sqlite3
from importlib.util import find_spec
from pathlib import Path

import pytest

from src.modules.language_model import LanguageModel
from tests.runs import curve, tiny_run

PACKAGES = {"csv": "csv", "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def csv_steps(folder: Path, log_dir: Path) -> list[float]:
    return curve(folder, "train/loss")


def tensorboard_steps(folder: Path, log_dir: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert "val/accuracy/hop1" in events.Tags()["scalars"]
    return [event.value for event in events.Scalars("train/loss")]


def mlflow_steps(folder: Path, log_dir: Path) -> list[float]:
    with sqlite3.connect(log_dir / "mlflow.db") as database:
        runs = {row[0] for row in database.execute("select run_uuid from runs")}
        assert runs == {(folder / "mlflow_run_id").read_text().strip()}
        keys = {row[0] for row in database.execute("select key from metrics")}
        assert {"val/accuracy", "val/accuracy.hop1", "test/accuracy"} <= keys
        rows = database.execute("select step, value from metrics where key = 'train/loss' order by step")
        return [value for _, value in dict(rows).items()]


def wandb_steps(folder: Path, log_dir: Path) -> None:
    runs = {path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")}
    assert runs == {(folder / "wandb_run_id").read_text().strip()}


READ = {"csv": csv_steps, "tensorboard": tensorboard_steps, "mlflow": mlflow_steps, "wandb": wandb_steps}


@pytest.mark.parametrize("logger", READ)
def test_a_logger_validates_and_resumes(tmp_path, monkeypatch, logger):
    if not find_spec(PACKAGES[logger]):
        pytest.skip(f"{PACKAGES[logger]} is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = [f"logger={logger}", f"paths.log_dir={tmp_path}", "trainer.max_steps=6"]
    options += [
        "callbacks.checkpoint.every_n_train_steps=1",
        *(["logger.wandb.offline=true"] if logger == "wandb" else []),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "on_validation_end", lambda self: 1 / (self.trainer.global_step != 4))
        with pytest.raises(ZeroDivisionError):
            tiny_run(tmp_path / "run", *options)
    if logger == "wandb":
        import wandb

        wandb.finish()
    tiny_run(tmp_path / "run", *options, "ckpt_path=auto")
    if logger == "wandb":
        wandb.finish()
    losses = READ[logger](tmp_path / "run", tmp_path)
    if losses is not None:
        assert len(losses) >= 6
        assert losses[-1] == pytest.approx(curve(tmp_path / "run", "train/loss")[-1])
