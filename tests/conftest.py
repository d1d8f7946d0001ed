"""Shared fixtures. The reference material in ``../shared`` exists for maintainers only; tests that read it skip without it."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# Tests run in parallel on few cores; more threads would only fight.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the official models' golden logits (../shared/golden) are not on this machine")
    return folder


def pytest_terminal_summary(terminalreporter) -> None:
    """How many inputs the fuzz tests have opened: a number that should not shrink unseen."""
    counted: dict[str, int] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, value in getattr(report, "user_properties", []) if getattr(report, "when", "") == "teardown" else []:
            if name == "mutated inputs":
                kind, number = value
                counted[kind] = counted.get(kind, 0) + number
    if counted:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(counted.items()))
        terminalreporter.write_line(f"mutated inputs opened: {sum(counted.values()):,} ({kinds})")
