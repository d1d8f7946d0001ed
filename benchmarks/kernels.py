"""What the chunked recurrences cost on this machine, next to the same recurrences step by step.

    python benchmarks/kernels.py [--rounds 7] [--threads 2 1] [--out FILE.json]

Three tables, all float32 on the CPU. (1) Forward + backward at B = 4, T = 512, H = 4, K = V = 64. Rounds visit every
variant in turn, so that a busy moment of the machine hits all of them; a variant's time is the median over rounds of its
best call in a round. (2) Bytes kept for the backward pass at T, 2 T, 4 T. (3) One token with a state, as in decoding.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import src  # noqa: E402, F401, I001  (before torch: sets how its threads wait, as in training)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from src.components.kernels.gated_delta_rule import gated_delta_rule  # noqa: E402
from src.components.kernels.gla import gla  # noqa: E402
from src.components.kernels.recurrence import recurrent_state  # noqa: E402
from src.components.kernels.ssd import ssd  # noqa: E402

HEADS, WIDTH = 4, 64
CALLS = {"torch": 5, "recurrent": 2}  # per round, after one that is not timed
Step = Callable[[], object]


def operations(batch: int, length: int) -> dict[str, tuple[Callable, list[Tensor]]]:
    """Name -> function and its inputs, decays as the mixers make them."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = (randn(batch, length, HEADS, WIDTH) for _ in range(3))
    gate, step = randn(batch, length, HEADS, WIDTH), F.softplus(randn(batch, length, HEADS) - 3)
    A = -torch.linspace(1, 16, HEADS)
    B, C = (randn(batch, length, 1, WIDTH) for _ in range(2))
    rows = {
        "gla": (gla, [q, k, v, F.logsigmoid(gate) / 16]),
        "gla, decays to exp(-60)": (gla, [q, k, v, -60 * gate.sigmoid()]),
        "gated_delta_rule": (gated_delta_rule, [q, k, v, step * A, randn(batch, length, HEADS).sigmoid()]),
        "ssd, 1 group": (ssd, [v, step, A, B, C]),
        "ssd, 4 groups": (ssd, [v, step, A, k, q]),
    }
    return {name: (run, [x.detach().clone().requires_grad_() for x in inputs]) for name, (run, inputs) in rows.items()}


def training_steps(batch: int, length: int) -> dict[tuple[str, str], Step]:
    """(Operation, backend) -> one forward + backward."""
    grad = torch.randn(batch, length, HEADS, WIDTH, generator=torch.Generator().manual_seed(1))

    def step(run: Callable, inputs: list[Tensor], backend: str) -> None:
        torch.autograd.grad(run(*inputs, backend=backend)[0], inputs, grad)

    rows = operations(batch, length)
    return {(name, backend): partial(step, *row, backend) for name, row in rows.items() for backend in CALLS}


def milliseconds(steps: dict[tuple[str, str], Step], rounds: int) -> dict[str, dict[str, float]]:
    """Operation -> backend -> milliseconds per call."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            calls = []
            for _ in range(CALLS[key[1]] + 1):
                start = time.perf_counter()
                step()
                calls.append(time.perf_counter() - start)
            times[key].append(1e3 * min(calls[1:]))
    result: dict[str, dict[str, float]] = {}
    for (name, backend), values in times.items():
        result.setdefault(name, {})[backend] = round(statistics.median(values), 2)
    return result


def kept_bytes(run: Callable, inputs: list[Tensor], backend: str) -> int:
    """Memory that the forward pass leaves behind for the backward pass, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _alive = run(*inputs, backend=backend)
    return sum(storages.values())


def decoding(rounds: int) -> dict[str, dict[str, float]]:
    """Operation -> batch size -> microseconds for one token."""
    result: dict[str, dict[str, float]] = {}
    for batch in (1, 16):
        for name, (run, inputs) in operations(batch, 1).items():
            if name in ("gla, decays to exp(-60)", "ssd, 4 groups"):
                continue
            state, times = recurrent_state(batch, HEADS, WIDTH, WIDTH), []
            with torch.inference_mode():
                for _ in range(rounds):
                    calls = []
                    for _ in range(200):
                        start = time.perf_counter()
                        _, state = run(*inputs, state=state)
                        calls.append(time.perf_counter() - start)
                    times.append(1e6 * statistics.median(calls))
            result.setdefault(name, {})[f"batch {batch}"] = round(statistics.median(times), 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    data: dict = {
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "load_before": round(os.getloadavg()[0], 1),
        "ms_forward_backward": {},
    }
    for threads in options.threads:
        torch.set_num_threads(threads)
        rows = milliseconds(training_steps(4, 512), options.rounds)
        data["ms_forward_backward"][f"{threads} thread(s)"] = rows
        print(f"\nforward + backward, ms, {threads} thread(s)      chunked   step by step   ratio", flush=True)
        for name, row in rows.items():
            row["ratio"] = round(row["recurrent"] / row["torch"], 1)
            print(f"  {name:40s} {row['torch']:8.1f} {row['recurrent']:12.1f} {row['ratio']:9.1f}")
    lengths = (512, 1024, 2048)
    print(f"\nMiB kept for the backward pass, B = 1, T = {', '.join(map(str, lengths))}; step by step at T = 512")
    data["bytes_for_backward"] = {}
    for name, row in operations(1, 512).items():
        kept = {str(length): kept_bytes(*operations(1, length)[name], "torch") for length in lengths}
        data["bytes_for_backward"][name] = kept | {"512, step by step": kept_bytes(*row, "recurrent")}
        print(f"  {name:40s} " + " ".join(f"{x / 2**20:8.1f}" for x in data["bytes_for_backward"][name].values()))
    data["us_one_token"] = decoding(options.rounds)
    print("\none token with a state, us")
    for name, row in data["us_one_token"].items():
        print(f"  {name:40s} " + "   ".join(f"{key} {value:8.1f}" for key, value in row.items()))
    data["load_after"] = round(os.getloadavg()[0], 1)
    if options.out:
        options.out.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
