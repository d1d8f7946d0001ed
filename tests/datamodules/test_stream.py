import pickle
from typing import Any

import numpy as np
import pytest
import torch

from src.datamodules.stream import EvaluationBatches, FromStep, Share, StreamLoader, TrainingBatches
from src.datamodules.task import TaskDataModule
from src.datamodules.tasks import Depo


def source(**options: Any) -> Any:
    settings: dict[str, Any] = {"window": 64, "batch_size": 12, "val_windows": 10, "test_windows": 7}
    return TaskDataModule(
        Depo(N=8, K=2, mini_vocab=16, word_length=(1, 1), compact_ids=True), **settings | options
    ).source


def global_batch(step, world_size=1, accumulate=1, batch_size=12):
    """All windows of one optimizer step, in the order of the stream, put together from what the ranks get."""
    windows = []
    for part in range(accumulate):
        for rank in range(world_size):
            batches = TrainingBatches(source(), Share(batch_size, rank, world_size, accumulate), total_steps=5)
            windows.append(batches[step * accumulate + part]["tokens"])
    return torch.cat(windows)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 3), (2, 1), (2, 2), (4, 1), (4, 3)])
def test_global_batch_n_is_the_same_however_it_is_cut_up(world_size, accumulate):
    for step in (0, 3):
        assert torch.equal(global_batch(step, world_size, accumulate), global_batch(step))


def test_batches_differ_from_step_to_step():
    assert not torch.equal(global_batch(0), global_batch(1))


def test_sources_travel_to_other_processes():
    again = pickle.loads(pickle.dumps(source()))
    assert np.array_equal(again.windows("train", 5, 2)["tokens"], source().windows("train", 5, 2)["tokens"])


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_do_not_depend_on_workers_and_start_where_asked(num_workers):
    batches = TrainingBatches(source(), Share(12, accumulate=2), total_steps=4)
    loader = StreamLoader(batches, batch_size=None, sampler=FromStep(batches, lambda: 1), num_workers=num_workers)
    found = [batch["tokens"] for batch in loader]
    assert len(found) == 6  # steps 1, 2, 3 of two micro-batches each
    assert all(torch.equal(found[i], batches[2 + i]["tokens"]) for i in range(6))


def test_step_targets_count_the_whole_step_of_a_rank():
    batches = TrainingBatches(source(), Share(12, accumulate=3), total_steps=2)
    parts = [batches[3 + part] for part in range(3)]
    total = sum(int(batch["loss_mask"][:, 1:].sum()) for batch in parts)
    assert [int(batch["step_targets"]) for batch in parts] == [total] * 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_covers_every_window_once(world_size):
    reference = source().windows("val", 0, 10)["tokens"]
    found = [[] for _ in range(world_size)]
    lengths = set()
    for rank in range(world_size):
        batches = EvaluationBatches(source(), "val", 3, rank, world_size)
        lengths.add(len(batches))
        for i in range(len(batches)):
            batch = batches[i]
            if batch["loss_mask"].any():
                found[rank].append((i * world_size + rank, batch["tokens"].numpy()))
    assert len(lengths) == 1  # ranks stay in step
    ordered = [tokens for _, tokens in sorted((item for rank in found for item in rank), key=lambda item: item[0])]
    assert np.array_equal(np.concatenate(ordered), reference)


def test_documents_are_numbered_only_when_they_are_to_be_kept_apart():
    assert "segments" not in source().windows("train", 0, 2)
    segments = source(isolate=True).windows("train", 0, 2)["segments"]
    assert segments.max() > 0
    assert (np.diff(segments, axis=1) >= 0).all()


@pytest.mark.parametrize(("batch_size", "world_size", "accumulate"), [(12, 5, 1), (12, 1, 7), (12, 4, 2), (0, 1, 1)])
def test_a_batch_that_cannot_be_cut_evenly_is_refused(batch_size, world_size, accumulate):
    with pytest.raises(
        ValueError, match=f"data.batch_size={batch_size}.*{world_size} process.*{accumulate} accumulated"
    ):
        Share(batch_size, 0, world_size, accumulate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 32}, "examples of depo need 49 tokens"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"eval_batch_size": 0}, "eval_batch_size=0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        source(**options)
