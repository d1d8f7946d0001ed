"""Every model of ``configs/model``, with and without Canon, against the properties that every model must have."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from src.build import CONFIG_DIR, build_model
from src.components.canon import Canon
from src.components.generation import generate
from src.components.kernels.registry import Operation
from src.components.mixture_of_experts import MixtureOfExperts
from src.config import ConfigError
from tests.measured import note

MODELS = sorted(p.stem for p in (Path(CONFIG_DIR) / "model").glob("*.yaml") if p.stem != "base")
POSITIONS = sorted(p.stem for p in (Path(CONFIG_DIR) / "position").glob("*.yaml"))
VOCABULARY = 50
# Logits are of order 1; bfloat16 has three digits, and a model of two blocks loses one of them.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 6e-2}


def tiny(model, canon, *more):
    overrides = [f"model={model}", f"canon.positions={canon or chr(39) * 2}", f"model.vocab_size={VOCABULARY}", *more]
    return build_model(overrides).eval()


def canon_sets(model):
    """No Canon, all of the points that this model has, and those outside its mixer."""
    if model == "moe":  # has no point D
        return ["", "ABC", "AC"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention has no b
        net = build_model([f"model={model}", "canon.positions=Ab"], device="meta")
    has_own_convolution = any(module.point == "b" for module in net.modules() if isinstance(module, Canon))
    return ["", "AbCD" if has_own_convolution else "ABCD", "ACD"]


@pytest.fixture(
    scope="module",
    params=[(model, canon) for model in MODELS for canon in canon_sets(model)],
    ids=lambda p: f"{p[0]}-{p[1] or 'none'}",
)
def net(request):
    return tiny(*request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def run(request, net):
    """Calls the model in one of the precisions that people train in, without gradients."""

    def call(*args, **kwargs):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=request.param == torch.bfloat16):
            return net(*args, **kwargs)

    call.atol = CLOSE[request.param]
    # Rounding to bfloat16 turns the choice of an expert here and there; nothing else is a matter of luck.
    routed = any(isinstance(module, MixtureOfExperts) for module in net.modules())
    call.lucky = 0.1 if routed and request.param == torch.bfloat16 else 0.0
    return call


def some_ids(*shape, seed=0):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found, expected, run):
    """Logits ``[..., V]`` agree within the precision of ``run``, all of them but a share that it leaves to luck."""
    if run.lucky:
        apart = (found - expected).abs().amax(dim=-1) > run.atol
        assert apart.float().mean() <= run.lucky
    else:
        torch.testing.assert_close(found.float(), expected.float(), atol=run.atol, rtol=run.atol)


def piecewise(net, run, pieces):
    """Logits of the pieces, each continuing the one before."""
    state, found = net.initial_state(), []
    for piece in pieces:
        logits, state = run(piece[0], segments=piece[1], state=state)
        found.append(logits)
    return torch.cat(found, dim=1)


def cut(ids, lengths, segments=None):
    ends = [None] * len(lengths) if segments is None else segments.split(lengths, dim=1)
    return list(zip(ids.split(lengths, dim=1), ends, strict=True))


def test_causality(run):
    ids = some_ids(2, 71)
    changed = ids.clone()
    changed[:, 42] = (ids[:, 42] + 1) % VOCABULARY
    difference = (run(ids) - run(changed)).float().abs().amax(dim=(0, 2))
    assert difference[:42].max() < run.atol / 10
    assert difference[42] > 1e-4


def test_odd_lengths(run):
    """Every length gives what the same tokens give at the start of a longer sequence."""
    ids = some_ids(1, 130)
    full = run(ids)
    for time in (1, 2, 3, 5, 17, 31, 33, 63, 64, 65, 97, 127, 129):
        logits = run(ids[:, :time])
        assert logits.shape == (1, time, VOCABULARY)
        assert_close(logits, full[:, :time], run)


@pytest.mark.parametrize("prefill", [0, 1, 3, 30, 66])
def test_one_token_decoding_equals_the_full_forward(net, run, prefill):
    ids = some_ids(2, prefill + 7)
    lengths = ([prefill] if prefill else []) + [1] * 7
    assert_close(piecewise(net, run, cut(ids, lengths)), run(ids), run)


def test_prefill_in_pieces_equals_one_prefill(net, run):
    ids = some_ids(2, 40)
    assert_close(piecewise(net, run, cut(ids, [1, 2, 17, 4, 16])), run(ids), run)


def test_packed_equals_separate(run):
    """Documents packed into a row give the logits they give alone, where position is relative."""
    ids = some_ids(2, 80)
    bounds = [(0, 7), (7, 8), (8, 45), (45, 80)]
    segments = torch.cat([torch.full((2, b - a), i) for i, (a, b) in enumerate(bounds)], dim=1)
    separate = torch.cat([run(ids[:, a:b]) for a, b in bounds], dim=1)
    assert_close(run(ids, segments=segments), separate, run)


def test_packed_decoding_equals_packed_forward(net, run):
    ids = some_ids(1, 12)
    segments = torch.tensor([[0] * 5 + [1] * 7])
    assert_close(piecewise(net, run, cut(ids, [1] * 12, segments)), run(ids, segments=segments), run)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(net, run, side):
    """Rows of unequal length, padded on either side in every piece, give what each row gives alone."""
    rows, lengths = [some_ids(1, 24, seed=row) for row in range(3)], [[5, 1, 9, 2], [1, 3, 2, 9], [7, 2, 1, 1]]
    state, found = net.initial_state(), [[] for _ in rows]
    for piece in range(4):
        longest = max(row[piece] for row in lengths)
        ids, segments = torch.zeros(3, longest, dtype=torch.long), torch.full((3, longest), -1)
        for row, counts in enumerate(lengths):
            begin, count = sum(counts[:piece]), counts[piece]
            place = slice(longest - count, longest) if side == "left" else slice(0, count)
            ids[row, place], segments[row, place] = rows[row][0, begin : begin + count], 0
        logits, state = run(ids, segments=segments, state=state)
        for row in range(3):
            found[row].append(logits[row][segments[row] == 0])
    for row in range(3):
        assert_close(torch.cat(found[row]), run(rows[row][:, : sum(lengths[row])])[0], run)


def test_the_given_state_is_left_as_it_was(net, run):
    """A state can be used twice: to try two continuations."""
    ids = some_ids(1, 6)
    _, state = run(ids, state=net.initial_state())
    first, _ = run(ids[:, :2], state=state)
    run(ids[:, 3:5], state=state)
    again, _ = run(ids[:, :2], state=state)
    assert torch.equal(first, again)


def test_a_stored_state_continues(net, run, tmp_path):
    ids = some_ids(2, 12)
    _, state = run(ids[:, :9], state=net.initial_state())
    torch.save(state.state_dict(), tmp_path / "state.pt")
    restored = type(state).from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(run(ids[:, 9:], state=restored)[0], run(ids[:, 9:], state=state)[0])


def test_padded_batch_generation_equals_one_by_one(net):
    prompts = [some_ids(length, seed=length).numpy() for length in (3, 11, 1, 6)]
    together = generate(net, prompts, max_new_tokens=8, temperature=0.7, streams=[[1], [2], [3], [4]])
    for row, prompt in enumerate(prompts):
        alone = generate(net, [prompt], max_new_tokens=8, temperature=0.7, streams=[[row + 1]])
        note(sum(a != b for a, b in zip(together[row].tolist(), alone[0].tolist(), strict=True)))
        assert together[row].tolist() == alone[0].tolist()


def test_bf16_is_close_to_float32(net):
    ids = some_ids(2, 70)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(ids)
    with torch.no_grad():
        full = net(ids)
    note((low.float() - full).norm() / full.norm())
    assert (low.float() - full).norm() / full.norm() < 3e-2


def test_chunked_equals_recurrent(net, monkeypatch):
    """Outputs and gradients with the fast kernels of this machine, against the equations step by step."""
    found = []
    ids, segments = some_ids(2, 75), torch.tensor([[0] * 20 + [1] * 55, [0] * 70 + [-1] * 5])
    for backends in (["torch"], STEP_BY_STEP):
        prefer(monkeypatch, *backends)
        twin = copy.deepcopy(net).double()
        logits = twin(ids, segments=segments)[segments >= 0]
        logits.square().mean().backward()
        found.append([logits.detach(), *(p.grad for p in twin.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


# The backends that do what the equations say, and nothing more.
STEP_BY_STEP = ["recurrent", "reference"]


def prefer(monkeypatch, *backends):
    """Every operation runs on the first of these backends that it has, else on the one that it would choose."""
    pick = Operation.pick

    def choose(operation, name, *args, **kwargs):
        return next((b for b in backends if b in operation.backends), None) or pick(operation, name, *args, **kwargs)

    monkeypatch.setattr(Operation, "pick", choose)


def test_gradients_reach_every_parameter(net):
    net.zero_grad()
    net(some_ids(2, 16)).square().sum().backward()
    trainable = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    missing = [name for name, p in trainable if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


def test_gradients_are_those_of_the_function(net):
    """Numerical differentiation in float64, of one block in its input."""
    block = copy.deepcopy(net.blocks[0]).double()
    x = torch.randn(1, 9, net.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    segments = torch.tensor([[0] * 4 + [1] * 5])
    assert torch.autograd.gradcheck(lambda x: block(x, segments)[0], x, fast_mode=True, atol=1e-6)
    # Once more along one direction, for the size of the difference.
    y = block(x, segments)[0]
    weights, way = torch.randn_like(y), torch.randn_like(x)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    with torch.no_grad():
        up, down = (block(x + step * way, segments)[0] for step in (1e-5, -1e-5))
        slope = ((up - down) * weights).sum() / 2e-5
    torch.testing.assert_close((gradient * way).sum(), slope, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_a_width_that_does_not_fit_is_refused_before_anything_runs(model):
    """Heads may not divide the width; a model that can be built can also be run."""
    refused = []
    for dim in (61, 62, 66):
        try:
            net = tiny(model, "", f"model.dim={dim}")
        except ConfigError as error:
            refused.append(str(error))
            continue
        with torch.no_grad():
            assert net(some_ids(1, 5)).isfinite().all()
    assert all("dim" in message for message in refused)


def test_formulas_agree_with_the_module(net):
    assert net.count_parameters() == sum(p.numel() for p in net.parameters())
    _, state = net(some_ids(1, 10), state=net.initial_state())
    assert net.state_size(10) == sum(_numbers(block) for block in state)


# Operations of a recurrence that are no matrix products, per number in the memory: decay (1) and write (2).
ELEMENTWISE = {"LinearAttention": 2}


def test_operations_are_those_that_are_executed(net, monkeypatch):
    prefer(monkeypatch, *STEP_BY_STEP)
    with torch.no_grad():
        _, state = net(some_ids(1, 1), state=net.initial_state())
        with FlopCounterMode(display=False) as counter:
            net(some_ids(1, 32))
    uncounted = sum(m.flops_per_token() for m in net.modules() if isinstance(m, Canon))
    for block, remembered in zip(net.blocks, state, strict=True):
        if "memory" in remembered["mixer"]:
            each = ELEMENTWISE.get(type(block.mixer).__name__, 3)
            uncounted += each * remembered["mixer"]["memory"].memory.numel()
    assert net.flops_per_token(32) - uncounted == counter.get_total_flops() // 32


def _numbers(node):
    """Floating-point numbers in a state; document numbers are not counted."""
    if isinstance(node, dict):
        return sum(_numbers(value) for name, value in node.items() if name != "segments")
    if isinstance(node, tuple):
        return sum(_numbers(value) for value in node)
    return node.numel() if hasattr(node, "numel") and node.is_floating_point() else 0


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("canon", ["", "ABCD"])
def test_every_position_encoding_decodes_as_it_trains(position, canon):
    net = tiny("llama", canon, f"position={position}")
    ids = some_ids(1, 11)
    with torch.no_grad():
        torch.testing.assert_close(piecewise(net, net, cut(ids, [6, 1, 1, 3])), net(ids), atol=1e-5, rtol=1e-5)
