import json
from pathlib import Path

import pytest

WORDS = ["layer", "canon", "window", "stream", "mixer", "exposure", "naïve", "Ωμέγα", "東京", "🙂", "=", "(", ")", "\t"]


def text_of(index: int) -> str:
    """Some words, their number and order set by `index`."""
    return (
        " ".join(WORDS[(index * 7 + i * (index % 5 + 1)) % len(WORDS)] for i in range(20 + index % 30))
        + f"\nn{index}\n"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eighty small documents: 50 files in two folders and 30 JSON lines."""
    root = tmp_path / "texts"
    (root / "b").mkdir(parents=True)
    for i in range(50):
        root.joinpath("b" if i % 2 else ".", f"note{i:02d}.txt").write_text(text_of(i), encoding="utf-8", newline="")
    lines = [json.dumps({"id": i, "text": text_of(i)}) for i in range(50, 80)]
    (root / "rest.jsonl").write_text("\n".join(lines) + "\n")
    return root
