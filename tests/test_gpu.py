"""What only a CUDA device can show. Run with ``pytest -m gpu``."""

import pytest
import torch

from src.build import build_model
from src.components.canon import Canon
from tests.runs import results, tiny_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def on_both(module, x):
    """Output and gradients on the CPU and on the GPU."""
    found = []
    for device in ("cpu", "cuda"):
        module, leaf = module.to(device), x.detach().to(device).requires_grad_()
        module.zero_grad()
        y = module(leaf)
        y.square().sum().backward()
        found.append([t.detach().cpu() for t in (y, leaf.grad, *(p.grad for p in module.parameters()))])
    return found


def test_canon_equals_the_cpu_s():
    for a, b in zip(*on_both(Canon(96), torch.randn(3, 70, 96)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("canon", ["", "ABCD"])
@pytest.mark.parametrize("position", ["rope", "nope", "alibi"])
def test_models_equal_the_cpu_s(canon, position):
    net = build_model([f"canon.positions={canon or chr(39) * 2}", f"position={position}", "model.vocab_size=50"])
    ids = torch.randint(50, (2, 65))
    with torch.no_grad():
        torch.testing.assert_close(net(ids), net.cuda()(ids.cuda()).cpu(), atol=1e-3, rtol=1e-3)


def test_compiled_equals_eager():
    net = build_model(["canon.positions=ABCD", "model.vocab_size=50"]).cuda()
    ids = torch.randint(50, (2, 64), device="cuda")
    with torch.no_grad():
        eager = net(ids)
        net.compile_blocks()
        torch.testing.assert_close(net(ids), eager, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("compile_blocks", [False, True])
def test_a_run_in_bf16(tmp_path, compile_blocks):
    gpu = ["trainer.accelerator=cuda", "trainer.precision=bf16-mixed"]
    metrics = tiny_run(tmp_path, "canon.positions=ABCD", f"compile={str(compile_blocks).lower()}", *gpu)
    assert metrics["test/loss"] < 5
    assert results(tmp_path)["backends"]["causal_conv"]
