"""The adapters of the recurrent operations, run on the CPU by Triton's interpreter, against the recurrence step by step."""

import pytest
import torch

from src.components.kernels import BackendUnavailableError, mamba, upstream, used_backends
from src.components.kernels.gla import gla
from tests.upstream.calls import OPERATIONS, arguments, assert_alike, documents, outcome, state

TOLERANCE = 2e-4
BACKENDS = [
    ("gla", "fla"),
    ("gated_delta_rule", "fla"),
    ("gated_delta_rule", "fla_kda"),
    ("ssd", "mamba_ssm"),
    ("ssd", "fla"),
]
FAST = [pair for pair in BACKENDS if pair[1] != "fla_kda"]  # the interpreter takes ten seconds for a call of KDA
every = pytest.mark.parametrize(("operation", "backend"), BACKENDS)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    monkeypatch.setattr(mamba, "CHUNK", 16)  # several chunks in a short sequence


def compare(operation, backend, call, **options):
    found = outcome(operation, call, backend=backend, **options)
    assert backend in used_backends()[operation]
    assert_alike(found, outcome(operation, call, backend="recurrent", **options), TOLERANCE)


@every
def test_several_chunks_from_an_initial_state(operation, backend):
    compare(operation, backend, arguments(operation, 1, 70, 1, 16, 8), start=state(operation, 1, 1, 16, 8))


@every
def test_documents_padding_and_a_state(operation, backend):
    rows, time = (2, 37) if (operation, backend) in FAST else (2, 12)
    call, start = arguments(operation, rows, time, 1, 8, 8), state(operation, rows, 1, 8, 8)
    compare(operation, backend, call, segments=documents(rows, time), start=start)


@pytest.mark.parametrize(("operation", "backend"), FAST)
def test_heads_and_padding_in_training(operation, backend):
    segments = torch.tensor([[-1] * 3 + [0] * 10, [0] * 13])  # no document begins inside a row
    compare(operation, backend, arguments(operation, 2, 13, 2, 8, 8), segments=segments)


@pytest.mark.parametrize(("operation", "options"), [("gla", {"scale": 0.3}), ("gated_delta_rule", {"scale": 0.3})])
def test_own_scale(operation, options):
    compare(operation, "fla", arguments(operation, 1, 20, 1, 8, 8) | options)


@pytest.mark.parametrize("backend", ["fla", "fla_kda"])
def test_keys_as_given(backend):
    call = arguments("gated_delta_rule", 1, 20, 1, 8, 8) | {"normalize": False}
    call |= {"k": torch.nn.functional.normalize(arguments("gated_delta_rule", 1, 20, 1, 8, 8)["k"], dim=-1)}
    compare("gated_delta_rule", backend, call)


@pytest.mark.parametrize("backend", ["mamba_ssm", "fla"])
def test_groups_and_no_skip(backend):
    call = arguments("ssd", 1, 20, 4, 8, 8) | {"D": None}
    call |= {name: torch.randn(1, 20, 2, 8) for name in "BC"}
    compare("ssd", backend, call, start=state("ssd", 1, 4, 8, 8))


@every
def test_step_kernels(operation, backend):
    """Token by token, and in pieces of a few, from a state, with padding between."""
    call, start = arguments(operation, 2, 9, 1, 8, 8), state(operation, 2, 1, 8, 8)
    segments = torch.tensor([[0] * 9, [-1] * 2 + [7] * 3 + [-1] + [8] * 3])
    before = [part.clone() for part in start]
    run = OPERATIONS[operation]
    fixed = {name: part for name, part in call.items() if name in ("A", "D")}
    moving = {name: part for name, part in call.items() if name not in fixed}
    with torch.no_grad():
        expected, end = run(**call, segments=segments, state=start, backend="recurrent")
        now, outputs, at = start, [], 0
        for length in (1, 1, 1, 1, 2, 3):
            piece = {name: part[:, at : at + length] for name, part in moving.items()}
            options = {"segments": segments[:, at : at + length], "state": now, "backend": backend}
            y, now = run(**piece, **fixed, **options)
            outputs.append(y)
            at += length
    real = (segments >= 0)[..., None, None]
    torch.testing.assert_close(torch.cat(outputs, dim=1) * real, expected * real, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(now.memory, end.memory, atol=TOLERANCE, rtol=TOLERANCE)
    assert all(torch.equal(a, b) for a, b in zip(before, start, strict=True)), "the given state was written to"


@pytest.mark.parametrize(("operation", "backend"), FAST)
def test_the_given_state_is_left_alone(operation, backend):
    call, start = arguments(operation, 1, 18, 1, 8, 8), state(operation, 1, 1, 8, 8)
    before = start.memory.clone()
    OPERATIONS[operation](**call, state=start, backend=backend)
    assert torch.equal(start.memory, before)


def test_mamba_s_step_leaves_its_state_alone():
    """Its kernel writes into the state that it is given. (The fronts hand on a copy; a backend must not rely on that.)"""
    call, memory = arguments("ssd", 1, 1, 1, 8, 8), torch.randn(1, 1, 8, 8)
    before = memory.clone()
    _, after = mamba.ssd(**call, runs=None, memory=memory)
    assert torch.equal(memory, before)
    assert after is not None
    assert not torch.equal(after, before)


@every
def test_no_tokens(operation, backend):
    call, start = arguments(operation, 2, 0, 2, 8, 8), state(operation, 2, 2, 8, 8)
    y, end = OPERATIONS[operation](**call, state=start, backend=backend)
    assert y.shape == (2, 0, 2, 8)
    kept = start.memory * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)  # the second row's state is of another document
    assert torch.equal(end.memory, kept)


@pytest.mark.parametrize(("operation", "backend"), [("gla", "fla"), ("gated_delta_rule", "fla"), ("ssd", "fla")])
def test_half_precision_with_odd_widths(operation, backend):
    """16-bit kernels want even widths; gates and the state stay float32. (The interpreter knows float16, not bfloat16.)"""
    half = {"q", "k", "v", "x", "B", "C"}
    call = {name: part.half() if name in half else part for name, part in arguments(operation, 1, 20, 1, 7, 5).items()}
    start = state(operation, 1, 1, 7, 5)
    found = outcome(operation, call, start=start, backend=backend)
    assert found["output"].dtype == torch.float16
    assert found["final"].dtype == torch.float32
    assert_alike(found, outcome(operation, call, start=start, backend="recurrent"), 1e-2)


def test_mixed_precisions_and_strides():
    """Queries and keys of a wider dtype than the values, none of them contiguous."""
    call = arguments("gla", 2, 20, 2, 8, 8)
    call["v"] = call["v"].half()
    expected = outcome("gla", call, backend="recurrent")
    strided = {name: part.transpose(1, 2).contiguous().transpose(1, 2) for name, part in call.items()}
    assert_alike(outcome("gla", strided, backend="fla"), expected, 5e-3)


@every
def test_bfloat16_is_refused_by_the_interpreter(operation, backend):
    call = arguments(operation, 1, 4, 1, 8, 8)
    call = {name: part.bfloat16() if part.ndim == 4 else part for name, part in call.items()}
    with pytest.raises(BackendUnavailableError, match="interpreter computes bfloat16 wrongly"):
        OPERATIONS[operation](**call, backend=backend)


@every
def test_float64_is_refused(operation, backend):
    call = {name: part.double() for name, part in arguments(operation, 1, 4, 1, 8, 8).items()}
    with pytest.raises(BackendUnavailableError, match="float64; cast it"):
        OPERATIONS[operation](**call, backend=backend)


def test_wide_keys_are_refused():
    call = arguments("gated_delta_rule", 1, 2, 1, 258, 8)
    with pytest.raises(BackendUnavailableError, match="at most 256 wide, here 258"):
        OPERATIONS["gated_delta_rule"](**call, backend="fla")


@pytest.mark.parametrize(("operation", "backend"), [("gla", "fla"), ("ssd", "mamba_ssm")])
def test_torch_compile_steps_around_the_kernel(operation, backend):
    call = arguments(operation, 1, 18, 1, 8, 8)

    def twice(**tensors):
        return OPERATIONS[operation](**{n: t * 1.0 for n, t in tensors.items()}, backend=backend)[0] * 2

    def results(function):
        leaves = {name: part.clone().requires_grad_() for name, part in call.items()}
        y = function(**leaves)
        return [y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))]

    for eager, compiled in zip(results(twice), results(torch.compile(twice, backend="aot_eager")), strict=True):
        torch.testing.assert_close(compiled, eager)


def test_torch_func_is_refused():
    call = arguments("gla", 1, 18, 1, 8, 8)
    with pytest.raises(BackendUnavailableError, match=r"torch\.func"):
        torch.func.grad(lambda q: gla(q, call["k"], call["v"], call["log_decay"], backend="fla")[0].sum())(call["q"])


def test_mamba_is_loaded_without_its_own_init():
    upstream.load("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    import sys

    assert not hasattr(sys.modules["mamba_ssm"], "__version__")
    assert "selective_scan_cuda" not in sys.modules
