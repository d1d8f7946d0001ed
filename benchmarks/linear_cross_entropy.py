"""What it saves to compute head and loss together, without ever holding all logits.

    python benchmarks/linear_cross_entropy.py [--rounds 3] [--threads 1] [--shapes 4096,512,32000 ...] [--out FILE.json]

Times forward + backward of `linear_cross_entropy` on float32 features [N, D] and a head [V, D]: backend `full`, which is the
plain way, and `torch`. Rounds visit both in turn; a time is the median over rounds. Peak memory is what a process of its own
takes on top of the tensors that both need (features, head, and their gradients); read from /proc, so on Linux only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.components.kernels.linear_cross_entropy import linear_cross_entropy  # noqa: E402

SHAPES = ["4096,512,32000", "8192,256,10000", "16384,128,4096"]
BACKENDS = ("full", "torch")


def step(shape: tuple[int, int, int], backend: str) -> Callable[[], None]:
    """One forward + backward, whose gradients are thrown away."""
    targets, width, words = shape
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(targets, width, generator=generator).requires_grad_()
    weight = torch.randn(words, width, generator=generator).mul_(width**-0.5).requires_grad_()
    labels = torch.randint(words, (targets,), generator=generator)

    def run() -> None:
        h.grad, weight.grad = torch.zeros_like(h), torch.zeros_like(weight)
        (linear_cross_entropy(h, weight, labels, backend=backend).loss / targets).backward()

    return run


def peak(shape: str, backend: str, threads: int) -> float:
    """MiB that one step adds to a fresh process."""
    call = [sys.executable, __file__, "--shapes", shape, "--threads", str(threads), "--peak-of", backend]
    return float(subprocess.run(call, check=True, capture_output=True, text=True).stdout)


def print_peak(shape: tuple[int, int, int], backend: str) -> None:
    run = step(shape, backend)
    torch.zeros(shape[0] + shape[2], shape[1]).add_(1)  # the gradients, which every way needs
    before = high_water()
    run()
    print(high_water() - before)


def high_water() -> float:
    """MiB that this process has held at most. (getrusage would begin with the parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def measure(shape: str, rounds: int, threads: int) -> dict[str, object]:
    """Measures one shape, prints its table, returns it as plain data."""
    sizes = parsed(shape)
    steps = {backend: step(sizes, backend) for backend in BACKENDS}
    times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(rounds):
        for backend, run in steps.items():
            start = time.perf_counter()
            run()
            times[backend].append(time.perf_counter() - start)
    seconds = {backend: statistics.median(values) for backend, values in times.items()}
    mib = {backend: peak(shape, backend, threads) for backend in BACKENDS}
    print(f"\n[N, D, V] = {list(sizes)}" + " " * 8 + "seconds   peak MiB")
    for backend in BACKENDS:
        print(f"  {backend:28s} {seconds[backend]:8.3f}   {mib[backend]:8.0f}")
    speed, memory = (values["full"] / values["torch"] for values in (seconds, mib))
    print(f"  {'full / torch':28s} {speed:8.2f}   {memory:8.2f}")
    return {"shape": sizes, "seconds": seconds, "peak_mib": mib, "full_over_torch": {"time": speed, "memory": memory}}


def parsed(shape: str) -> tuple[int, int, int]:
    targets, width, words = map(int, shape.split(","))
    return targets, width, words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", nargs="+", metavar="N,D,V", default=SHAPES)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--peak-of", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print_peak(parsed(options.shapes[0]), options.peak_of)
        return
    print(f"torch {torch.__version__}, {options.threads} thread(s), forward + backward, float32")
    results = [measure(shape, options.rounds, options.threads) for shape in options.shapes]
    if options.out:
        data = {"torch": torch.__version__, "threads": options.threads, "rounds": options.rounds, "results": results}
        options.out.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
