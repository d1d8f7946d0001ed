"""Every model, stopped and resumed, is the straight run bit for bit; and docs/trust.md speaks of every model."""

from pathlib import Path

import pytest
import torch

from src.build import CONFIG_DIR
from src.training.run import run
from tests.measured import note
from tests.runs import ROOT, TINY, compose_run, curve, final
from tests.trust.page import MODEL_COLUMNS, PAGE

MODELS = sorted(p.stem for p in (Path(CONFIG_DIR) / "model").glob("*.yaml") if p.stem != "base")
# One of each kind of memory in `make test`; the others differ in their numbers only.
QUICK = {"llama", "gla", "gdn", "mamba2"}
EACH = [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in MODELS]


@pytest.mark.parametrize("model", EACH)
def test_resuming_is_bit_for_bit(tmp_path, model):
    canon = "ABC" if model == "moe" else "ABCD"
    options = [f"model={model}", "size=tiny", "model.dim=32", f"canon.positions={canon}", "trainer.max_steps=4"]
    options += ["callbacks.checkpoint.every_n_train_steps=2", "callbacks.checkpoint.save_top_k=-1"]
    small = [option for option in TINY if model != "mamba2_no_mlp" or "feedforward" not in option]
    straight = run(compose_run(tmp_path / "straight", *small, *options))
    checkpoint = tmp_path / "straight" / "checkpoints" / "step00000002.ckpt"
    assert run(compose_run(tmp_path / "resumed", *small, *options, f"ckpt_path={checkpoint}")) == straight
    for part in ("state_dict", "optimizer_states"):
        found, expected = (tensors_of(final(tmp_path / name)[part]) for name in ("resumed", "straight"))
        assert found.keys() == expected.keys()
        for name in found:
            note((found[name].double() - expected[name].double()).abs().max() if found[name].numel() else 0.0)
            assert torch.equal(found[name], expected[name]), name
    assert curve(tmp_path / "resumed", "train/loss") == curve(tmp_path / "straight", "train/loss")[2:]


def tensors_of(node: object, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return {name: node}
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []
    return {key: value for k, part in pairs for key, value in tensors_of(part, f"{name}.{k}").items()}


def test_the_page_speaks_of_every_model_and_property():
    """It is made by `make trust`; a model that has been added since has not been measured."""
    page = (ROOT / PAGE).read_text()
    rows = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if line.startswith("| `")}
    for model in MODELS:
        assert model in rows, f"{model} is not in {PAGE}: make trust"
        cells = [cell.strip() for cell in rows[model].split("|")[2:-1]]
        assert len(cells) == len(MODEL_COLUMNS)
        assert all(cells), f"{model}: a property has not been measured: make trust"
