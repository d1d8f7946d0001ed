"""One example of a synthetic task as a picture, for whoever wants to see what a model has to do.

    Depo     a ring, and each question as an arc of k steps         Brevo    the graph by depth, ancestors of the query coloured
    Mano     the expression as a tree, with all values              Lano     the parse tree, or its layers for long sentences
    Copy     two rows, joined                                       MQAR     a strip, with arcs from pairs to questions
    Capo     the text, with its facts in colour

>>> from src.datamodules.tasks import Depo
>>> from src.reporting.drawings import draw
>>> task = Depo(N=12, K=4, mini_vocab=20)
>>> draw(task, task.example(seed=0, split="test", index=0)[0]).savefig("depo.png")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure
from numpy.typing import NDArray

from src.datamodules.tasks import MQAR, Brevo, Capo, Copy, Depo, Lano, Mano, Task
from src.reporting.drawings.biography import draw_capo
from src.reporting.drawings.ring import draw_depo
from src.reporting.drawings.strips import draw_copy, draw_mqar, draw_window
from src.reporting.drawings.trees import draw_brevo, draw_lano, draw_mano

__all__ = ["draw", "draw_window"]

DRAWERS: dict[type[Task], Callable[[Any, NDArray[Any], str], Figure]] = {
    Depo: draw_depo,
    Brevo: draw_brevo,
    Mano: draw_mano,
    Lano: draw_lano,
    Copy: draw_copy,
    MQAR: draw_mqar,
    Capo: draw_capo,
}


def draw(task: Task, tokens: NDArray[Any], caption: str = "") -> Figure | None:
    """Draws one whole example; ``figure.savefig(path)`` writes it.

    Args:
        task: whose example it is.
        tokens: the example.
        caption: where it comes from, in small print.

    Returns:
        The figure, or None for a task that has no drawing.
    """
    own = next((drawer for kind, drawer in DRAWERS.items() if isinstance(task, kind)), None)
    return own and own(task, tokens, caption)
