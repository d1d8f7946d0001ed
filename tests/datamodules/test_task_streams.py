"""The stream contract, for every task: batch n does not depend on workers, ranks, or on having been stopped."""

import dataclasses
from typing import Any

import pytest
import torch

from src.datamodules import tasks
from src.datamodules.stream import FromStep, Share, StreamLoader, TrainingBatches
from src.datamodules.task import TaskDataModule
from src.datamodules.tasks import MQAR, Brevo, Capo, Copy, Depo, Lano, Mano, Task

TASKS = {
    "depo1": Depo(N=9, K=4),
    "depo2": Depo(N=5, K=4, mini_vocab=4, word_length=(5, 7)),
    "brevo1": Brevo(N=9),
    "brevo2": Brevo(N=6, multi_token=True),
    "capo": Capo(num_people=50, exposures=20),
    "mano": Mano(L=5),
    "lano": Lano(grammar="cfg3f", levels=4),
    "copy": Copy(N=20),
    "mqar": MQAR(num_pairs=4, length=32, vocabulary=64),
}
WINDOW, GLOBAL_BATCH, STEPS = 160, 4, 4


def source(name, seed=0) -> Any:
    return TaskDataModule(
        TASKS[name], window=WINDOW, batch_size=GLOBAL_BATCH, val_windows=3, test_windows=3, isolate=True, seed=seed
    ).source


def read(name, share, first_step=0, num_workers=0):
    """Micro-batches of one rank from ``first_step`` on."""
    batches = TrainingBatches(source(name), share, STEPS)
    return list(
        StreamLoader(batches, batch_size=None, sampler=FromStep(batches, lambda: first_step), num_workers=num_workers)
    )


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_every_task_is_here():
    found = {value for value in vars(tasks).values() if isinstance(value, type) and issubclass(value, Task)}
    assert {type(task) for task in TASKS.values()} == found - {Task}


@pytest.mark.parametrize("name", TASKS)
def test_batch_n_is_the_same_for_any_workers_ranks_and_after_a_stop(name):
    straight = read(name, Share(GLOBAL_BATCH))
    assert len(straight) == STEPS
    assert not torch.equal(straight[0]["tokens"], straight[1]["tokens"])
    for num_workers in (1, 4):
        again = read(name, Share(GLOBAL_BATCH), num_workers=num_workers)
        assert all(same(a, b) for a, b in zip(straight, again, strict=True))
    resumed = read(name, Share(GLOBAL_BATCH), first_step=2)
    assert all(same(a, b) for a, b in zip(straight[2:], resumed, strict=True))
    ranks = [read(name, Share(GLOBAL_BATCH, rank, 2), first_step=1) for rank in range(2)]
    for step, (first, second) in enumerate(zip(*ranks, strict=True), start=1):
        for key in straight[step].keys() - {"step_targets"}:
            assert torch.equal(torch.cat((first[key], second[key])), straight[step][key])
        assert int(first["step_targets"] + second["step_targets"]) == int(straight[step]["step_targets"])


@pytest.mark.parametrize("name", TASKS)
def test_windows_are_what_examples_say(name):
    """Every window starts with a whole example (unless it is longer), and another seed gives other windows."""
    task = TASKS[name]
    found = source(name).windows("train", 3, 2)
    other = source(name, seed=1).windows("train", 3, 2)
    assert not (found["tokens"] == other["tokens"]).all()
    first = found["tokens"][0][found["segments"][0] == 0]
    starts = {tuple(task.example(0, "train", i)[0].tolist()) for i in range(600)}
    assert tuple(first.tolist()) in starts
    assert found["tokens"].max() < task.vocab_size
    assert (found["segments"][:, 1:] - found["segments"][:, :-1] >= 0).all()


@pytest.mark.parametrize("name", TASKS)
def test_tasks_say_what_they_are(name):
    task = TASKS[name]
    assert dataclasses.replace(task) == task
    assert task.groups
    assert all(0 <= task.chance(group) < 1 for group in task.groups)
    assert task.show(0, "test", 1)
    batch = task.batch(0, "val", 0, 3)
    assert batch.tokens.shape == batch.loss_mask.shape
    assert (batch.lengths <= task.max_length).all()
    if task.generation is not None:
        tokens, _ = task.example(0, "val", 0)
        assert 0 < task.prompt_length(tokens) < len(tokens)
        row = torch.tensor([[*tokens.tolist(), task.generation.stop, -1]]).numpy()
        assert task.score(row, row).counts
    else:
        with pytest.raises(ValueError, match="not scored by generation"):
            task.prompt_length(batch.tokens[0])
