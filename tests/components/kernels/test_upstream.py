"""Finding upstream's packages, what their kernels cannot take, and rows of documents as one long row; none of them is needed here.

What the kernels compute is tested in tests/upstream (`make test-kernels`) and, on a GPU, in tests/test_gpu_kernels.py.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from src.components.kernels import (
    BackendUnavailableError,
    ConvState,
    causal_conv,
    causal_conv_upstream,
    fla,
    mamba,
    upstream,
    varlen,
)
from src.components.kernels.gated_delta_rule import _gated_delta_rule
from src.components.kernels.gated_norm import _gated_rms_norm
from src.components.kernels.gla import _gla, gla
from src.components.kernels.recurrence import enter, recurrent_state
from src.components.kernels.ssd import _ssd

ROOT = Path(__file__).resolve().parents[3]


class GpuTensor:
    """What the predicates look at of a tensor on a CUDA device."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, *shape, dtype=torch.float32, requires_grad=False):
        self.shape, self.dtype, self.requires_grad = shape, dtype, requires_grad

    def is_floating_point(self):
        return True

    def element_size(self):
        return self.dtype.itemsize


def on_gpu(*shape: int, **options: Any) -> Any:
    return GpuTensor(*shape, **options)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with everything installed and a GPU of the given capability and Triton."""
    monkeypatch.setattr(upstream, "_missing", lambda package: None)
    monkeypatch.setattr(upstream, "Tensor", GpuTensor)

    def machine(capability=(9, 0), triton=(3, 8, 0)):
        monkeypatch.setattr(upstream, "_capability", lambda index: capability)
        monkeypatch.setattr(upstream, "_triton_version", lambda: triton)

    machine()
    return machine


def rule(**options):
    tensors = [on_gpu(1, 64, 2, 64, **options)] * 3 + [on_gpu(1, 64, 2, **options)] * 2
    return tensors, {"scale": 1.0, "normalize": True, "runs": None, "memory": None}


def scan(**options):
    keywords = {"D": None, "runs": None, "memory": None}
    return [on_gpu(1, 64, 2, 64, **options), *[on_gpu(1, 64, 2, **options)] * 4], keywords


def test_importing_the_kernels_imports_none_of_them():
    names = [path.stem for path in (ROOT / "src/components/kernels").glob("*.py")]
    lines = [f"import src.components.kernels.{name}" for name in names if name != "__init__"]
    lines += ["import sys", "print([m for m in ('fla', 'triton', 'mamba_ssm', 'causal_conv1d') if m in sys.modules])"]
    # A torch for CUDA may import triton itself: what counts is what is new after torch.
    code = "\n".join(["import torch, sys", "sys.modules.pop('triton', None)", *lines])
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


@pytest.mark.parametrize(
    ("operation", "backends"),
    [
        (_gla, ["fla", "torch", "recurrent"]),
        (_gated_delta_rule, ["fla", "fla_kda", "torch", "recurrent"]),
        (_ssd, ["mamba_ssm", "fla", "torch", "recurrent"]),
        (_gated_rms_norm, ["fla", "mamba_ssm", "torch"]),
    ],
)
def test_the_fastest_stands_first(operation, backends):
    assert list(operation.backends) == backends


def test_tensors_on_the_cpu_are_refused():
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(BackendUnavailableError, match="tensors are on cpu and its kernels need a CUDA device"):
        gla(q, q, q, q, backend="fla")


@pytest.mark.parametrize(
    ("package", "advice"),
    [(upstream.FLA, "[gpu]"), (upstream.MAMBA, "MAMBA_FORCE_BUILD"), (upstream.CAUSAL_CONV1D, "no-build-isolation")],
)
def test_a_missing_package_says_how_to_get_it(monkeypatch, package, advice):
    monkeypatch.setattr(upstream.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(upstream.sys, "modules", {})
    upstream._missing.cache_clear()
    reason = upstream.missing(package)
    upstream._missing.cache_clear()
    assert reason.startswith(f"{package} is not installed; ")
    assert advice in reason


def test_an_old_package_is_refused(monkeypatch):
    monkeypatch.setattr(upstream.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(upstream.importlib.metadata, "version", lambda name: "0.4.1")
    upstream._missing.cache_clear()
    reason = upstream.missing(upstream.FLA)
    upstream._missing.cache_clear()
    assert reason.startswith("fla-core 0.4.1 is too old, 0.5.2 is needed; ")


@pytest.mark.parametrize(
    ("text", "numbers"), [("3.7.1", (3, 7, 1)), ("2.3.2.post1", (2, 3, 2)), ("3.6.0+gitabc", (3, 6, 0)), ("4", (4,))]
)
def test_versions(text, numbers):
    assert upstream._numbers(text) == numbers


def test_what_a_gpu_can_take(gpu):
    half = on_gpu(1, dtype=torch.bfloat16)
    assert upstream.why_not(upstream.FLA, on_gpu(1), None, half) is None
    assert "float64; cast it" in str(upstream.why_not(upstream.FLA, on_gpu(1), on_gpu(1, dtype=torch.float64)))
    wrapped: Any = type("DTensor", (GpuTensor,), {})(1)
    assert "plain tensors only, not DTensor" in str(upstream.why_not(upstream.FLA, on_gpu(1), wrapped))


@pytest.mark.parametrize(
    ("capability", "triton", "refused"),
    [
        ((9, 0), (3, 6, 0), True),
        ((9, 0), (3, 4, 0), True),
        ((9, 0), (3, 7, 0), True),
        ((9, 0), (3, 7, 1), False),
        ((9, 0), (3, 3, 1), False),
        ((8, 0), (3, 6, 0), False),
        ((10, 0), (3, 6, 0), False),
    ],
)
def test_gradients_on_hopper(gpu, capability, triton, refused):
    gpu(capability, triton)
    tensors, options = rule(requires_grad=True)
    assert _gated_delta_rule.pick("auto", *tensors, **options) == ("fla_kda" if refused else "fla")
    arguments, keywords = scan(requires_grad=True)
    assert (fla.why_not_ssd(*arguments, **keywords) is not None) == refused
    assert _ssd.pick("auto", *arguments, **keywords) == "mamba_ssm"
    assert fla.why_not_gla(*tensors[:4], **options) is None
    if refused:
        with pytest.raises(BackendUnavailableError, match=r"pip install 'triton>=3\.7\.1', or use backend \"fla_kda\""):
            _gated_delta_rule.pick("fla", *tensors, **options)


def test_no_gradients_on_hopper_is_no_matter(gpu):
    gpu((9, 0), (3, 6, 0))
    tensors, options = rule(requires_grad=False)
    assert _gated_delta_rule.pick("auto", *tensors, **options) == "fla"
    with torch.no_grad():
        tensors, options = rule(requires_grad=True)
        assert _gated_delta_rule.pick("auto", *tensors, **options) == "fla"


@pytest.mark.parametrize("module", [fla, mamba])
def test_rows_too_long_for_a_norm(gpu, module):
    row, half = on_gpu(1, 20_000), on_gpu(1, 20_000, dtype=torch.bfloat16)
    assert "20000 numbers is larger than 64 KB" in module.why_not_gated_rms_norm(row, row, row)
    assert module.why_not_gated_rms_norm(half, half, half) is None


# ---------------------------------------------------------------------------------------------- documents as one row


def test_pieces_by_hand():
    found = varlen.pieces(torch.tensor([[0, 0, 1, 1, 1], [-1, 4, -1, 4, 5], [2, 2, 2, -1, 2]]))
    assert found.starts.tolist() == [0, 2, 5, 9, 10, 15]
    assert found.first.tolist() == [0, 2, 4]
    assert found.last.tolist() == [1, 3, 4]
    memory = torch.arange(1.0, 4.0).view(3, 1)
    torch.testing.assert_close(found.enter(memory), torch.tensor([[1.0], [0.0], [2.0], [0.0], [3.0]]))
    torch.testing.assert_close(found.leave(torch.arange(5.0).view(5, 1)), torch.tensor([[1.0], [3.0], [4.0]]))
    assert found.enter(None) is None
    assert found.leave(None) is None


def test_padding_between_documents_belongs_to_the_first():
    assert varlen.pieces(torch.tensor([[0, -1, -1, 1], [-1, -1, -1, -1]])).starts.tolist() == [0, 3, 4, 8]


def test_pieces_are_counted_once_for_a_tensor(monkeypatch):
    counted = []
    cut = varlen._cut
    monkeypatch.setattr(varlen, "_cut", lambda numbers: counted.append(1) or cut(numbers))
    numbers = torch.tensor([[0, 0, 1]])
    first = varlen.pieces(numbers)
    assert varlen.pieces(numbers) is first
    assert len(counted) == 1
    numbers[0, 1] = 1
    assert varlen.pieces(numbers).starts.tolist() == [0, 1, 3]
    assert varlen.pieces(numbers.clone()).starts.tolist() == [0, 1, 3]
    assert len(counted) == 3
    with torch.inference_mode():
        fleeting = torch.tensor([[0, 1]])
        assert varlen.pieces(fleeting).starts.tolist() == varlen.pieces(fleeting).starts.tolist() == [0, 1, 2]
    assert len(counted) == 5


def test_documents_are_compared_once_in_training():
    segments = torch.tensor([[0, 0, 1]])
    entry = enter(segments, None)
    assert enter(segments, None) is entry
    with torch.inference_mode():
        other = torch.tensor([[0, 1, 1]])
        assert enter(other, None) is not enter(other, None)
        assert enter(segments, None) is not entry
    segments[0, 1] = 1
    runs = enter(segments, None).runs
    assert runs is not None
    assert runs.tolist() == [[0, 1, 1]]
    state = recurrent_state(1, 1, 1, 1)
    assert enter(segments, state).memory is not None


# ------------------------------------------------------------------------------------- causal-conv1d, which is compiled


def stand_in(x, weight, *, bias, seq_idx, initial_states, activation):
    """causal_conv1d_fn by its documentation: x [B, C, T], seq_idx [B, T] int32, initial_states [B, C, K-1], channels last."""
    channels, taps = weight.shape
    assert x.stride(1) == 1
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and initial_states is None)
    assert initial_states is None or initial_states.stride(1) == 1
    before = x.new_zeros(len(x), channels, taps - 1) if initial_states is None else initial_states
    padded, y = torch.cat((before, x), dim=2), torch.zeros_like(x)
    for j in range(taps):
        tap = padded[..., j : j + x.shape[2]]
        if seq_idx is not None:
            ids = F.pad(seq_idx, (taps - 1, 0), value=-1)[:, j : j + x.shape[2]]
            tap = tap * (ids == seq_idx)[:, None]
        y = y + tap * weight[:, j, None]
    y = y if bias is None else y + bias[:, None]
    return F.silu(y) if activation == "silu" else y


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("what", ["plain", "documents", "state"])
def test_causal_conv1d_is_called_as_documented(monkeypatch, activation, what):
    monkeypatch.setattr(causal_conv_upstream, "load", lambda module, name: stand_in)
    monkeypatch.setattr(causal_conv_upstream, "why_not", lambda *_: None)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 8), torch.randn(8, 4), torch.randn(8)
    options = {"bias": bias, "activation": activation}
    if what == "documents":
        options["segments"] = torch.tensor([[-1, -1, 3, 3, -1, 3, 4, 4, -1], [0] * 5 + [1] * 4])
    if what == "state":
        options["state"] = ConvState(torch.randn(2, 3, 8), torch.tensor([[-1, 0, 0], [0, 5, 5]]))
    found, _ = causal_conv(x, weight, **options, backend="causal_conv1d")
    expected, _ = causal_conv(x, weight, **options, backend="torch")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("x", "weight", "options", "reason"),
    [
        (torch.zeros(1, 2, 8), torch.zeros(8, 5), {}, "2 to 4 taps, not 5"),
        (torch.zeros(1, 2, 6), torch.zeros(6, 4), {}, "multiple of 8 channels, not 6"),
        (torch.zeros(1, 2, 8), torch.zeros(8, 4), {"segments": 1, "state": 1}, "not both"),
    ],
)
def test_what_causal_conv1d_cannot(x, weight, options, reason):
    options = {"bias": None, "segments": None, "state": None} | options
    assert reason in causal_conv_upstream.why_not_causal_conv1d(x, weight, **options)
