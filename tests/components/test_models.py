"""Every model of ``configs/model``, with and without Canon, against the properties that every model must have."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from src.build import CONFIG_DIR, build_model

MODELS = sorted(p.stem for p in (Path(CONFIG_DIR) / "model").glob("*.yaml") if p.stem != "base")
POSITIONS = sorted(p.stem for p in (Path(CONFIG_DIR) / "position").glob("*.yaml"))
CANON = ["", "ACD", "ABCD"]


def tiny(model, canon, *more):
    overrides = [f"model={model}", f"canon.positions={canon or chr(39) * 2}", "model.vocab_size=50", *more]
    return build_model(overrides).eval()


@pytest.fixture(
    params=[(model, canon) for model in MODELS for canon in CANON], ids=lambda p: f"{p[0]}-{p[1] or 'none'}"
)
def net(request):
    return tiny(*request.param)


def test_causality(net):
    ids = torch.randint(50, (2, 21))
    changed = ids.clone()
    changed[:, 12] = (ids[:, 12] + 1) % 50
    with torch.no_grad():
        difference = (net(ids) - net(changed)).abs().amax(dim=(0, 2))
    assert difference[:12].max() < 1e-6
    assert difference[12] > 1e-4


@pytest.mark.parametrize("time", [1, 2, 3, 5, 17, 64, 65, 130])
def test_odd_lengths(net, time):
    with torch.no_grad():
        assert net(torch.randint(50, (1, time))).shape == (1, time, 50)


@pytest.mark.parametrize("prefill", [1, 3, 8])
def test_one_token_decoding_equals_the_full_forward(net, prefill):
    ids = torch.randint(50, (2, 15))
    state, pieces = net.initial_state(), []
    with torch.no_grad():
        for piece in [ids[:, :prefill], *ids[:, prefill:].split(1, dim=1)]:
            logits, state = net(piece, state=state)
            pieces.append(logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), net(ids), atol=1e-5, rtol=1e-5)


def test_packed_equals_separate(net):
    """Documents packed into a row give the logits they give alone, where position is relative."""
    ids = torch.randint(50, (2, 20))
    bounds = [(0, 7), (7, 8), (8, 20)]
    segments = torch.cat([torch.full((2, b - a), i) for i, (a, b) in enumerate(bounds)], dim=1)
    with torch.no_grad():
        separate = torch.cat([net(ids[:, a:b]) for a, b in bounds], dim=1)
        torch.testing.assert_close(net(ids, segments=segments), separate, atol=1e-5, rtol=1e-5)


def test_packed_decoding_equals_packed_forward(net):
    ids = torch.randint(50, (1, 12))
    segments = torch.tensor([[0] * 5 + [1] * 7])
    state, pieces = net.initial_state(), []
    with torch.no_grad():
        for t in range(12):
            logits, state = net(ids[:, t : t + 1], segments=segments[:, t : t + 1], state=state)
            pieces.append(logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), net(ids, segments=segments), atol=1e-5, rtol=1e-5)


def test_the_given_state_is_left_as_it_was(net):
    """A state can be used twice: to try two continuations."""
    ids = torch.randint(50, (1, 6))
    with torch.no_grad():
        _, state = net(ids, state=net.initial_state())
        first, _ = net(ids[:, :2], state=state)
        net(ids[:, 3:5], state=state)
        again, _ = net(ids[:, :2], state=state)
    assert torch.equal(first, again)


def test_bf16_autocast_is_close(net):
    ids = torch.randint(50, (2, 33))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(ids)
    with torch.no_grad():
        full = net(ids)
    assert (low.float() - full).norm() / full.norm() < 3e-2


def test_gradients_reach_every_parameter(net):
    net(torch.randint(50, (2, 16))).sum().backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_formulas_agree_with_the_module(net):
    assert net.count_parameters() == sum(p.numel() for p in net.parameters())
    _, state = net(torch.randint(50, (1, 10)), state=net.initial_state())
    assert net.state_size(10) == sum(_numbers(block) for block in state)
    counter = FlopCounterMode(display=False)
    # PyTorch counts the matrix products of attention, but not its fused CPU kernel.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net(torch.randint(50, (1, 32)))
    convolutions = sum(m.flops_per_token() for m in net.modules() if type(m).__name__ == "Canon")
    assert net.flops_per_token(32) - convolutions == counter.get_total_flops() // 32


def _numbers(node):
    if isinstance(node, dict):
        return sum(_numbers(value) for name, value in node.items() if name != "segments")
    if isinstance(node, tuple):
        return sum(_numbers(value) for value in node)
    return node.numel() if node.is_floating_point() else 0


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("canon", ["", "ABCD"])
def test_every_position_encoding_decodes_as_it_trains(position, canon):
    net = tiny("llama", canon, f"position={position}")
    ids = torch.randint(50, (1, 11))
    state, pieces = net.initial_state(), []
    with torch.no_grad():
        for piece in ids.split([6, 1, 1, 3], dim=1):
            logits, state = net(piece, state=state)
            pieces.append(logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), net(ids), atol=1e-5, rtol=1e-5)
