"""Runs several small runs, one after another, in each process of a launch: ``torchrun --nproc-per-node 2 tests/several_runs.py jobs.json``.

Starting Python and its libraries takes longer than such a run. jobs.json: [[folder, [overrides]], ...].
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.cli.entry import quieten
from src.training.run import run
from tests.runs import compose_run

if __name__ == "__main__":
    quieten()
    for folder, overrides in json.loads(Path(sys.argv[1]).read_text()):
        run(compose_run(Path(folder), *overrides))
