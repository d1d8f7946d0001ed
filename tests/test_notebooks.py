"""The notebooks run from top to bottom, on a run that exists and without one."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.runs import ROOT, tiny_run

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(path: Path) -> str:
    """Everything that the notebook prints."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_on_an_existing_run(path, tmp_path, monkeypatch):
    monkeypatch.setenv("CANON_LAB_LOGS", str(tmp_path))
    folder = tmp_path / "train" / "runs" / "today"
    for name, canon in (("canon-abcd", "ABCD"), ("without-canon", "''")):
        tiny_run(folder / name, f"canon.positions={canon}")
    text = execute(path)
    assert str(folder / "canon-abcd") in text
    assert "steps from" in text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_trains_a_run_when_there_is_none(path, tmp_path, monkeypatch):
    monkeypatch.setenv("CANON_LAB_LOGS", str(tmp_path))
    monkeypatch.setenv("CANON_LAB_STEPS", "2")
    assert str(tmp_path / "train" / "runs") in execute(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
