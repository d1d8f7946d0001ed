"""How far apart two ways of computing the same thing were: what ``make trust`` collects from the tests, for docs/trust.md.

With ``--measure=FILE`` every ``torch.testing.assert_close`` notes the largest difference that it saw; tests that compare otherwise call
``note``. The page is made of these notes by ``python -m tests.trust.page``.
"""

from __future__ import annotations

from typing import Any

import torch

_noted: list[float] = []
_assert_close = torch.testing.assert_close


def note(difference: float | torch.Tensor) -> None:
    """A difference that the running test has measured."""
    _noted.append(float(difference))


def noting_assert_close(actual: Any, expected: Any, **options: Any) -> None:
    """``torch.testing.assert_close``, which also notes what it has seen."""
    _assert_close(actual, expected, **options)
    if isinstance(actual, torch.Tensor) and actual.is_floating_point() and actual.numel():
        a, b = actual.detach().double(), expected.detach().double()
        both = a.isfinite() & b.isfinite()
        note((a - b)[both].abs().max().item() if both.any() else 0.0)


def taken() -> list[float]:
    """What has been noted since the last call."""
    found = list(_noted)
    _noted.clear()
    return found


def subject(params: dict[str, Any]) -> dict[str, str]:
    """Of which model, or operation and backend, a test with these parameters speaks."""
    found: dict[str, str] = {}
    if isinstance(params.get("net"), tuple):
        found["model"] = params["net"][0]
    if isinstance(params.get("model"), str):
        found["model"] = params["model"]
    if "run" in params:
        found["dtype"] = str(params["run"]).removeprefix("torch.")
    if "dtype" in params:
        found["dtype"] = str(params["dtype"]).removeprefix("torch.")
    if "name" in params:
        found["golden"] = str(params["name"])
    if "backend" in params:
        operation = params.get("operation") or getattr(
            getattr(params.get("op"), "front", None), "__name__", "causal_conv"
        )
        found["backend"] = f"{operation}: {params['backend']}"
    return found
