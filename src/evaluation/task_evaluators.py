"""How the synthetic tasks are measured: by single predictions, by what a model writes, by distributions, by bits."""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.components.backbone import Backbone
from src.components.generation import Sampling, generate
from src.datamodules.tasks.base import SPLITS, Score, Split, Task
from src.datamodules.tasks.capo import NAME, Capo, ceiling_bits, learned_bits
from src.datamodules.tasks.lano import Lano, entropy, kl_divergence
from src.evaluation.evaluators import Evaluator


class TaskEvaluator(Evaluator):
    """Adds a task's score: ``accuracy`` over all answers, ``accuracy/<group>`` by difficulty, and the task's extras.

    A task without ``generation`` is scored on the most probable token at each target (teacher forcing); another on what the
    model writes when given the beginnings of the split's first examples.

    Args:
        task: the task.
        seed: of the data.
        split: val or test.
        written: how many examples the model writes.
        batch_size: how many it writes at a time.
    """

    group_right: Tensor
    group_total: Tensor

    def __init__(self, task: Task, seed: int, split: str, written: int, batch_size: int):
        super().__init__()
        self.task, self.seed = task, seed
        self.split: Split = cast(Split, split)
        self.written, self.batch_size = written, batch_size
        self.names = [f"accuracy/{group}" for group in task.groups] + list(task.extras)
        self.measures = (*self.measures, "accuracy", *self.names)
        for name in ("group_right", "group_total"):
            self.add_state(name, torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, batch: dict[str, Tensor], logits: Tensor, nll: Tensor) -> None:
        """See ``Evaluator.update``."""
        super().update(batch, logits, nll)
        if self.task.generation is None:
            predicted = torch.full_like(batch["tokens"], -1)
            predicted[:, 1:][batch["loss_mask"][:, 1:]] = logits.argmax(dim=-1)
            self._add(self._score(batch, predicted))

    def _score(self, batch: dict[str, Tensor], predicted: Tensor) -> Score:
        return self.task.score(batch["tokens"].cpu().numpy(), predicted.cpu().numpy())

    def examine(self, net: Backbone, count: bool = True) -> None:
        """See ``Evaluator.examine``."""
        if self.task.generation is None:
            return
        settings = Sampling(**dataclasses.asdict(self.task.generation))
        for first in range(0, self.written, self.batch_size):
            indices = range(first, min(first + self.batch_size, self.written))
            examples = [self.task.example(self.seed, self.split, index)[0] for index in indices]
            prompts = [tokens[: self.task.prompt_length(tokens)] for tokens in examples]
            keys = [(self.seed, SPLITS.index(self.split), index) for index in indices]
            texts = generate(net, prompts, settings, keys if settings.temperature else None)
            # At least one column of padding tells an unfinished answer from one that a window has cut.
            longest = 1 + max(len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True))
            rows = np.full((len(prompts), longest), -1, dtype=np.int64)
            for row, prompt, text in zip(rows, prompts, texts, strict=True):
                row[: len(prompt) + len(text)] = np.concatenate((prompt, text))
            if count:
                self._add(self.task.score(rows, rows))

    def _add(self, score: Score) -> None:
        found = {f"accuracy/{group}": counts for group, counts in score.counts.items()} | score.extra
        for i, name in enumerate(self.names):
            right, total = found.get(name, (0, 0))
            self.group_right[i] += right
            self.group_total[i] += total

    def compute(self) -> dict[str, Tensor]:
        """Adds accuracies, of the difficulties that came up."""
        groups = len(self.task.groups)
        right = {"accuracy": self.group_right[:groups].sum()} | dict(zip(self.names, self.group_right, strict=True))
        total = {"accuracy": self.group_total[:groups].sum()} | dict(zip(self.names, self.group_total, strict=True))
        self.counts = {name: (int(right[name]), int(total[name])) for name in right if total[name] > 0}
        return super().compute() | {name: right[name] / total[name] for name in self.counts}


class LanoEvaluator(TaskEvaluator):
    """Adds how far the predicted distributions are from the grammar's: ``kl``, with ``leaked`` and ``entropy``.

    ``kl`` and ``leaked`` are taken over the first sentence of every window, which nothing precedes but <bos>; one that the window cuts is
    left out. ``kl`` is the mean over sentences of the mean over rows (nats); ``leaked`` the probability that the model gives to tokens
    outside of the grammar; ``kl_sentences`` how many sentences that were. ``entropy`` is that of the exact distributions, over every
    target of every window as ``loss`` is: the loss that a perfect model is expected to have. What such a model really has on these
    windows scatters around it, as the tokens that came up are more or less probable than usual.
    """

    measures = (*Evaluator.measures, "kl", "leaked", "entropy", "kl_sentences")
    distribution_sums: Tensor  # kl and leaked over first sentences, entropy over targets, first sentences

    def __init__(self, task: Task, seed: int, split: str, written: int, batch_size: int):
        super().__init__(task, seed, split, written, batch_size)
        self.add_state("distribution_sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, batch: dict[str, Tensor], logits: Tensor, nll: Tensor) -> None:
        """See ``Evaluator.update``."""
        super().update(batch, logits, nll)
        task = cast(Lano, self.task)
        tokens = batch["tokens"].cpu().numpy()
        by_position = logits.view(tokens.shape[0], tokens.shape[1] - 1, -1)
        outcomes = torch.tensor([task.stop_id, *range(1, task.language.terminals + 1)], device=logits.device)
        whole, cut = _sentences(tokens, task)
        exact = task.next_token_distributions([sentence for _, _, sentence in whole])
        # Behind the last token of a beginning there is no target any more.
        begun = [rows[:-1] for rows in task.next_token_distributions(cut, whole=False)]
        nats = sum(float(entropy(rows).sum()) for rows in exact + begun)
        self.distribution_sums += torch.tensor([0, 0, nats, 0], dtype=torch.float64, device=logits.device)
        for (row, start, _), truth in zip(whole, exact, strict=True):
            if start == 0:
                model = by_position[row, : len(truth)].double().softmax(dim=-1)[:, outcomes].cpu().numpy()
                found = (kl_divergence(truth, model), 1 - model.sum(axis=1).mean(), 0.0, 1.0)
                self.distribution_sums += torch.tensor(found, dtype=torch.float64, device=logits.device)

    def compute(self) -> dict[str, Tensor]:
        """Adds ``entropy``, and the means over first sentences, if any was whole."""
        kl, leaked, nats, sentences = self.distribution_sums
        found = super().compute() | {"entropy": nats / self.targets}
        return found | (
            {"kl": kl / sentences, "leaked": leaked / sentences, "kl_sentences": sentences} if sentences else {}
        )


def _sentences(
    tokens: NDArray[np.int64], task: Lano
) -> tuple[list[tuple[int, int, NDArray[np.int64]]], list[NDArray[np.int64]]]:
    """The sentences of windows: row, place of its <bos> and terminals of each that ends in its window; and what there is of the others."""
    whole, cut = [], []
    for number, row in enumerate(tokens):
        starts = np.flatnonzero(row == task.bos_id)
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            sentence = row[start + 1 : end]
            if len(sentence) and sentence[-1] == task.eos_id:
                whole.append((number, int(start), sentence[:-1]))
            elif end < len(row):
                whole.append((number, int(start), sentence))
            else:
                cut.append(sentence)
    return whole, cut


class CapoEvaluator(TaskEvaluator):
    """Adds how many bits about the people a model has learnt (Part 3.3): per person, per parameter, and the ceiling."""

    measures = (
        *Evaluator.measures,
        *("name_nats", "value_nats", "bits_per_person", "bits_per_person_ceiling"),
        *("bits_per_parameter", "bits_per_parameter_ceiling"),
    )
    nats: Tensor  # of names, of values, and the number of biographies

    def __init__(self, task: Task, seed: int, split: str, written: int, batch_size: int):
        super().__init__(task, seed, split, written, batch_size)
        self.parameters_of_model: int | None = None
        self.add_state("nats", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, batch: dict[str, Tensor], logits: Tensor, nll: Tensor) -> None:
        """See ``Evaluator.update``; needs ``kinds`` in the batch."""
        super().update(batch, logits, nll)
        kinds = batch["kinds"]
        targets = kinds[:, 1:][batch["loss_mask"][:, 1:]]
        people = ((kinds[:, 1:] == NAME) & (kinds[:, :-1] != NAME)).sum()
        self.nats += torch.stack(
            (nll[targets == NAME].double().sum(), nll[targets > NAME].double().sum(), people.double())
        )

    def _score(self, batch: dict[str, Tensor], predicted: Tensor) -> Score:
        kinds = batch["kinds"].cpu().numpy()
        return cast(Capo, self.task).score(batch["tokens"].cpu().numpy(), predicted.cpu().numpy(), kinds)

    def examine(self, net: Backbone, count: bool = True) -> None:
        """Takes the model's size: capacity is bits per parameter."""
        self.parameters_of_model = net.count_parameters()

    def compute(self) -> dict[str, Tensor]:
        """Adds ``bits_per_person`` and its ceiling, and ``bits_per_parameter`` and its ceiling once the model's size is known."""
        people = cast(Capo, self.task).num_people
        name_nats, value_nats = (self.nats[:2] / self.nats[2]).tolist()
        bits, ceiling = learned_bits(people, name_nats, value_nats), ceiling_bits(people)
        found = {"name_nats": name_nats, "value_nats": value_nats, "bits_per_person": bits / people}
        found["bits_per_person_ceiling"] = ceiling / people
        if self.parameters_of_model is not None:
            found["bits_per_parameter"] = bits / self.parameters_of_model
            found["bits_per_parameter_ceiling"] = ceiling / self.parameters_of_model
        return super().compute() | {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
