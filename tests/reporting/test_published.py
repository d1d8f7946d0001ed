"""Published numbers and ours: each quantity is better in its own direction, whatever the sweep compares by."""

import json
import math

import pytest

from src.reporting.published import beside
from src.reporting.results import SweepResults
from src.reporting.tables import SweepTables
from src.runs.registry import write_json
from tests.reporting.fake_sweeps import make_sweep

KL = {"task": "Lano-KL", "difficulty": "cfg3f", "size": "8L512D"}
ACCURACY = {"task": "Mano", "difficulty": "L=16", "size": "8L512D"}


def tables_of(tmp_path, metric: str, where: dict, own: str, values: list[float]) -> SweepTables:
    """A sweep by one metric whose runs have another one too."""
    names = {"A": "Llama(RoPE) original"}
    sweep = make_sweep(
        tmp_path,
        tasks=("Lano",),
        variants=("A",),
        rates=(1e-3,),
        seeds=(1, 2, 3),
        unfinished=0,
        failed=0,
        metrics={"Lano": metric},
        published={"tasks": {"Lano": where}, "variants": names},
        expect=(),
    )
    for job, value in zip(sweep.plan["jobs"], values, strict=True):
        path = sweep.path.parent / job["folder"] / "results.json"
        results = json.loads(path.read_text())
        results["metrics"][own] = value
        write_json(path, results)
    return SweepTables(SweepResults(sweep.path))


@pytest.mark.parametrize(
    ("metric", "where", "own", "best"),
    [
        ("test/accuracy", KL, "test/kl", 0.5),
        ("test/loss", ACCURACY, "test/accuracy", 90.0),
        ("test/token_accuracy", ACCURACY, "test/accuracy", 90.0),  # a share of tokens is no share of answers
    ],
)
def test_the_best_is_in_the_direction_of_what_was_published(tmp_path, metric, where, own, best):
    values = [0.9, 0.5, 0.7]
    found, problems = beside(tables_of(tmp_path, metric, where, own, values))
    assert (len(found), problems) == (1, [])
    assert found[0]["best"] == pytest.approx(best)


def test_a_run_that_diverged_has_no_number_beside_the_published_one(tmp_path):
    found, _ = beside(tables_of(tmp_path, "test/accuracy", KL, "test/kl", [0.9, math.inf, 0.7]))
    assert (found[0]["seeds"], found[0]["mean"], found[0]["best"]) == (2, pytest.approx(0.8), 0.7)
