"""Shared fixtures. The reference material in ``../shared`` exists for maintainers only; tests that read it skip without it."""

import json
from pathlib import Path

import pytest
import torch

from tests import measured

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
    """How many inputs the fuzz tests have opened, a number that should not shrink unseen; and what was to be measured."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports if hasattr(report, "when")]
    failed = {report.nodeid for report in reports if report.outcome == "failed"}
    properties = [
        pair
        for r in reports
        if r.when == "teardown" and r.nodeid not in failed
        for pair in getattr(r, "user_properties", [])
    ]
    counted: dict[str, int] = {}
    for kind, number in (value for name, value in properties if name == "mutated inputs"):
        counted[kind] = counted.get(kind, 0) + number
    if counted:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(counted.items()))
        terminalreporter.write_line(f"mutated inputs opened: {sum(counted.values()):,} ({kinds})")
    if (path := terminalreporter.config.getoption("--measure")) is not None:
        found = [value for name, value in properties if name == "measured"]
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
        terminalreporter.write_line(f"{len(found)} measurements: {path}")


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--measure", metavar="FILE", help="write the largest differences that tests measure (tests/measured.py)"
    )


@pytest.fixture(autouse=True)
def _measured(request, monkeypatch, record_property):
    if request.config.getoption("--measure") is None:
        yield
        return
    measured.taken()
    monkeypatch.setattr(torch.testing, "assert_close", measured.noting_assert_close)
    yield
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    test = f"{request.node.path.relative_to(ROOT)}::{request.node.originalname}"
    if differences := measured.taken():
        record_property("measured", {"test": test, "difference": max(differences)} | measured.subject(params))
