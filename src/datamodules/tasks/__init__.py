"""Synthetic tasks: numpy and numba only, usable without torch.

>>> from src.datamodules.tasks import Depo
>>> tokens, loss_mask = Depo(N=5, K=4, mini_vocab=3).example(seed=0, split="train", index=0)
"""

from src.datamodules.tasks.base import Score, Task, Windows
from src.datamodules.tasks.depo import Depo

__all__ = ["Depo", "Score", "Task", "Windows"]
