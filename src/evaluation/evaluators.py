"""What is measured on evaluation windows, as torchmetrics (so that ranks are summed before anything is divided)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from src.datamodules.tasks.base import Task


class Evaluator(Metric):
    """Mean loss per target (nats) and share of targets predicted right.

    ``update`` takes the windows and what a model made of them; B windows of L tokens, N targets in all (the true entries of
    ``loss_mask[:, 1:]``, row by row).
    """

    full_state_update = False
    nll_sum: Tensor
    right: Tensor
    targets: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nll_sum", "right", "targets"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor, loss_mask: Tensor, predictions: Tensor, nll: Tensor) -> None:
        """Adds a batch.

        Args:
            tokens: ``[B, L]``.
            loss_mask: ``[B, L]``, target-aligned.
            predictions: ``[N]``, the most probable token at each target.
            nll: ``[N]``, negative log-likelihood of each target in nats.
        """
        targets = tokens[:, 1:][loss_mask[:, 1:]]
        self.nll_sum += nll.double().sum()
        self.right += (predictions == targets).sum()
        self.targets += targets.numel()

    def compute(self) -> dict[str, Tensor]:
        """``loss`` and ``token_accuracy``."""
        return {"loss": self.nll_sum / self.targets, "token_accuracy": self.right / self.targets}


class TaskEvaluator(Evaluator):
    """Adds a synthetic task's score: ``accuracy`` over all answers and ``accuracy/<group>`` by difficulty."""

    group_right: Tensor
    group_total: Tensor

    def __init__(self, task: Task):
        super().__init__()
        self.task = task
        for name in ("group_right", "group_total"):
            self.add_state(name, torch.zeros(len(task.groups), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor, loss_mask: Tensor, predictions: Tensor, nll: Tensor) -> None:
        """See ``Evaluator.update``."""
        super().update(tokens, loss_mask, predictions, nll)
        predicted = torch.full_like(tokens, -1)
        predicted[:, 1:][loss_mask[:, 1:]] = predictions
        counts = self.task.score(tokens.cpu().numpy(), predicted.cpu().numpy()).counts
        for i, group in enumerate(self.task.groups):
            right, total = counts.get(group, (0, 0))
            self.group_right[i] += right
            self.group_total[i] += total

    def compute(self) -> dict[str, Tensor]:
        """Adds accuracies; a difficulty that never came up is NaN."""
        result = super().compute()
        result["accuracy"] = self.group_right.sum() / self.group_total.sum()
        for i, group in enumerate(self.task.groups):
            result[f"accuracy/{group}"] = self.group_right[i] / self.group_total[i]
        return result


class TextEvaluator(Evaluator):
    """Adds ``bits_per_byte``: the total loss in bits over the bytes of text that the targets stand for.

    Args:
        bytes_per_token: ``[vocab]`` bytes of text behind each token id; 0 for special tokens, whose cost counts all the same.
    """

    num_bytes: Tensor

    def __init__(self, bytes_per_token: NDArray[np.integer]):
        super().__init__()
        self.register_buffer("bytes_per_token", torch.as_tensor(bytes_per_token, dtype=torch.float64), persistent=False)
        self.add_state("num_bytes", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor, loss_mask: Tensor, predictions: Tensor, nll: Tensor) -> None:
        """See ``Evaluator.update``."""
        super().update(tokens, loss_mask, predictions, nll)
        table: Any = self.bytes_per_token
        self.num_bytes += table[tokens[:, 1:][loss_mask[:, 1:]]].sum()

    def compute(self) -> dict[str, Tensor]:
        """Adds bits per byte."""
        return super().compute() | {"bits_per_byte": self.nll_sum / math.log(2) / self.num_bytes}
