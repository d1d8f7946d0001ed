"""The claims of docs/playground.md: minutes each, run with ``pytest -m slow``."""

import csv
from itertools import pairwise

import pytest

from tests.runs import command, results

pytestmark = pytest.mark.slow

# experiment -> most that a model without Canon layers scores, least that one with them scores
LIFT = {
    "quickstart": (0.3, 0.5),
    "smoke/depo2": (0.3, 0.35),
    "smoke/brevo1": (0.1, 0.4),
    "smoke/brevo2": (0.1, 0.15),
    "smoke/mano": (0.4, 0.6),
    "smoke/lano": (0.1, 0.5),
    "smoke/copy": (0.6, 0.95),
}


@pytest.mark.parametrize("experiment", LIFT)
@pytest.mark.parametrize("seed", [1, 2])
def test_canon_lifts_a_model_without_positions(experiment, seed, tmp_path):
    command("train", f"experiment={experiment}", f"seed={seed}", f"data.seed={seed}", f"hydra.run.dir={tmp_path}")
    without, canon = (results(tmp_path / name)["metrics"]["test/accuracy"] for name in ("without-canon", "canon-abcd"))
    most, least = LIFT[experiment]
    assert without < most
    assert canon > least


def test_bits_per_parameter_rise_with_exposures(tmp_path):
    command("train", "experiment=smoke/capo", f"hydra.run.dir={tmp_path}")
    for name in ("without-canon", "canon-abcd"):
        with (tmp_path / name / "csv" / "metrics.csv").open() as file:
            column = "val/bits_per_parameter"
            curve = [float(row[column]) for row in csv.DictReader(file) if row.get(column)]
        assert len(curve) > 4
        assert all(a < b for a, b in pairwise(curve))
        assert curve[-1] > 0
