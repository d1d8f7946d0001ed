"""What waiting threads do to a small model: training steps per second on an idle machine, and beside a busy neighbour.

    python benchmarks/threads.py --out benchmarks/results/threads.json

Each row is a process of its own, because OMP_WAIT_POLICY is read once. The neighbour is one process that computes without pause.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def spin() -> None:
    while True:
        pass


def steps_per_second(seconds: float) -> float:
    """Median over windows of five steps of the quickstart's model."""
    sys.path.insert(0, str(ROOT))
    from src.build import build_model  # first: sets the policy

    import torch  # isort: skip

    net = build_model(["position=nope", "canon.positions=ABCD", "model.vocab_size=21"])
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    ids = torch.randint(21, (64, 63))
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates) < 4:
        started = time.perf_counter()
        for _ in range(5):
            net(ids).logsumexp(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        rates.append(5 / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(steps_per_second(options.seconds))
        return
    result: dict = {"command": " ".join(["python", *sys.argv]), "cpus": os.cpu_count(), "steps_per_second": {}}
    for neighbours in (0, 1):
        for policy in ("ACTIVE", "PASSIVE"):
            burners = [multiprocessing.Process(target=spin, daemon=True) for _ in range(neighbours)]
            for burner in burners:
                burner.start()
            command = [sys.executable, __file__, "--worker", "--seconds", str(options.seconds)]
            done = subprocess.run(
                command, env=os.environ | {"OMP_WAIT_POLICY": policy}, capture_output=True, text=True, check=True
            )
            for burner in burners:
                burner.terminate()
            name = f"{policy.lower()}, {neighbours} neighbour(s)"
            result["steps_per_second"][name] = round(float(done.stdout), 2)
            print(f"{name:24} {float(done.stdout):8.2f} steps/s", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
