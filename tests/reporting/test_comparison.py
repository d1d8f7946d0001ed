import pytest

from src.reporting.comparison import Variant, draw, print_table


def variants(tmp_path, count):
    found = []
    for i in range(count):
        folder = tmp_path / str(i)
        (folder / "csv").mkdir(parents=True)
        (folder / "csv" / "metrics.csv").write_text("step,train/loss,val/accuracy\n9,2.0,\n19,1.0,0.5\n")
        found.append(Variant(f"variant{i}", folder, {"test/loss": 1.0, "test/accuracy": i / 100, "val/loss": 9.0}))
    return found


@pytest.mark.parametrize("count", [2, 11])
def test_the_table_shows_every_variant_and_metric(tmp_path, capsys, count):
    print_table(variants(tmp_path, count), {"accuracy": 0.25})
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


def test_eleven_curves_can_be_told_apart(tmp_path):
    assert draw(variants(tmp_path, 11), tmp_path / "figure.png", "title", 0.25).stat().st_size > 10_000
