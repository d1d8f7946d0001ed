"""What the fused kernels gain on this GPU: each operation on every backend that can run it, forward + backward and forward alone.

    python benchmarks/gpu_kernels.py [--shapes 4,2048,16,128 8,1024,8,64] [--dtype bfloat16] [--compile] [--seconds 0.5]
                                     [--operations gla ssd] [--out benchmarks/results/gpu_kernels.json]

Shapes are B,T,H,D with K = V = D; Mamba2's state is N = D wide, the convolution has H D channels, the loss B T targets out of 32,000
words. Times are medians of calls timed on the device, after a first call that compiles and tunes. A backend that cannot run is listed
with its reason; one that fails is listed with its error, and the others go on. `--compile` times each operation under
torch.compile as well, which leaves the fused kernels alone and fuses what our PyTorch twins do.

Runs unattended: the file is written after every operation.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.components.kernels import causal_conv  # noqa: E402
from src.components.kernels.gated_delta_rule import _gated_delta_rule, gated_delta_rule  # noqa: E402
from src.components.kernels.gated_norm import _gated_rms_norm, gated_rms_norm  # noqa: E402
from src.components.kernels.gla import _gla, gla  # noqa: E402
from src.components.kernels.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from src.components.kernels.ssd import _ssd, ssd  # noqa: E402
from src.components.kernels.upstream import installed_version  # noqa: E402

SHAPES = ["4,2048,16,128", "8,1024,8,64"]
WORDS = 32_000
SKIPPED = {"recurrent", "reference", "full", "cpu"}  # yardsticks of exactness, not of speed

Shape = tuple[int, int, int, int]
Call = Callable[..., Tensor]  # of the tensors and `backend`


def operations(shape: Shape, dtype: torch.dtype) -> dict[str, tuple[list[str], Call, list[Tensor]]]:
    """Name -> backends, the call, its tensors."""
    batch, time, heads, width = shape
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=g, device="cuda", dtype=torch.float32).to(like)

    wide = torch.float32
    qkv = [normal(batch, time, heads, width) for _ in range(3)]
    per_key = F.logsigmoid(normal(batch, time, heads, width, like=wide)) / 16
    per_head = F.logsigmoid(normal(batch, time, heads, like=wide)) / 16
    beta, dt = normal(batch, time, heads, like=wide).sigmoid(), F.softplus(normal(batch, time, heads, like=wide) - 2)
    A, D = -normal(heads, like=wide).exp(), normal(heads, like=wide)
    x = normal(batch, time, heads * width)
    targets = torch.randint(WORDS, (batch * time,), generator=g, device="cuda")

    def loss(h: Tensor, weight: Tensor, *, backend: str) -> Tensor:
        return linear_cross_entropy(h, weight, targets, count_right=False, backend=backend).loss

    return {
        "gla": (list(_gla.backends), lambda *t, backend: gla(*t, backend=backend)[0], [*qkv, per_key]),
        "gated_delta_rule": (
            list(_gated_delta_rule.backends),
            lambda *t, backend: gated_delta_rule(*t, backend=backend)[0],
            [*qkv, per_head, beta],
        ),
        "ssd": (
            list(_ssd.backends),
            lambda x, dt, A, B, C, D, *, backend: ssd(x, dt, A, B, C, D=D, backend=backend)[0],
            [qkv[0], dt, A, normal(batch, time, 1, width), normal(batch, time, 1, width), D],
        ),
        "canon": (
            ["fla", "causal_conv1d", "torch"],
            lambda x, weight, *, backend: causal_conv(x, weight, backend=backend)[0],
            [x, normal(heads * width, 4, like=wide) / 2],
        ),
        "short convolution with silu": (
            ["fla", "causal_conv1d", "torch"],
            lambda x, weight, *, backend: causal_conv(x, weight, residual=False, activation="silu", backend=backend)[0],
            [x, normal(heads * width, 4, like=wide) / 2],
        ),
        "gated norm of heads": (
            list(_gated_rms_norm.backends),
            lambda *t, backend: gated_rms_norm(*t, backend=backend),
            [qkv[0], qkv[1], normal(width, like=wide)],
        ),
        "linear cross-entropy": (
            ["fla", "torch"],
            loss,
            [normal(batch * time, heads * width), normal(WORDS, heads * width) / (heads * width) ** 0.5],
        ),
    }


def measure(call: Call, tensors: list[Tensor], backend: str, backward: bool, seconds: float) -> float:
    """Milliseconds of one call: the median over at least 5 that together take about `seconds`."""
    leaves = [part.detach().clone().requires_grad_(backward) for part in tensors]

    def once() -> None:
        with torch.set_grad_enabled(backward):
            y = call(*leaves, backend=backend)
            if backward:
                torch.autograd.grad(y, leaves, torch.ones_like(y))

    for _ in range(3):
        once()
    times: list[float] = []
    while len(times) < 5 or sum(times) < 1e3 * seconds:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        once()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def time_one(call: Call, tensors: list[Tensor], backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds, and the most memory that a forward + backward held beyond its inputs, in MiB; or why there are none."""
    found: dict[str, Any] = {}
    try:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found["forward_backward_ms"] = measure(call, tensors, backend, True, options.seconds)
        found["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        found["forward_ms"] = measure(call, tensors, backend, False, options.seconds)
        if options.compile:
            torch.compiler.reset()
            compiled = torch.compile(call)
            found["compiled_forward_backward_ms"] = measure(compiled, tensors, backend, True, options.seconds)
    except Exception as error:  # whatever one kernel does, the others are still to be measured
        found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        torch.cuda.empty_cache()
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="B,T,H,D", default=SHAPES)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--operations", nargs="+", help="some of them only")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_kernels.json")
    options = parser.parse_args()
    try:
        options.shapes = [tuple(map(int, text.split(","))) for text in options.shapes]
        assert all(len(shape) == 4 for shape in options.shapes)
    except (ValueError, AssertionError):
        parser.error("--shapes: four integers B,T,H,D with commas between them")
    if not torch.cuda.is_available():
        parser.error("no CUDA device here; the CPU's kernels are measured by benchmarks/kernels.py")
    return options


def main() -> None:
    options = parse()
    packages = ("triton", "fla-core", "mamba-ssm", "causal-conv1d")
    versions = {name: ".".join(map(str, installed_version(name))) or None for name in packages}
    device = torch.cuda.get_device_name()
    data: dict[str, Any] = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    data |= {"versions": versions, "dtype": options.dtype, "results": []}
    print(f"{device}, torch {torch.__version__}, {versions}, {options.dtype}")
    for shape in options.shapes:
        for name, (backends, call, tensors) in operations(shape, getattr(torch, options.dtype)).items():
            if options.operations and name not in options.operations:
                continue
            print(f"\n{name}, B T H D = {list(shape)}")
            for backend in [backend for backend in backends if backend not in SKIPPED]:
                found = time_one(call, tensors, backend, options)
                data["results"].append({"operation": name, "shape": list(shape), "backend": backend, **found})
                figures = (f"{key} {value:.3f}" for key, value in found.items() if key != "error")
                print(f"  {backend:14s}", "  ".join(figures), found.get("error", ""), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
