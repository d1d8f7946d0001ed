"""The mixer that CONTRIBUTING.md shows works as it says."""

import re

import pytest
import torch

from src.components.backbone import Backbone
from src.components.canon import CanonConfig
from tests.runs import ROOT


@pytest.fixture(scope="module")
def net():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, flags=re.S)
    assert code is not None
    namespace: dict = {}
    exec(compile(code[1], "CONTRIBUTING.md", "exec"), namespace)
    return Backbone(
        vocab_size=20, dim=16, depth=2, mixers={"C": namespace["CausalMean"]}, pattern="C", canon=CanonConfig("ABCD")
    ).eval()


def test_decodes_as_it_trains_and_keeps_documents_apart(net):
    ids, segments = torch.randint(20, (2, 9)), torch.tensor([[0] * 4 + [1] * 5] * 2)
    state, pieces = net.initial_state(), []
    with torch.no_grad():
        for t in range(9):
            logits, state = net(ids[:, t : t + 1], segments=segments[:, t : t + 1], state=state)
            pieces.append(logits)
        together = net(ids, segments=segments)
        apart = torch.cat([net(ids[:, :4]), net(ids[:, 4:])], dim=1)
    torch.testing.assert_close(torch.cat(pieces, dim=1), together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-5)


def test_formulas(net):
    assert net.count_parameters() == sum(p.numel() for p in net.parameters())
