"""Which evaluator belongs to which data."""

from __future__ import annotations

from functools import singledispatch

from src.datamodules.base import StreamDataModule
from src.datamodules.task import TaskDataModule
from src.datamodules.tasks import Capo, Lano, Task
from src.datamodules.text import TextDataModule
from src.evaluation.evaluators import Evaluator, TextEvaluator
from src.evaluation.task_evaluators import CapoEvaluator, LanoEvaluator, TaskEvaluator


@singledispatch
def evaluator_class(task: Task) -> type[TaskEvaluator]:
    """The class of a task's evaluator; ``evaluator_class.register(MyTask)`` gives a task its own."""
    return TaskEvaluator


@evaluator_class.register
def _(task: Lano) -> type[TaskEvaluator]:
    return LanoEvaluator


@evaluator_class.register
def _(task: Capo) -> type[TaskEvaluator]:
    return CapoEvaluator


def evaluator_of(datamodule: StreamDataModule, split: str) -> Evaluator:
    """A fresh metric for these data.

    Args:
        datamodule: the data.
        split: val or test.
    """
    if isinstance(datamodule, TaskDataModule):
        made = evaluator_class(datamodule.task)
        return made(datamodule.task, datamodule.seed, split, datamodule.answers[split], datamodule.eval_batch_size)
    if isinstance(datamodule, TextDataModule):
        corpus = datamodule.corpus
        return TextEvaluator(corpus.tokenizer.bytes_per_token, corpus.bytes_ratio(split))
    return Evaluator()
