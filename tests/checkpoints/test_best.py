"""``callbacks=best``: the checkpoint of the best validation stays beside the newest ones."""

import shutil

import pytest

from src.checkpoints import load_model, read_checkpoint
from src.checkpoints.__main__ import main
from src.config import ConfigError
from tests.runs import curve, final, same, tiny_run

# Too high a learning rate: the loss falls, and rises again.
BEST = ["callbacks=best", "trainer.max_steps=6", "trainer.val_check_interval=1", "scheduler=constant"]
BEST += ["scheduler.warmup_steps=3", "optimizer.lr=1.0"]
EVERY = ["callbacks.checkpoint.every_n_train_steps=1", "callbacks.checkpoint.save_top_k=-1"]


def kept(folder):
    return [path.name for path in sorted((folder / "checkpoints").glob("best_*.ckpt"))]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    tiny_run(folder, *BEST, *EVERY)
    return folder


def test_the_best_is_kept_and_only_it(straight, capsys):
    losses = curve(straight, "val/loss")
    best = losses.index(min(losses)) + 1
    assert 1 < best < 6
    assert kept(straight) == [f"best_step{best:08d}.ckpt"]
    path = straight / "checkpoints" / kept(straight)[0]
    assert read_checkpoint(path)["global_step"] == best
    assert same(dict(load_model(path).state_dict()), dict(load_model(path.with_name(path.name[5:])).state_dict()))
    assert main(["verify", str(straight)]) == 0
    assert path.name in capsys.readouterr().out


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_resumed_run_knows_the_best_of_all(tmp_path, straight, step):
    """A step's checkpoint is written before its validation; what that found must not be lost, wherever the run was stopped."""
    before = shutil.copytree(straight, tmp_path / "before")
    (straight / "results.json").unlink()
    for path in (straight / "checkpoints").iterdir():
        number = path.name.removeprefix("best_").removeprefix("step")[:8]
        if not number.isdigit() or int(number) > step:
            path.unlink()
    tiny_run(straight, *BEST, *EVERY, "ckpt_path=auto")
    assert kept(straight) == kept(before)
    for metric in ("val/loss", "train/loss"):
        assert curve(straight, metric) == curve(before, metric)


def test_a_run_goes_on_from_the_best(tmp_path, straight):
    tiny_run(tmp_path, *BEST, *EVERY, f"ckpt_path={straight / 'checkpoints' / kept(straight)[0]}")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert same(final(tmp_path)[part], final(straight)[part]), part


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("callbacks.best.monitor=val/acuracy", "callbacks.best.monitor=val/acuracy: .*did you mean 'val/accuracy'"),
        ("callbacks.best.mode=max", "callbacks.best.mode=max: min, for val/loss"),
        ("optimized_metric=val/los", "optimized_metric=val/los: .*did you mean 'val/loss'"),
    ],
)
def test_what_is_not_measured_is_said_before_anything_runs(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, "callbacks=best", override)
