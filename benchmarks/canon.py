"""What a Canon layer costs on this machine, next to the cheapest thing a tensor can go through.

    python benchmarks/canon.py [--rounds 9] [--threads 2] [--shapes 8,512,1024 64,128,64] [--out FILE.json]

Times forward + backward of Canon (K = 4, residual) on float32 tensors [B, T, C] and divides by that of an elementwise
multiply-add of a tensor of the same shape, measured in the same run. Rounds visit every variant in turn, so that a busy
moment of the machine hits all of them; a variant's time is the median over rounds of its best call in a round.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.components.kernels import causal_conv  # noqa: E402

SHAPES = [(8, 512, 1024), (64, 128, 64), (16, 256, 128)]
CALLS = 8  # per variant and round, after two that are not timed
KERNEL = 4

Step = Callable[[], None]


def conv1d(x: Tensor, weight: Tensor) -> Tensor:
    """The usual way to write it: a depthwise Conv1d, padded and cut."""
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), padding=KERNEL - 1, groups=x.shape[2])
    return x + y[..., : x.shape[1]].transpose(1, 2)


def variants(shape: tuple[int, int, int]) -> dict[str, Step]:
    """Name -> one forward + backward. The first four are the yardsticks."""
    generator = torch.Generator().manual_seed(0)
    x, grad, factor, term = (torch.randn(shape, generator=generator) for _ in range(4))
    scale, shift = torch.randn(2, shape[2], generator=generator)
    weight = torch.randn(shape[2], KERNEL, generator=generator).requires_grad_()
    x.requires_grad_()
    forwards: dict[str, Callable[[], Tensor]] = {
        "x * a + b, a and b like x": lambda: x * factor + term,
        "addcmul(b, x, a), a and b like x": lambda: torch.addcmul(term, x, factor),
        "x * 0.5 + 1": lambda: x * 0.5 + 1.0,
        "addcmul(b, x, a), a and b per channel": lambda: torch.addcmul(shift, x, scale),
        "canon, cpu": lambda: causal_conv(x, weight, backend="cpu")[0],
        "canon, torch twin": lambda: causal_conv(x, weight, backend="torch")[0],
        "canon, F.conv1d": lambda: conv1d(x, weight),
    }

    def step(forward: Callable[[], Tensor]) -> Step:
        def run() -> None:
            x.grad = weight.grad = None
            forward().backward(grad)

        return run

    return {name: step(forward) for name, forward in forwards.items()}


def measure(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Milliseconds per call."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            calls = []
            for _ in range(CALLS + 2):
                start = time.perf_counter()
                step()
                calls.append(time.perf_counter() - start)
            times[name].append(1e3 * min(calls[2:]))
    return {name: statistics.median(values) for name, values in times.items()}


def report(shape: tuple[int, int, int], rounds: int) -> dict[str, object]:
    """Measure one shape, print its table, return it as plain data."""
    times = measure(variants(shape), rounds)
    yardsticks = [name for name in times if not name.startswith("canon")]
    cheapest = min(yardsticks, key=times.__getitem__)
    canon = times["canon, cpu"]
    print(f"\n[B, T, C] = {list(shape)}" + " " * 24 + "ms   canon (cpu) / this")
    for name, value in times.items():
        print(f"  {name:40s} {value:8.3f}   {canon / value:6.2f}{'   <- cheapest' if name == cheapest else ''}")
    return {
        "shape": list(shape),
        "ms": times,
        "canon_over": {name: canon / times[name] for name in yardsticks},
        "cheapest": cheapest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", nargs="+", metavar="B,T,C", default=[",".join(map(str, s)) for s in SHAPES])
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = []
    for text in options.shapes:
        try:
            batch, length, channels = map(int, text.split(","))
        except ValueError:
            parser.error(f"--shapes {text}: three integers B,T,C with commas between them")
        shapes.append((batch, length, channels))
    print(f"torch {torch.__version__}, {options.threads} thread(s), forward + backward, float32, K = {KERNEL}")
    results = [report(shape, options.rounds) for shape in shapes]
    if options.out:
        data = {"torch": torch.__version__, "threads": options.threads, "rounds": options.rounds, "results": results}
        options.out.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
