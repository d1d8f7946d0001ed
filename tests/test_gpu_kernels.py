"""Upstream's fused kernels on a CUDA device against our PyTorch ones on the same device. Run with ``pytest -m gpu``.

A backend that cannot run here (package missing, or refused on this GPU and Triton) is skipped with the reason that it gives.
"""

import pytest
import torch
import torch.nn.functional as F

from src.build import CONFIG_DIR, build_model
from src.components.kernels import (
    BackendUnavailableError,
    causal_conv,
    fla,
    upstream,
    used_backends,
)
from src.components.kernels.gated_norm import gated_rms_norm
from src.components.kernels.registry import forget_backends
from tests.upstream.calls import OPERATIONS, arguments, assert_alike, documents, outcome, state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

RECURRENCES = [
    ("gla", "fla"),
    ("gated_delta_rule", "fla"),
    ("gated_delta_rule", "fla_kda"),
    ("ssd", "mamba_ssm"),
    ("ssd", "fla"),
]
CONVOLUTIONS = [("causal_conv", "fla"), ("causal_conv", "causal_conv1d")]
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
every = pytest.mark.parametrize(("operation", "backend"), RECURRENCES + CONVOLUTIONS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
MODELS = sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml") if path.stem != "base")
GATES = {"log_decay", "beta", "dt", "A", "D"}  # float32 always, as the mixers make them


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch):
    """Products of float32 in float32, ours and (as far as they leave the choice to Triton) upstream's, not in TF32."""
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(call, dtype):
    def move(name, part):
        if not isinstance(part, torch.Tensor):
            return part
        return part.cuda().to(dtype if part.is_floating_point() and name not in GATES else part.dtype)

    return {name: move(name, part) for name, part in call.items()}


def start_on_gpu(operation, *shape, dtype=torch.float32):
    start = state(operation, *shape)
    first = start[0].cuda().to(dtype if operation == "causal_conv" else torch.float32)
    return type(start)(first, start[1].cuda())


def compare(operation, backend, call, dtype, **options):
    """The fused backend in `dtype` against ours in float32, fed the same rounded numbers. Errors relative to the largest."""
    call = on_gpu(call, dtype)
    try:
        found = outcome(operation, call, backend=backend, **options)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    wide = {name: part.float() if isinstance(part, torch.Tensor) else part for name, part in call.items()}
    if options.get("start") is not None:
        options["start"] = options["start"]._replace(**{options["start"]._fields[0]: options["start"][0].float()})
    assert_alike(found, outcome(operation, wide, backend="torch", **options), TOLERANCES[dtype])


@every
@dtypes
@pytest.mark.parametrize(("key", "value"), [(64, 64), (128, 128), (64, 128), (40, 24)])
def test_values_and_gradients(operation, backend, dtype, key, value):
    compare(operation, backend, arguments(operation, 2, 300, 2, key, value), dtype)


@every
@dtypes
def test_documents_padding_and_a_state(operation, backend, dtype):
    call, start = arguments(operation, 3, 150, 2, 64, 64), start_on_gpu(operation, 3, 2, 64, 64, dtype=dtype)
    compare(operation, backend, call, dtype, segments=documents(3, 150).cuda())
    compare(operation, backend, call, dtype, start=start)
    compare(operation, backend, call, dtype, segments=documents(3, 150).cuda(), start=start)


@every
def test_strong_decay_and_odd_widths_in_bfloat16(operation, backend):
    call = arguments(operation, 1, 70, 2, 33, 17)
    if "log_decay" in call:
        call["log_decay"] = call["log_decay"] * 40
    if operation == "ssd":
        call["A"] = call["A"] * 20
    compare(operation, backend, call, torch.bfloat16)


@every
@dtypes
def test_step_kernels(operation, backend, dtype):
    call = on_gpu(arguments(operation, 2, 24, 2, 64, 64), dtype)
    start = start_on_gpu(operation, 2, 2, 64, 64, dtype=dtype)
    run, fixed = OPERATIONS[operation], {name: part for name, part in call.items() if name in ("A", "D", "weight")}
    try:
        with torch.no_grad():
            expected, _ = run(**call, state=start, backend="torch")
            now, outputs = start, []
            for t in range(24):
                piece = {name: part[:, t : t + 1] for name, part in call.items() if name not in fixed}
                y, now = run(**piece, **fixed, state=now, backend=backend)
                outputs.append(y)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert_alike({"y": torch.cat(outputs, 1)}, {"y": expected}, TOLERANCES[dtype])


@every
def test_compiled_equals_eager(operation, backend):
    call = on_gpu(arguments(operation, 2, 100, 2, 64, 64), torch.float32)

    def results(function):
        leaves = {name: part.clone().requires_grad_() for name, part in call.items()}
        y = function(**leaves)
        return [y, *torch.autograd.grad(y.square().mean(), list(leaves.values()))]

    def plain(**tensors):
        return OPERATIONS[operation](**{n: t * 1.0 for n, t in tensors.items()}, backend=backend)[0] * 2

    try:
        eager = results(plain)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    for a, b in zip(results(torch.compile(plain)), eager, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("backend", ["fla", "causal_conv1d"])
@dtypes
@pytest.mark.parametrize("residual", [False, True])
def test_convolution_with_bias_and_activation(backend, dtype, residual):
    call = arguments("causal_conv", 3, 150, 2, 64, 64) | {"bias": torch.randn(128)}
    call |= {"activation": "silu", "residual": residual}
    compare("causal_conv", backend, call, dtype, segments=documents(3, 150).cuda())


@pytest.mark.parametrize("backend", ["fla", "mamba_ssm"])
@pytest.mark.parametrize("gate_first", [False, True])
@dtypes
@pytest.mark.parametrize("width", [64, 2048])
def test_gated_norms(backend, gate_first, dtype, width):
    g = torch.Generator("cuda").manual_seed(0)
    x, gate = (torch.randn(4, 50, width, device="cuda", generator=g).to(dtype) for _ in range(2))
    weight = torch.randn(width, device="cuda", generator=g)

    def results(name, *tensors):
        leaves = [part.detach().clone().requires_grad_() for part in tensors]
        y = gated_rms_norm(*leaves, gate_first=gate_first, backend=name)
        return dict(enumerate([y, *torch.autograd.grad(y.float().square().sum(), leaves)]))

    try:
        found = results(backend, x, gate, weight)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert_alike(found, results("torch", x.float(), gate.float(), weight), TOLERANCES[dtype])


@dtypes
def test_fused_linear_cross_entropy(dtype):
    h, weight = torch.randn(300, 64, device="cuda"), torch.randn(1000, 64, device="cuda") / 8
    targets = torch.randint(1000, (300,), device="cuda")

    def results(loss, *tensors):
        leaves = [part.detach().clone().requires_grad_() for part in tensors]
        return dict(enumerate([(value := loss(*leaves, targets)), *torch.autograd.grad(value, leaves)]))

    h, weight = h.to(dtype).requires_grad_(), weight.to(dtype)
    reason = fla.why_not_fused_linear_cross_entropy(h, weight, targets)
    if reason:
        pytest.skip(reason)
    expected = results(lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction="sum"), h.float(), weight.float())
    assert_alike(results(fla.fused_linear_cross_entropy, h, weight), expected, TOLERANCES[dtype])


def test_hopper_is_noticed():
    """On Hopper with an early Triton the delta rule's gradients go through KDA; everywhere else through its own kernel."""
    if upstream.missing(upstream.FLA):
        pytest.skip(str(upstream.missing(upstream.FLA)))
    call = on_gpu(arguments("gated_delta_rule", 1, 64, 1, 64, 64), torch.float32)
    forget_backends()
    outcome("gated_delta_rule", call, backend="auto")
    hopper = torch.cuda.get_device_capability()[0] == 9
    refused = hopper and (3, 4) <= upstream._triton_version() < (3, 7, 1)
    assert used_backends()["gated_delta_rule"] == (("fla_kda",) if refused else ("fla",))


def positions(name, letters):
    """An override; experts have no point D."""
    return f"canon.positions='{letters.replace('D', '') if name == 'moe' else letters}'"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("canon", [False, True])
def test_models_equal_the_cpu_s(name, canon):
    """Logits and gradients in float32, documents packed; whatever kernels `auto` takes on either side."""
    net = build_model([f"model={name}", positions(name, "AbBCD" if canon else ""), "model.vocab_size=50"])
    ids, segments = torch.randint(50, (2, 65)), documents(2, 65)
    real, found = segments >= 0, []
    for device in ("cpu", "cuda"):
        net = net.to(device)
        net.zero_grad()
        logits = net(ids.to(device), segments=segments.to(device))
        F.cross_entropy(logits[real.to(device)], ids.to(device)[real.to(device)]).backward()
        grads = {key: p.grad.cpu() for key, p in net.named_parameters() if p.grad is not None}
        found.append({"logits": logits[real.to(device)].detach().cpu(), **grads})
    assert_alike(found[1], found[0], 2e-3)


@pytest.mark.parametrize("name", MODELS)
def test_models_compile(name):
    net = build_model([f"model={name}", positions(name, "ABCD"), "model.vocab_size=50"]).cuda()
    ids = torch.randint(50, (2, 64), device="cuda")
    with torch.no_grad():
        eager = net(ids)
        net.compile_blocks()
        torch.testing.assert_close(net(ids), eager, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", MODELS)
def test_models_decode_as_they_train(name):
    """A prefill and one-token steps, on the step kernels, against one forward pass on the chunk kernels."""
    net = build_model([f"model={name}", positions(name, "ABCD"), "model.vocab_size=50"]).cuda().eval()
    ids = torch.randint(50, (2, 40), device="cuda")
    with torch.no_grad():
        full = net(ids)
        logits, now = net(ids[:, :21], state=net.initial_state())
        outputs = [logits]
        for t in range(21, 40):
            logits, now = net(ids[:, t : t + 1], state=now)
            outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1), full, atol=2e-3, rtol=2e-3)


def test_one_wait_for_the_gpu_in_a_forward_pass(monkeypatch):
    """Documents are cut once for all convolutions of a model, and once for all recurrences."""
    from src.components.kernels import varlen

    counted, cut = [], varlen._cut
    monkeypatch.setattr(varlen, "_cut", lambda numbers: counted.append(1) or cut(numbers))
    if upstream.missing(upstream.FLA):
        pytest.skip(str(upstream.missing(upstream.FLA)))
    x, weight, segments = torch.randn(2, 90, 32).cuda(), torch.randn(32, 4).cuda(), documents(2, 90).cuda()
    call = on_gpu(arguments("gla", 2, 90, 1, 32, 32), torch.float32)
    for _ in range(3):
        causal_conv(x, weight, segments=segments, backend="fla")
        OPERATIONS["gla"](**call, segments=segments, backend="fla")
    assert len(counted) == 2
