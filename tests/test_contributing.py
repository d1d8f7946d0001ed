"""The mixer that CONTRIBUTING.md shows works as it says: two files more, nothing else edited."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.runs import ROOT, TINY


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with the files that the document shows."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("src", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Add a mixer")[1].split("\n## ")[0]
    shown = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", section, flags=re.S)
    assert [name.split("/")[0] for name, _ in shown] == ["src", "configs"]
    for name, text in shown:
        assert not (folder / name).exists()
        (folder / name).write_text(text)
    return folder


def call(project, *command):
    environment = {**os.environ, "PYTHONPATH": str(project)}
    found = subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found.stdout


@pytest.mark.slow
def test_it_trains(project):
    out = call(project, "src/train.py", "model=retention", "canon.positions=ABCD", *TINY)
    assert "test/loss" in out


@pytest.mark.slow
def test_it_has_the_properties_of_every_model(project):
    out = call(project, "-m", "pytest", "tests/components/test_models.py", "-k", "retention", "-p", "no:cacheprovider")
    passed = re.search(r"(\d+) passed", out)
    assert passed is not None
    assert int(passed[1]) > 50
