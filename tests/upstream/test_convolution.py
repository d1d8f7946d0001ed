"""fla's causal convolution, run on the CPU by Triton's interpreter, against the equation's twin."""

import pytest
import torch

from src.components.kernels import BackendUnavailableError, causal_conv, causal_conv_state, used_backends
from tests.upstream.calls import arguments, assert_alike, documents, outcome, state

TOLERANCE = 2e-4
kinds = pytest.mark.parametrize(
    "kind",
    [
        {"residual": True},  # Canon
        {"residual": False, "activation": "silu", "bias": True},  # Mamba2's
        {"residual": True, "activation": "silu", "bias": True},
        {"residual": True, "bias": True},
    ],
    ids=["canon", "silu-bias", "residual-silu-bias", "residual-bias"],
)


def with_bias(kind, channels):
    bias = torch.randn(channels, generator=torch.Generator().manual_seed(3))
    return {**kind, "bias": bias if "bias" in kind else None}


def compare(call, **options):
    found = outcome("causal_conv", call, backend="fla", **options)
    assert "fla" in used_backends()["causal_conv"]
    assert_alike(found, outcome("causal_conv", call, backend="torch", **options), TOLERANCE)


@kinds
@pytest.mark.parametrize("time", [1, 3, 70])
def test_one_document(kind, time):
    compare(arguments("causal_conv", 2, time, 1, 1, 20) | with_bias(kind, 20))


@kinds
def test_documents_and_padding(kind):
    compare(arguments("causal_conv", 3, 37, 1, 1, 20) | with_bias(kind, 20), segments=documents(3, 37))


@kinds
@pytest.mark.parametrize("packed", [False, True])
def test_state(kind, packed):
    segments = documents(3, 21) if packed else None
    call, start = arguments("causal_conv", 3, 21, 1, 1, 20) | with_bias(kind, 20), state("causal_conv", 3, 1, 1, 20)
    compare(call, segments=segments, start=start)


@pytest.mark.parametrize("taps", [1, 2, 5])
def test_other_widths(taps):
    call = arguments("causal_conv", 2, 9, 1, 1, 20) | {"weight": torch.randn(20, taps)}
    compare(call, segments=documents(2, 9))


def test_what_padding_gives():
    """Not only real tokens agree with the twin, but also what stands at padding."""
    call = arguments("causal_conv", 3, 37, 1, 1, 20) | with_bias({"activation": "silu", "bias": True}, 20)
    found, expected = (causal_conv(**call, segments=documents(3, 37), backend=name)[0] for name in ("fla", "torch"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@kinds
def test_update_kernel(kind):
    """Token by token without gradients, from the empty state, with documents and padding."""
    call = arguments("causal_conv", 2, 10, 1, 1, 20) | with_bias(kind, 20)
    x = call.pop("x")
    segments = torch.tensor([[0] * 4 + [1] * 6, [-1] * 3 + [0] * 7])
    with torch.no_grad():
        for ids in (None, segments):
            expected, end = causal_conv(x, **call, segments=ids, state=causal_conv_state(2, 20, 4), backend="torch")
            now, outputs = causal_conv_state(2, 20, 4), []
            for t in range(10):
                before, piece = now.inputs.clone(), None if ids is None else ids[:, t : t + 1]
                y, after = causal_conv(x[:, t : t + 1], **call, segments=piece, state=now, backend="fla")
                assert after is not None
                assert torch.equal(now.inputs, before), "the given state was written to"
                outputs.append(y)
                now = after
            torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=TOLERANCE, rtol=TOLERANCE)
            assert end is not None
            assert torch.equal(now.inputs, end.inputs)


def test_strides_and_half_precision():
    """A slice of a wider projection in 16 bits, float32 weights."""
    call = arguments("causal_conv", 2, 20, 1, 1, 24)
    wide = call["x"].half()
    call |= {"x": wide[..., 4:20], "weight": call["weight"][:16]}
    y, _ = causal_conv(**call, backend="fla")
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, causal_conv(**call, backend="torch")[0], atol=5e-3, rtol=5e-3)


def test_no_tokens():
    call, start = arguments("causal_conv", 2, 0, 1, 1, 20), state("causal_conv", 2, 1, 1, 20)
    y, end = causal_conv(**call, state=start, backend="fla")
    assert y.shape == (2, 0, 20)
    assert end is not None
    assert torch.equal(end.inputs, start.inputs)


def test_bfloat16_is_refused_by_the_interpreter():
    call = {name: part.bfloat16() for name, part in arguments("causal_conv", 1, 4, 1, 1, 8).items()}
    with pytest.raises(BackendUnavailableError, match="interpreter computes bfloat16 wrongly"):
        causal_conv(**call, backend="fla")


def test_torch_compile_steps_around_the_kernel():
    call = arguments("causal_conv", 2, 20, 1, 1, 16)

    def canon(x, weight):
        return causal_conv(x * 2, weight, activation="silu", segments=documents(2, 20), backend="fla")[0] + 1

    def results(function):
        leaves = [part.clone().requires_grad_() for part in call.values()]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    for eager, compiled in zip(results(canon), results(torch.compile(canon, backend="aot_eager")), strict=True):
        torch.testing.assert_close(compiled, eager)
