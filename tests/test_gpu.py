"""What only a CUDA device can show. Run with ``pytest -m gpu``."""

import math

import numpy as np
import pytest
import torch

from src.build import CONFIG_DIR, build_model
from src.components.canon import Canon
from src.components.generation import Sampling, generate
from src.components.kernels.attention import attention
from src.components.kernels.registry import forget_backends, used_backends
from src.components.mixers.attention import Attention
from src.training.run import run
from tests.runs import TINY, compose_run, results, tiny_run

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


@pytest.mark.parametrize("canon", ["''", "ABCD"])
def test_what_is_written_is_what_the_cpu_writes(canon):
    torch.manual_seed(0)
    net = build_model([f"canon.positions={canon}", "position=nope", "model.vocab_size=50", "model.dim=32"]).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)  # clear choices, which rounding does not turn
    prompts = [np.arange(1, n) for n in (3, 9, 2, 6)]
    settings = Sampling(stop=0, max_new_tokens=16)
    expected = generate(net, prompts, settings)
    found = generate(net.cuda(), prompts, settings)
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("width", [16, 64])
def test_flash_attention_over_documents_equals_the_equation(window, kv_heads, width):
    ids = torch.tensor([[0] * 40 + [1] * 88, [-1] * 10 + [3] * 100 + [-1] * 18], device="cuda")
    q, k, v = (torch.randn(2, 128, heads, width, device="cuda") for heads in (4, kv_heads, kv_heads))
    grad, found = torch.randn(2, 128, 4, width, device="cuda") * (ids >= 0)[..., None, None], []
    for backend, dtype in (("varlen", torch.bfloat16), ("reference", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = attention(*leaves, window=window, segments=(ids, ids), backend=backend)
        found.append([y * (ids >= 0)[..., None, None], *torch.autograd.grad(y, leaves, grad.to(dtype))])
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all()
        assert (a.float() - b).norm() / b.norm() < 2e-2


@pytest.mark.parametrize("compile_blocks", [False, True])
def test_packed_training_runs_on_flash_attention(compile_blocks):
    net = build_model(["canon.positions=ABCD", "model.vocab_size=50"]).cuda()
    ids, segments = torch.randint(50, (2, 256), device="cuda"), torch.arange(256, device="cuda").expand(2, -1) // 100
    losses = []
    for backend in ("sdpa", "auto"):
        for module in net.modules():
            if isinstance(module, Attention):
                module.backend = backend
        forget_backends()
        if backend == "auto" and compile_blocks:
            net.compile_blocks()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            losses.append(net(ids, segments=segments).float().logsumexp(-1).mean())
        losses[-1].backward()
    assert "varlen" in used_backends()["attention"]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=2e-2)


@pytest.mark.parametrize("task", ["brevo1", "lano", "capo", "mano", "copy", "mqar"])
def test_every_task_on_the_gpu(task, tmp_path):
    small = {
        "brevo1": ["data.task.N=8"],
        "lano": ["data.task.levels=3"],
        "capo": ["data.task.num_people=50", "data.window=256"],
        "mano": ["data.task.L=4"],
        "copy": ["data.task.N=30"],
        "mqar": ["data.task.num_pairs=4", "data.task.length=32", "data.task.vocabulary=64"],
    }[task]
    answers = ["data.val_answers=8", "data.test_answers=8"] if task in ("brevo1", "lano") else []
    options = [option for option in TINY if not option.startswith(("data=", "trainer=cpu"))]
    gpu = ["trainer=gpu", f"compile={str(task == 'brevo1').lower()}", "canon.positions=ABCD", "data.num_workers=2"]
    metrics = run(compose_run(tmp_path, f"data={task}", *options, *small, *answers, *gpu))
    assert 0 <= metrics["test/accuracy"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [path.stem for path in sorted((CONFIG_DIR / "experiment" / "single_gpu").glob("*.yaml"))]
)
def test_experiments_of_one_gpu_learn(name, tmp_path):
    """Two hundred steps of the real thing, with its compiled blocks; prints what an hour would hold."""
    config = compose_run(tmp_path, f"experiment=single_gpu/{name}")
    own = list(config.compare.values())[1]
    short = ["compare=null", "trainer.max_steps=200", "scheduler.warmup_steps=20", "trainer.val_check_interval=200"]
    few = ["data.val_windows=16", "data.test_windows=16"]
    metrics = run(compose_run(tmp_path, f"experiment=single_gpu/{name}", *own, *short, *few))
    seconds, steps = results(tmp_path)["seconds"], config.trainer.max_steps
    print(
        f"{name}: {seconds:.0f} s for 200 steps, so at most {2 * steps / 200 * seconds / 3600:.2f} h for both variants"
    )
    assert metrics["test/loss"] < math.log(config.size.vocab_size)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_tp"])
def test_strategies_of_one_gpu_give_its_losses(strategy, tmp_path):
    options = ["canon.positions=ABCD", "trainer.accelerator=cuda", "trainer.max_steps=5"]
    one = tiny_run(tmp_path / "one", *options)
    more = [
        f"trainer={strategy}",
        "trainer.devices=1",
        *(["trainer.strategy.tensor_parallel=1"] if "tp" in strategy else []),
    ]
    short = [option for option in TINY if option != "trainer=cpu"]
    found = run(compose_run(tmp_path / strategy, *short, *more, *options))
    assert found["test/loss"] == pytest.approx(one["test/loss"], abs=1e-3)
    memory = results(tmp_path / strategy)["peak_memory_bytes"]
    assert memory is not None
    assert memory > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama_canon", "gdn2_canon"])
def test_a_large_model_takes_a_training_step(family):
    """What benchmarks/gpu_scale.py measures, once."""
    net = build_model([f"family={family}", "size=1B"], device="cuda").train()
    net.recompute_blocks("block")
    ids = torch.randint(net.vocab_size, (2, 1025), device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
