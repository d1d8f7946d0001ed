"""The causal convolution: by hand, against Conv1d, backend against backend; documents, state, threads, forks."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.components.kernels import (
    ConvState,
    causal_conv,
    causal_conv_state,
    registry,
    used_backends,
)

BACKENDS = ["cpu", "torch"]
ROOT = Path(__file__).resolve().parents[3]

both = pytest.mark.parametrize("backend", BACKENDS)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(grad)


def conv(x: Tensor, weight: Tensor, **options) -> Tensor:
    y, state = causal_conv(x, weight, **options)
    assert state is None
    return y


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, rand(*y.shape, seed=9, dtype=y.dtype))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------- the equation


@both
def test_last_tap_multiplies_the_current_token(backend):
    x = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]).view(1, 5, 1)
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]])  # oldest ... current
    y = conv(x, weight, residual=False, backend=backend)
    assert y.flatten().tolist() == [1, 12, 123, 1234, 12340]
    y = conv(x, weight, residual=True, backend=backend)
    assert y.flatten().tolist() == [2, 22, 223, 2234, 22340]


@both
@pytest.mark.parametrize("taps", range(1, 7))
@pytest.mark.parametrize("time", [1, 2, 3, 4, 7, 33])
@pytest.mark.parametrize("channels", [1, 6, 600])
def test_equals_conv1d(backend, taps, time, channels):
    x, weight, bias = rand(3, time, channels, grad=True), rand(channels, taps, grad=True), rand(channels, grad=True)
    y = conv(x, weight, bias=bias, residual=False, backend=backend)
    expected = F.conv1d(F.pad(x.mT, (taps - 1, 0)), weight.unsqueeze(1), bias, groups=channels).mT
    torch.testing.assert_close(y, expected)
    for got, wanted in zip(gradients(y, x, weight, bias), gradients(expected, x, weight, bias), strict=True):
        torch.testing.assert_close(got, wanted)


@both
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_activation_comes_before_the_residual(backend, residual, activation):
    x, weight, bias = rand(2, 9, 5), rand(5, 4), rand(5)
    plain = conv(x, weight, bias=bias, residual=False, backend=backend)
    expected = (F.silu(plain) if activation else plain) + (x if residual else 0)
    got = conv(x, weight, bias=bias, residual=residual, activation=activation, backend=backend)
    torch.testing.assert_close(got, expected)


@both
def test_zero_weights_leave_the_residual_untouched(backend):
    x = rand(2, 70, 24, dtype=torch.float32)
    assert torch.equal(conv(x, torch.zeros(24, 4), backend=backend), x)


@both
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("taps", [1, 3, 4, 5])
def test_gradcheck(backend, residual, taps):
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2], [-1, -1, 3, 3, 3, 3, 3, 3, 3, -1]])
    x, weight, bias = rand(2, 10, 3, grad=True), rand(3, taps, grad=True), rand(3, grad=True)

    def run(x, weight, bias, segments):
        return conv(x, weight, bias=bias, residual=residual, segments=segments, activation="silu", backend=backend)

    assert torch.autograd.gradcheck(lambda x, weight, bias: run(x, weight, bias, None), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x, weight, bias: run(x, weight, bias, ids), (x, weight, bias))


@both
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0)])
def test_gradients_of_some_inputs_only(backend, wanted):
    every = [rand(2, 40, 7, grad=True), rand(7, 4, grad=True), rand(7, grad=True)]
    reference = gradients(conv(every[0], every[1], bias=every[2], backend="torch"), *every)
    some = [t.detach().requires_grad_(bool(flag)) for t, flag in zip(every, wanted, strict=True)]
    conv(some[0], some[1], bias=some[2], backend=backend).backward(rand(2, 40, 7, seed=9))
    for tensor, gradient, flag in zip(some, reference, wanted, strict=True):
        if flag:
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


@st.composite
def cases(draw):
    """Shapes on both sides of every threshold, and ids that repeat, alternate and pad."""
    batch, time, taps = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 6))
    channels = draw(st.sampled_from([1, 2, 5, 64, 200, 513, 1100]))
    ids = draw(st.none() | st.lists(st.integers(-1, 2), min_size=batch * time, max_size=batch * time))
    runs = draw(st.integers(1, 9))  # how long an id lasts
    if ids is not None:
        ids = torch.tensor(ids).view(batch, time).repeat_interleave(runs, 1)[:, :time]
    return batch, time, channels, taps, ids, draw(st.booleans())


@given(cases())
@settings(max_examples=150, deadline=None)
def test_cpu_equals_its_twin(case):
    batch, time, channels, taps, ids, residual = case
    results = {}
    for backend in BACKENDS:
        inputs = rand(batch, time, channels, grad=True), rand(channels, taps, grad=True), rand(channels, grad=True)
        y = conv(inputs[0], inputs[1], bias=inputs[2], residual=residual, segments=ids, backend=backend)
        results[backend] = y, *gradients(y, *inputs)
    for got, wanted in zip(results["cpu"], results["torch"], strict=True):
        torch.testing.assert_close(got, wanted)


def test_float32_sums_stay_accurate_over_many_tokens():
    x, weight = rand(4, 5000, 16, dtype=torch.float32, grad=True), rand(16, 4, dtype=torch.float32, grad=True)
    (got,) = gradients(conv(x, weight, backend="cpu"), weight)
    (exact,) = torch.autograd.grad(
        conv(x.double(), weight64 := weight.detach().double().requires_grad_(), backend="torch"),
        weight64,
        rand(4, 5000, 16, seed=9, dtype=torch.float32).double(),
    )
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------------------------- documents and padding


@both
@pytest.mark.parametrize("lengths", [(5, 1, 2, 12), (1, 1, 1, 17), (20,), (3, 17)])
def test_segments_equal_separate_runs(backend, lengths):
    x, weight = rand(2, 20, 33, grad=True), rand(33, 4, grad=True)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    packed = conv(x, weight, segments=ids, backend=backend)
    separate = torch.cat([conv(part, weight, backend=backend) for part in x.split(list(lengths), 1)], 1)
    torch.testing.assert_close(packed, separate)
    for got, wanted in zip(gradients(packed, x, weight), gradients(separate, x, weight), strict=True):
        torch.testing.assert_close(got, wanted)


@both
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_one_document_equals_no_segments(backend, dtype):
    x, weight = rand(2, 90, 8), rand(8, 4)
    ids = torch.full((2, 90), 7, dtype=dtype)
    assert torch.equal(conv(x, weight, segments=ids, backend=backend), conv(x, weight, backend=backend))


@both
@pytest.mark.parametrize("activation", [None, "silu"])
def test_left_padding_changes_nothing_and_never_leaks(backend, activation):
    x, weight, bias = rand(1, 12, 6), rand(6, 4), rand(6)
    padded = torch.cat([torch.full((1, 5, 6), torch.nan, dtype=x.dtype), x], 1).requires_grad_()
    ids = torch.tensor([[-1] * 5 + [0] * 12])
    weight.requires_grad_()
    y = conv(padded, weight, bias=bias, activation=activation, segments=ids, backend=backend)
    torch.testing.assert_close(y[:, 5:], conv(x, weight, bias=bias, activation=activation, backend=backend))
    empty = F.silu(bias) if activation else bias
    torch.testing.assert_close(y[:, :5], empty.expand(1, 5, 6))
    dx, dweight = gradients(y, padded, weight)
    assert not dx[:, :5].any()
    assert dx.isfinite().all()
    assert dweight.isfinite().all()


@both
def test_nan_does_not_leave_its_document(backend):
    x, weight = rand(1, 12, 6), rand(6, 4)
    x[:, :5] = torch.nan
    ids = torch.tensor([[0] * 5 + [1] * 7])
    x.requires_grad_()
    y = conv(x, weight, segments=ids, backend=backend)
    assert y[:, 5:].isfinite().all()
    assert torch.autograd.grad(y.sum(), x)[0][:, 5:].isfinite().all()


@both
def test_padding_in_the_middle_counts_as_zero(backend):
    x, weight = rand(1, 6, 2), rand(2, 3)
    ids = torch.tensor([[0, 0, -2, 0, -1, -1]])
    y = conv(x, weight, segments=ids, backend=backend)
    real = ids[0] >= 0
    torch.testing.assert_close(y[:, real], conv(x * real[:, None], weight, backend=backend)[:, real])
    assert not y[:, ~real].any()


# ----------------------------------------------------------------------------------------------------------- state


@st.composite
def splits(draw):
    time = draw(st.integers(1, 24))
    cuts = sorted(draw(st.lists(st.integers(0, time), max_size=8)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, time], strict=True)]
    ids = draw(st.none() | st.lists(st.integers(-1, 2), min_size=2 * time, max_size=2 * time))
    if ids is not None:
        ids = torch.tensor(ids).view(2, time).repeat_interleave(draw(st.integers(1, 5)), 1)[:, :time]
    return time, sizes, ids


@both
@given(case=splits(), taps=st.integers(1, 6), activation=st.sampled_from([None, "silu"]))
@settings(max_examples=60, deadline=None)
def test_any_split_equals_one_call(backend, case, taps, activation):
    time, sizes, ids = case
    x, weight, bias = rand(2, time, 5, grad=True), rand(5, taps, grad=True), rand(5, grad=True)
    options = {"bias": bias, "activation": activation, "backend": backend}
    state: ConvState | None = causal_conv_state(2, 5, taps, dtype=x.dtype)
    pieces = []
    id_parts = [None] * len(sizes) if ids is None else ids.split(sizes, 1)
    for part, part_ids in zip(x.split(sizes, 1), id_parts, strict=True):
        y, state = causal_conv(part, weight, segments=part_ids, state=state, **options)
        pieces.append(y)
    whole, _ = causal_conv(x, weight, segments=ids, state=causal_conv_state(2, 5, taps, dtype=x.dtype), **options)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    for got, wanted in zip(
        gradients(torch.cat(pieces, 1), x, weight, bias), gradients(whole, x, weight, bias), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@both
@given(case=splits(), taps=st.integers(1, 6), activation=st.sampled_from([None, "silu"]), residual=st.booleans())
@settings(max_examples=60, deadline=None)
def test_with_a_state_padding_anywhere_is_as_if_it_were_not_there(backend, case, taps, activation, residual):
    time, sizes, ids = case
    ids = torch.zeros(2, time, dtype=torch.int64) if ids is None else ids
    x, weight, bias = rand(2, time, 5, grad=True), rand(5, taps, grad=True), rand(5, grad=True)
    options = {"bias": bias, "activation": activation, "residual": residual, "backend": backend}
    state: ConvState | None = causal_conv_state(2, 5, taps, dtype=x.dtype)
    pieces = []
    for part, part_ids in zip(x.split(sizes, 1), ids.split(sizes, 1), strict=True):
        y, state = causal_conv(part, weight, segments=part_ids, state=state, **options)
        pieces.append(y)
    got, alone = [], []
    for row in range(2):
        real = ids[row] >= 0
        got.append(torch.cat(pieces, 1)[row, real])
        alone.append(conv(x[row : row + 1, real], weight, segments=ids[row : row + 1, real], **options)[0])
    torch.testing.assert_close(torch.cat(got), torch.cat(alone))
    for a, b in zip(
        gradients(torch.cat(got), x, weight, bias), gradients(torch.cat(alone), x, weight, bias), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert state is not None
    kept = min(taps - 1, int((ids[0] >= 0).sum()))
    assert (state.segments[0] >= 0).sum() == kept
    assert (state.segments[0, taps - 1 - kept :] >= 0).all()


@both
def test_padding_outside_of_documents_needs_no_state(backend):
    x, weight = rand(1, 9, 3), rand(3, 4)
    ids = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, -1]])
    y = conv(x, weight, segments=ids, backend=backend)
    torch.testing.assert_close(y[:, 1:4], conv(x[:, 1:4], weight, backend=backend))
    torch.testing.assert_close(y[:, 5:7], conv(x[:, 5:7], weight, backend=backend))


@both
def test_state_is_the_last_inputs_and_is_not_changed_in_place(backend):
    x, weight = rand(1, 6, 2), rand(2, 4)
    start = causal_conv_state(1, 2, 4, dtype=x.dtype)
    _, first = causal_conv(x[:, :2], weight, state=start, backend=backend)
    _, second = causal_conv(x[:, 2:], weight, state=first, segments=torch.tensor([[1, 1, -1, 1]]), backend=backend)
    assert first is not None
    assert second is not None
    assert not start.inputs.any()
    assert start.segments.tolist() == [[-1, -1, -1]]
    assert torch.equal(first.inputs, torch.cat([torch.zeros(1, 1, 2), x[:, :2]], 1))
    assert first.segments.tolist() == [[-1, 0, 0]]
    assert torch.equal(second.inputs, x[:, [2, 3, 5]])
    assert second.segments.tolist() == [[1, 1, 1]]


def test_state_does_not_keep_a_long_prompt_alive():
    _, state = causal_conv(rand(1, 1000, 4), rand(4, 4), state=causal_conv_state(1, 4, 4, dtype=torch.float64))
    assert state is not None
    assert state.inputs.untyped_storage().nbytes() < 10 * 4 * 8
    ids = torch.full((1, 1000), -1)
    _, state = causal_conv(rand(1, 1000, 4), rand(4, 4), state=state, segments=ids)
    assert state is not None
    assert state.inputs.untyped_storage().nbytes() < 10 * 4 * 8
    assert state.segments.untyped_storage().nbytes() < 10 * 8


@both
def test_a_new_document_does_not_see_the_old_state(backend):
    x, weight = rand(2, 5, 3), rand(3, 4)
    _, state = causal_conv(rand(2, 4, 3, seed=1), weight, state=causal_conv_state(2, 3, 4), backend=backend)
    y, _ = causal_conv(x, weight, state=state, segments=torch.full((2, 5), 1), backend=backend)
    torch.testing.assert_close(y, conv(x, weight, backend=backend))


# ------------------------------------------------------------------------------------------- memory, types, shapes


@both
def test_any_memory_layout(backend):
    wide, weight = rand(3, 50, 40, grad=True), rand(4, 10, grad=True)  # the weight is used transposed
    base = {
        "channel slice": wide[..., 7:17],
        "time step of two": wide[:, ::2, :10],
        "transposed": wide[:, :10].transpose(1, 2),
        "expanded": wide[:1, :, :10].expand(3, -1, -1),
    }
    for name, x in base.items():
        y = conv(x, weight.t(), backend=backend)
        expected = conv(x.contiguous(), weight.t().contiguous(), backend="torch")
        assert y.is_contiguous(), name
        torch.testing.assert_close(y, expected, msg=name)
        for loss, wanted in ((y.sum(), expected.sum()), ((y.mT * 2).mT.square().sum(), (expected * 2).square().sum())):
            for a, b in zip(
                torch.autograd.grad(loss, (wide, weight), retain_graph=True),
                torch.autograd.grad(wanted, (wide, weight), retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(a, b, msg=name)


@both
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5, 3), (2, 5, 0)])
def test_empty_inputs(backend, shape):
    x, weight = rand(*shape, grad=True), rand(shape[2], 4, grad=True)
    state = causal_conv_state(shape[0], shape[2], 4, dtype=x.dtype)
    y, after = causal_conv(x, weight, state=state, backend=backend)
    y.sum().backward()
    assert y.shape == shape
    assert after is not None
    assert after.inputs.shape == state.inputs.shape
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, None])
def test_half_precision_sums_in_float32(dtype, parameters):
    x = rand(2, 30, 8, dtype=torch.float32).to(dtype)
    weight = rand(8, 4, dtype=torch.float32).to(parameters or dtype)
    y = conv(x, weight)
    assert y.dtype == dtype
    assert torch.equal(y, conv(x.float(), weight.float(), backend="torch").to(dtype))


def test_torch_twin_differentiates_twice_and_cpu_says_it_cannot():
    inputs = rand(1, 5, 2, grad=True), rand(2, 3, grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: conv(x, w, backend="torch"), inputs)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(conv(*inputs, backend="cpu").square().sum(), inputs, create_graph=True)[0].sum().backward()


def test_torch_func_takes_the_twin():
    x, weight = rand(3, 5, 2), rand(2, 3)
    per_example = torch.func.vmap(torch.func.grad(lambda w, x: conv(x[None], w).square().sum()), (None, 0))(weight, x)
    weight.requires_grad_()
    torch.testing.assert_close(per_example.sum(0), torch.autograd.grad(conv(x, weight).square().sum(), weight)[0])


def test_compiles_to_one_graph_that_is_kept(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    monkeypatch.setattr(registry, "_used", {})  # the table grows between the calls
    counter = CompileCounter()
    compiled = torch.compile(lambda x, w: causal_conv(x, w, segments=ids)[0], backend=counter, fullgraph=True)
    x, weight, ids = rand(2, 9, 4), rand(4, 4), torch.tensor([[0] * 4 + [1] * 5] * 2)
    for _ in range(2):
        torch.testing.assert_close(compiled(x, weight), conv(x, weight, segments=ids, backend="cpu"))
    assert counter.frame_count == 1
    assert used_backends()["causal_conv"] == ("torch", "cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 6)}, ValueError, r"x must be \[B, T, C\]"),
        ({"x": torch.zeros(2, 4, 6, dtype=torch.int64)}, TypeError, "floating point"),
        ({"weight": torch.zeros(5, 4)}, ValueError, r"\[6, at least 1\]; got \(5, 4\)"),
        ({"weight": torch.zeros(6, 0)}, ValueError, "at least 1"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[C\] = \[6\]"),
        ({"activation": "relu"}, ValueError, "'relu'"),
        ({"segments": torch.zeros(2, 4)}, TypeError, "integers"),
        ({"segments": torch.zeros(2, 5, dtype=torch.int64)}, ValueError, r"\[2, 4\]; got \(2, 5\)"),
        ({"state": causal_conv_state(2, 6, 3)}, ValueError, r"\[2, 3, 6\]; got \(2, 2, 6\)"),
        ({"weight": torch.zeros(6, 4, device="meta")}, ValueError, "weight is on meta"),
    ],
)
def test_bad_inputs(change, error, message):
    call = {"x": torch.zeros(2, 4, 6), "weight": torch.zeros(6, 4)} | change
    with pytest.raises(error, match=message):
        causal_conv(**call)


def test_a_state_of_other_documents_than_inputs_is_refused():
    """Compiled loops would read beyond its end."""
    state = causal_conv_state(2, 4, 4, dtype=torch.float64)
    for segments in (state.segments[:, :0], state.segments[:1], state.segments.int()):
        with pytest.raises(ValueError, match=r"state\.segments must be \[B, K-1\] = \[2, 3\] of int64"):
            causal_conv(rand(2, 5, 4), rand(4, 4), state=state._replace(segments=segments))
