"""The recurrent operations: the reference by hand, every other backend against it; documents, state, strong decay, precision."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from src.components.kernels import gated_delta_rule as gdr_file
from src.components.kernels import gla as gla_file
from src.components.kernels import ssd as ssd_file
from src.components.kernels.gated_delta_rule import gated_delta_rule
from src.components.kernels.gla import gla
from src.components.kernels.recurrence import RecurrentState, recurrent_state
from src.components.kernels.registry import BackendUnavailableError, Operation, forget_backends, used_backends
from src.components.kernels.ssd import ssd
from tests.measured import note

HEADS, KEYS, VALUES = 4, 3, 5
LENGTHS = [1, 2, 3, 7, 8, 16, 31, 32, 33, 40, 63, 64, 65, 66, 95, 127, 128, 129, 130]


class Op(NamedTuple):
    """One operation, as the tests call it."""

    front: Callable[..., tuple[Tensor, RecurrentState | None]]
    table: Operation
    inputs: Callable[
        ..., dict[str, Any]
    ]  # (randn, batch, time, decay) -> keyword arguments; decay(*shape) is a log-decay
    memory: tuple[int, int, int]
    values: str  # the input that is written, and whose size shows in the output

    def state(self, batch: int, dtype: torch.dtype = torch.float64) -> RecurrentState:
        return recurrent_state(batch, *self.memory, dtype=dtype)


def gla_inputs(randn, batch, time, decay):
    q, k, v = randn(batch, time, HEADS, KEYS), randn(batch, time, HEADS, KEYS), randn(batch, time, HEADS, VALUES)
    return {"q": q, "k": k, "v": v, "log_decay": decay(batch, time, HEADS, KEYS)}


def gdr_inputs(randn, batch, time, decay):
    inputs = gla_inputs(randn, batch, time, decay)
    return inputs | {"log_decay": decay(batch, time, HEADS), "beta": randn(batch, time, HEADS).sigmoid()}


def raw_gdr_inputs(randn, batch, time, decay):
    inputs = gdr_inputs(randn, batch, time, decay)
    return inputs | {"k": torch.nn.functional.normalize(inputs["k"], dim=-1), "normalize": False, "scale": 0.7}


def ssd_inputs(randn, batch, time, decay, groups=2, skip=True):
    B, C = randn(batch, time, groups, VALUES), randn(batch, time, groups, VALUES)
    A = -0.5 - randn(HEADS).abs()
    dt = decay(batch, time, HEADS) / A  # so that dt A is the log-decay, but for one head whose A is 0
    A[-1] = 0.0
    return {"x": randn(batch, time, HEADS, KEYS), "dt": dt, "A": A, "B": B, "C": C, "D": randn(HEADS) if skip else None}


def one_group_ssd_inputs(randn, batch, time, decay):
    return ssd_inputs(randn, batch, time, decay, groups=1, skip=False)


OPS = {
    "gla": Op(gla, gla_file._gla, gla_inputs, (HEADS, KEYS, VALUES), "v"),
    "gdr": Op(gated_delta_rule, gdr_file._gated_delta_rule, gdr_inputs, (HEADS, KEYS, VALUES), "v"),
    "gdr, raw keys": Op(gated_delta_rule, gdr_file._gated_delta_rule, raw_gdr_inputs, (HEADS, KEYS, VALUES), "v"),
    "ssd": Op(ssd, ssd_file._ssd, ssd_inputs, (HEADS, KEYS, VALUES), "x"),
    "ssd, one group": Op(ssd, ssd_file._ssd, one_group_ssd_inputs, (HEADS, KEYS, VALUES), "x"),
}


class Random:
    """Seeded inputs."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def mild(self, *shape: int) -> Tensor:
        return torch.nn.functional.logsigmoid(self.randn(*shape)) / 4

    def strong(self, *shape: int) -> Tensor:
        """Every fourth token or so forgets nearly all; the others nearly nothing."""
        return torch.where(self.randn(*shape) > 0.7, -80.0, -0.1 * self.randn(*shape).abs()).to(self.dtype)

    def segments(self, batch: int, time: int) -> Tensor:
        """Documents of random length, some repeated numbers, some padding, at any place."""
        starts = torch.rand(batch, time, generator=self.generator) < 0.08
        segments = starts.long().cumsum(1) % 3
        return segments.masked_fill(torch.rand(batch, time, generator=self.generator) < 0.1, -1)


DECAYS = {"mild": Random.mild, "strong": Random.strong}


def make(op: Op, batch: int, time: int, *, decay: str = "mild", seed: int = 0, dtype=torch.float64) -> dict[str, Any]:
    random = Random(seed, dtype)
    return op.inputs(random.randn, batch, time, lambda *shape: DECAYS[decay](random, *shape))


def can_run(op: Op, backend: str) -> bool:
    try:
        op.front(**make(op, 1, 2), backend=backend)
    except BackendUnavailableError:
        return False
    return True


every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_backend = pytest.mark.parametrize(
    ("op", "backend"),
    [
        pytest.param(op, name, id=f"{key}, {name}")
        for key, op in OPS.items()
        for name in op.table.backends
        if name != "recurrent" and can_run(op, name)
    ],
)


def leaves(inputs: dict[str, Any], state: RecurrentState | None = None) -> list[Tensor]:
    """The tensors to differentiate by."""
    tensors = [x for x in inputs.values() if isinstance(x, Tensor)] + ([state.memory] if state else [])
    return [x.requires_grad_() for x in tensors]


def everything(op: Op, backend: str, inputs: dict[str, Any], state: RecurrentState, **options) -> list[Tensor]:
    """Output, final memory, final document, and the gradients of a random function of output and memory."""
    wanted = leaves(inputs, state)
    y, after = op.front(**inputs, state=state, backend=backend, **options)
    assert after is not None
    random = Random(1, y.dtype)
    loss = (y * random.randn(*y.shape)).sum() + (after.memory * random.randn(*after.memory.shape)).sum()
    return [y, after.memory, after.segment, *torch.autograd.grad(loss, wanted)]


def close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def full_state(op: Op, batch: int, seed: int = 5) -> RecurrentState:
    memory = Random(seed).randn(batch, *op.memory)
    return RecurrentState(memory, torch.tensor([0, -1, 2] * batch)[:batch])


# ---------------------------------------------------------------------------------------------------- the equations


def by_hand(op: Op, b: int, h: int, inputs: dict[str, Any], memory: Tensor) -> Callable[[int, Tensor, bool], tuple]:
    """(t, memory [K, V], real) -> (output, memory) of one row and head, as the papers write it."""
    i = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}

    def gla_step(t, S, real):
        q, k, v, g = (i[name][b, t, h] for name in ("q", "k", "v", "log_decay"))
        if real:
            S = torch.diag(g.exp()) @ S + torch.outer(k, v)
        return S.T @ q * KEYS**-0.5, S

    def gdr_step(t, S, real):
        q, k, v, g, beta = (i[name][b, t, h] for name in ("q", "k", "v", "log_decay", "beta"))
        scale = inputs.get("scale", KEYS**-0.5)
        if inputs.get("normalize", True):
            q, k = q / (q @ q + 1e-6).sqrt(), k / (k @ k + 1e-6).sqrt()
        if real:
            S = g.exp() * (torch.eye(KEYS) - beta * torch.outer(k, k)).double() @ S + beta * torch.outer(k, v)
        return S.T @ q * scale, S

    def ssd_step(t, S, real):
        group = h // (HEADS // i["B"].shape[2])
        x, dt, B, C = i["x"][b, t, h], i["dt"][b, t, h], i["B"][b, t, group], i["C"][b, t, group]
        if real:
            S = (dt * i["A"][h]).exp() * S + dt * torch.outer(x, B)
        return S @ C + (i["D"][h] * x if "D" in i else 0.0), S

    return {gla: gla_step, gated_delta_rule: gdr_step, ssd: ssd_step}[op.front]


@every_op
def test_the_reference_is_the_equation(op):
    batch, time = 3, 14
    inputs, start = make(op, batch, time), full_state(op, batch)
    segments = torch.tensor(
        [[0] * 5 + [-1] * 2 + [0] + [4] * 6, [-1, -1] + [7] * 12, [2] * 3 + [-1, 3, 2, 2] * 2 + [2] * 3]
    )
    y, after = op.front(**inputs, segments=segments, state=start, backend="recurrent")
    for b in range(batch):
        for h in range(HEADS):
            memory, document = start.memory[b, h], int(start.segment[b])
            for t in range(time):
                real = bool(segments[b, t] >= 0)
                if real and document >= 0 and document != segments[b, t]:
                    memory = torch.zeros_like(memory)
                document = int(segments[b, t]) if real else document
                expected, memory = by_hand(op, b, h, inputs, memory)(t, memory, real)
                torch.testing.assert_close(y[b, t, h], expected)
            torch.testing.assert_close(after.memory[b, h], memory)
            assert after.segment[b] == document


# ------------------------------------------------------------------------------------- every backend is the reference


@every_backend
def test_every_length(op, backend):
    """What a prefix gives is the prefix of what all gives, so one run of the reference serves all lengths."""
    inputs, start = make(op, 1, 130), full_state(op, 1)
    expected, state, memories = [], start, []
    for t in range(130):
        y, state = op.front(**cut(inputs, t, t + 1), state=state, backend="recurrent")
        expected.append(y)
        memories.append(state.memory)
    for time in range(1, 131):
        y, after = op.front(**cut(inputs, 0, time), state=start, backend=backend)
        close([y, after.memory], [torch.cat(expected[:time], 1), memories[time - 1]])


@every_backend
@pytest.mark.parametrize("time", LENGTHS)
def test_gradients(op, backend, time):
    inputs, start = make(op, 2, time, seed=time), full_state(op, 2)
    close(everything(op, backend, inputs, start), everything(op, "recurrent", inputs, start))


@every_backend
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20), time=st.integers(1, 130), batch=st.integers(1, 3), decay=st.sampled_from(list(DECAYS))
)
def test_documents_and_padding(op, backend, seed, time, batch, decay):
    inputs, start = make(op, batch, time, seed=seed, decay=decay), full_state(op, batch)
    segments = Random(seed).segments(batch, time)
    ours = everything(op, backend, inputs, start, segments=segments)
    close(ours, everything(op, "recurrent", inputs, start, segments=segments))


@every_backend
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), cuts=st.lists(st.integers(0, 130), min_size=1, max_size=4))
def test_calls_that_hand_on_the_state_are_one_call(op, backend, seed, cuts):
    inputs, segments = make(op, 2, 130, seed=seed), Random(seed).segments(2, 130)
    y, after = op.front(**inputs, segments=segments, state=op.state(2), backend=backend)
    pieces, state, ends = [], op.state(2), [*sorted(cuts), 130]
    for begin, end in zip([0, *ends], ends, strict=False):
        piece, state = op.front(
            **cut(inputs, begin, end), segments=segments[:, begin:end], state=state, backend=backend
        )
        pieces.append(piece)
    real = segments >= 0  # what comes out at padding means nothing
    close([torch.cat(pieces, 1)[real], *state], [y[real], *after])


def cut(inputs: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    """Tokens begin to end of all that has a time."""
    return {k: x[:, begin:end] if isinstance(x, Tensor) and x.ndim > 1 else x for k, x in inputs.items()}


@every_backend
def test_without_a_state(op, backend):
    inputs = make(op, 2, 70)
    y, after = op.front(**inputs, backend=backend)
    assert after is None
    close([y], [op.front(**inputs, state=op.state(2), backend="recurrent")[0]])


@every_backend
def test_the_given_state_is_left_as_it_was(op, backend):
    for time in (0, 1, 5, 70):
        start = full_state(op, 2)
        before = start.memory.clone(), start.segment.clone()
        op.front(**make(op, 2, time), state=start, segments=torch.full((2, time), 6), backend=backend)
        assert torch.equal(start.memory, before[0])
        assert torch.equal(start.segment, before[1])


@every_backend
def test_no_tokens(op, backend):
    start, segments = full_state(op, 2), torch.zeros(2, 0, dtype=torch.long)
    y, after = op.front(**make(op, 2, 0), segments=segments, state=start, backend=backend)
    assert y.shape == op.front(**make(op, 2, 1), backend=backend)[0][:, :0].shape
    close(list(after), list(start))
    assert op.front(**make(op, 2, 0), segments=segments, backend=backend)[1] is None


@every_backend
def test_nothing_passes_a_document_boundary_or_comes_from_the_future(op, backend):
    inputs, segments = make(op, 1, 130), torch.tensor([[0] * 50 + [1] * 80])
    y = op.front(**inputs, segments=segments, backend=backend)[0]
    for name in inputs:
        if name in ("A", "D", "normalize", "scale") or inputs[name] is None:
            continue
        for changed, unchanged in ((slice(0, 50), slice(50, 130)), (slice(100, 130), slice(0, 100))):
            other = dict(inputs, **{name: inputs[name].clone()})
            other[name][:, changed] *= 1.5
            y_other = op.front(**other, segments=segments, backend=backend)[0]
            close([y_other[:, unchanged]], [y[:, unchanged]], 1e-13)  # rounded otherwise where a middle moves
            if name == op.values:
                assert (y_other[:, changed] - y[:, changed]).abs().amax((0, 2, 3)).min() > 1e-6


# --------------------------------------------------------------------------------------------- strong decay, precision


@every_backend
@pytest.mark.parametrize("log_decay", [-1.5, -60.0, -200.0, -1e30, -torch.inf])
def test_strong_decay_keeps_values_and_gradients_finite_and_right(op, backend, log_decay):
    """In float32, a third of the tokens decays like this, against the reference in float64."""
    random = Random(3)

    def decay(*shape: int) -> Tensor:
        return torch.where(random.randn(*shape) > 0.4, log_decay, random.mild(*shape))

    inputs, start = op.inputs(random.randn, 2, 100, decay), full_state(op, 2)
    if "dt" in inputs:  # infinite steps would also write infinitely much
        inputs["dt"] = inputs["dt"].clamp(max=300.0)
    expected = everything(op, "recurrent", inputs, start)
    inputs, start = single(inputs), RecurrentState(start.memory.detach().float(), start.segment)
    for ours, theirs in zip(everything(op, backend, inputs, start), expected, strict=True):
        assert ours.isfinite().all()
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def single(inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {name: x.detach().to(dtype) if isinstance(x, Tensor) else x for name, x in inputs.items()}


@every_backend
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_precision(op, backend, dtype, tolerance):
    """Only the output is rounded to a 16-bit dtype; the memory stays in float32."""
    inputs = single(make(op, 2, 130), dtype)
    segments = Random(4).segments(2, 130)
    y, after = op.front(**inputs, segments=segments, state=op.state(2, torch.float32), backend=backend)
    assert (y.dtype, after.memory.dtype) == (dtype, torch.float32)
    expected, exact = op.front(
        **single(inputs, torch.float64), segments=segments, state=op.state(2), backend="recurrent"
    )
    note((y.double() - expected).abs().max() / expected.abs().max())
    assert (y.double() - expected).abs().max() < tolerance * expected.abs().max()
    assert (after.memory.double() - exact.memory).abs().max() < 1e-5 * exact.memory.abs().max()


@every_backend
def test_autocast_leaves_it_alone(op, backend):
    inputs = single(make(op, 2, 70))
    y = op.front(**inputs, backend=backend)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op.front(**inputs, backend=backend)[0], y)


# ---------------------------------------------------------------------------------------- derivatives, transformations


@pytest.fixture
def short_chunks(monkeypatch):
    """Several chunks in few tokens."""
    monkeypatch.setattr(gla_file, "MIDPOINT_CHUNK", 4)
    monkeypatch.setattr(gla_file, "HALVES_CHUNK", 4)
    monkeypatch.setattr(gdr_file, "CHUNK", 4)
    monkeypatch.setattr(ssd_file, "CHUNK", 4)


@pytest.mark.usefixtures("short_chunks")
@every_backend
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("time", [1, 7])
def test_gradcheck(op, backend, time, decay):
    inputs, start = make(op, 1, time, decay=decay), full_state(op, 1)
    segments = torch.tensor([[0, 0, 3, 3, -1, 3, 1][:time]])
    names = [name for name, x in inputs.items() if isinstance(x, Tensor)]

    def run(memory: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        state = RecurrentState(memory, start.segment)
        y, after = op.front(
            **{**inputs, **dict(zip(names, values, strict=True))}, segments=segments, state=state, backend=backend
        )
        return y, after.memory

    wanted = leaves(inputs, start)
    assert torch.autograd.gradcheck(run, (wanted[-1], *wanted[:-1]), fast_mode=True)


@every_backend
def test_function_transforms(op, backend):
    """Per-example gradients by vmap of grad are those one by one."""
    inputs = make(op, 3, 40)
    name = op.values
    fixed = {key: x for key, x in inputs.items() if key != name}
    rows = {key: x for key, x in fixed.items() if isinstance(x, Tensor) and x.ndim > 1}
    rest = {key: x for key, x in fixed.items() if key not in rows}

    def loss(x: Tensor, row: dict[str, Tensor]) -> Tensor:
        batched = {key: value[None] for key, value in row.items()}
        return op.front(**batched, **rest, **{name: x[None]}, backend=backend)[0].square().sum()

    together = torch.func.vmap(torch.func.grad(loss))(inputs[name], rows)
    x = inputs[name].requires_grad_()
    y = op.front(**inputs, backend=backend)[0]
    close([together], list(torch.autograd.grad(y.square().sum(), x)))


@pytest.mark.parametrize("key", ["gla", "gdr", "ssd"])
def test_compiled_whole(key):
    """One graph, without a look at values, and the same result."""
    op = OPS[key]
    inputs, segments = make(op, 2, 70), Random(4).segments(2, 70)

    def run(**tensors: Any) -> Tensor:
        return op.front(**tensors, segments=segments, backend="torch")[0]

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    close([compiled(**inputs)], [run(**inputs)])


@every_backend
def test_what_is_kept_for_the_backward_pass_is_linear_in_time(op, backend):
    def kept(time: int) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        inputs = make(op, 1, time)
        leaves(inputs)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = op.front(**inputs, backend=backend)[0]
        assert y.requires_grad
        return sum(sizes.values())

    assert kept(1024) < 2.1 * kept(512)


# ------------------------------------------------------------------------------------------------------ which, errors


@every_op
def test_the_chunked_form_is_the_default_on_the_cpu(op):
    forget_backends()
    op.front(**make(op, 1, 3))
    assert used_backends() == {op.table.name: ("torch",)}


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("gla", {"k": torch.zeros(2, 5, HEADS, 4)}, "q, k and log_decay must be"),
        ("gla", {"log_decay": torch.zeros(2, 5, HEADS)}, "q, k and log_decay must be"),
        ("gla", {"v": torch.zeros(2, 4, HEADS, 2)}, "v must be"),
        ("gdr", {"q": torch.zeros(2, 5, HEADS)}, "q and k must be"),
        ("gdr", {"v": torch.zeros(2, 5, 1, 2)}, "v must be"),
        ("gdr", {"beta": torch.zeros(2, 5, 1)}, "log_decay and beta must be"),
        ("ssd", {"dt": torch.zeros(2, 5)}, "x must be"),
        ("ssd", {"C": torch.zeros(2, 5, 1, 2)}, "B and C must be"),
        ("ssd", {"B": torch.zeros(2, 5, 3, 2), "C": torch.zeros(2, 5, 3, 2)}, "G dividing H=4"),
        ("ssd", {"A": torch.zeros(1)}, r"A must be \[H\] = \[4\]; got \(1,\)"),
        ("ssd", {"D": torch.zeros(3)}, "D must be"),
        ("ssd", {"backend": "cuda"}, "no backend 'cuda'"),
    ],
)
def test_errors(key, change, message):
    with pytest.raises(ValueError, match=message):
        OPS[key].front(**(make(OPS[key], 2, 5) | change))
