import json
from dataclasses import replace

import pytest

from src.cli.comparison import summarise
from src.reporting.comparison import Variant, draw, print_table
from tests.runs import TINY, compose_run


def variants(tmp_path, count):
    found = []
    for i in range(count):
        folder = tmp_path / str(i)
        (folder / "csv").mkdir(parents=True)
        (folder / "csv" / "metrics.csv").write_text("step,train/loss,val/accuracy\n9,2.0,\n19,1.0,0.5\n")
        found.append(
            Variant(
                f"variant{i}", folder, {"test/loss": 1.0, "test/accuracy": i / 100, "val/loss": 9.0}, {"accuracy": 0.25}
            )
        )
    return found


@pytest.mark.parametrize("count", [2, 11])
def test_the_table_shows_every_variant_and_metric(tmp_path, capsys, count):
    print_table(variants(tmp_path, count))
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]
    rows = {row[0]: row[1:] for row in cells if len(row) > 1}
    if count == 2:
        assert rows["metric"] == ["variant0", "variant1", "chance"]
        assert rows["accuracy"] == ["0.000", "0.010", "0.250"]
        assert rows["loss"] == ["1.000", "1.000", ""]
    else:
        assert rows[""] == ["loss", "accuracy"]
        assert [rows[f"variant{i}"][1] for i in range(11)] == [f"{i / 100:.3f}" for i in range(11)]
        assert rows["chance"] == ["", "0.250"]


def test_variants_on_other_data_have_levels_of_chance_of_their_own(tmp_path, capsys):
    short, long = variants(tmp_path, 2)
    print_table([short, replace(long, chance={"accuracy": 0.5}, test_metrics=long.test_metrics | {"test/extra": 1.5})])
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["accuracy", "0.000", "0.010", "0.250", "0.500"] in rows
    assert ["extra", "", "1.500", "", ""] in rows


def test_eleven_curves_can_be_told_apart(tmp_path):
    assert draw(variants(tmp_path, 11), tmp_path / "figure.png", "title").stat().st_size > 10_000


def test_names_are_no_formulas(tmp_path):
    odd = [replace(variant, name=rf"$\x{i}$") for i, variant in enumerate(variants(tmp_path, 2))]
    assert draw(odd, tmp_path / "figure.png", r"$\x$").is_file()


def test_variants_that_other_code_has_run_are_told(tmp_path, caplog):
    """Those that had finished before the code was changed are not run again."""
    found = variants(tmp_path, 2)
    config = compose_run(tmp_path, *TINY)
    folders, metrics = {v.name: v.folder for v in found}, {v.name: v.test_metrics for v in found}
    for changes in ([None, "1a2b3c4d"], ["1a2b3c4d", "1a2b3c4d"], ["9f8e7d6c", "1a2b3c4d"]):
        for variant, sha in zip(found, changes, strict=True):
            git = {"commit": "b3059359c0", "dirty": True, "diff_sha256": sha} if sha else None
            (variant.folder / "run.json").write_text(json.dumps({"git": git}))
        assert "states of the code" not in caplog.text
        summarise(config, tmp_path, folders, metrics)
    assert "made by 2 states of the code: b3059359c with changes 9f8e7d (1 run)" in caplog.text
