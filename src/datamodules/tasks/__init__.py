"""Synthetic tasks: numpy and numba only, usable without torch.

>>> from src.datamodules.tasks import Depo
>>> tokens, loss_mask = Depo(N=5, K=4, mini_vocab=3).example(seed=0, split="train", index=0)
"""

from src.datamodules.tasks.base import Examples, Generation, Score, Task, Windows
from src.datamodules.tasks.brevo import Brevo
from src.datamodules.tasks.capo import Capo
from src.datamodules.tasks.copy import Copy
from src.datamodules.tasks.depo import Depo
from src.datamodules.tasks.lano import Lano
from src.datamodules.tasks.mano import Mano
from src.datamodules.tasks.mqar import MQAR

__all__ = [
    "MQAR",
    "Brevo",
    "Capo",
    "Copy",
    "Depo",
    "Examples",
    "Generation",
    "Lano",
    "Mano",
    "Score",
    "Task",
    "Windows",
]
