"""What is measured on evaluation windows, as torchmetrics (so that ranks are summed before anything is divided)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from src.components.backbone import Backbone
from src.evaluation.names import lower_is_better  # noqa: F401 (a name that others import from here)


class Evaluator(Metric):
    """Mean loss per target (nats) and share of targets predicted right.

    ``update`` takes the windows and what a model made of them; B windows of L tokens, N targets in all (the true entries of
    ``loss_mask[:, 1:]``, row by row). ``examine`` then has the model write, for data that are scored so.
    """

    full_state_update = False
    measures: tuple[str, ...] = ("loss", "token_accuracy")  # the names that ``compute`` may give
    nll_sum: Tensor
    right: Tensor
    targets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, tuple[int, int]] = {}
        for name in ("nll_sum", "right", "targets"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, batch: dict[str, Tensor], logits: Tensor, nll: Tensor) -> None:
        """Adds a batch.

        Args:
            batch: ``tokens`` and ``loss_mask`` (target-aligned), ``[B, L]`` each, and what else the data has.
            logits: ``[N, V]`` at each target.
            nll: ``[N]``, negative log-likelihood of each target in nats.
        """
        targets = targets_of(batch)
        self.nll_sum += nll.double().sum()
        self.right += (logits.argmax(dim=-1) == targets).sum()
        self.targets += targets.numel()

    def examine(self, net: Backbone, count: bool = True) -> None:
        """Has the model write and scores it; called once all batches are in.

        Args:
            net: the model.
            count: whether to add the result. Every rank must write, because sharded models compute together; one counts.
        """

    def compute(self) -> dict[str, Tensor]:
        """``loss`` and ``token_accuracy``."""
        return {"loss": self.nll_sum / self.targets, "token_accuracy": self.right / self.targets}


class TextEvaluator(Evaluator):
    """Adds ``bits_per_byte``: the total loss in bits over the bytes of text that the targets stand for.

    A tokenizer that rewrites the text has tokens whose bytes are not the text's (a mark at the end of every word, say). Their sum is then
    scaled by how many bytes the texts of the split have for each of the tokens': exact where the whole split is scored, the mean of the
    split where some of its windows are. It is not left out, because without it such a tokenizer could not be compared with any other; but
    what a tokenizer throws away (capitals, unknown words) is no loss here, and makes it look better than it is.

    Args:
        bytes_per_token: ``[vocab]`` bytes of text behind each token id; 0 for special tokens, whose cost counts all the same.
        scale: bytes of the texts for each byte that their tokens stand for; 1 for tokenizers whose tokens are the text, byte for byte.
    """

    measures = (*Evaluator.measures, "bits_per_byte")
    num_bytes: Tensor

    def __init__(self, bytes_per_token: NDArray[np.integer], scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.register_buffer("bytes_per_token", torch.as_tensor(bytes_per_token, dtype=torch.float64), persistent=False)
        self.add_state("num_bytes", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, batch: dict[str, Tensor], logits: Tensor, nll: Tensor) -> None:
        """See ``Evaluator.update``."""
        super().update(batch, logits, nll)
        table: Any = self.bytes_per_token
        self.num_bytes += table[targets_of(batch)].sum()

    def compute(self) -> dict[str, Tensor]:
        """Adds bits per byte."""
        return super().compute() | {"bits_per_byte": self.nll_sum / math.log(2) / (self.num_bytes * self.scale)}


def targets_of(batch: dict[str, Tensor]) -> Tensor:
    """The tokens to be predicted, ``[N]``, row by row."""
    return batch["tokens"][:, 1:][batch["loss_mask"][:, 1:]]
