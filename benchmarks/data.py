"""How fast the synthetic tasks make their data, next to plain Python that does the same (tests/naive).

    python benchmarks/data.py [--rounds 7] [--only Depo1 Lano] [--out benchmarks/results/data.json]

Times the training windows of every task, masks and packing included, and those of its naive twin, on one core. Rounds visit every task in
turn, a piece of the twin's work and a piece of ours side by side, so that a busy moment of the machine hits both; the ratio is the median
over rounds. Last, how many strings a second Lano finds the exact next-token distributions of. Ends with status 1 if a demand is missed.
"""

import argparse
import importlib
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

for library in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
    os.environ[f"{library}_NUM_THREADS"] = "1"

import numba  # noqa: E402
import numpy as np  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.datamodules.tasks import Brevo, Capo, Depo, Lano, Mano, Task  # noqa: E402

# Name, its task, tokens in a window, how many times as fast as its twin it must be. Hardest settings and windows are the paper's.
CASES: list[tuple[str, Callable[[], Task], int, float]] = [
    ("Depo1 N=375", lambda: Depo(N=375), 2048, 100),
    ("Depo2 N=125", lambda: Depo(N=125, K=16, mini_vocab=3, word_length=(5, 7)), 2048, 25),
    ("Brevo1 N=110", lambda: Brevo(N=110), 1024, 30),
    ("Brevo2 N=50", lambda: Brevo(N=50, multi_token=True), 1536, 15),
    ("Mano L=10", lambda: Mano(L=10), 1024, 30),
    ("Lano cfg3k", lambda: Lano(grammar="cfg3k"), 1536, 20),
    ("Capo 50k", lambda: Capo(num_people=50_000, exposures=100), 512, 20),
]
DISTRIBUTIONS = "Lano cfg3k distributions"
STRINGS_PER_SECOND = 100.0
SECONDS = 0.2  # of every piece of work
BATCH = 128  # windows asked for at a time


def rate(work: Callable[[], int]) -> float:
    """Units of work per second, of calls that last ``SECONDS`` together."""
    units, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < SECONDS:
        units += work()
    return units / elapsed


@dataclass
class Case:
    """A task and its twin."""

    name: str
    task: Task
    window: int
    demanded: float
    naive: list[float] = field(default_factory=list)  # tokens per second, by round
    ours: list[float] = field(default_factory=list)
    first: int = 0

    def __post_init__(self) -> None:
        self.twin: Any = importlib.import_module(f"tests.naive.{self.task.name}")
        self.rng = random.Random(0)
        whole = self.task.num_windows("train", self.window)
        self.last = sys.maxsize if whole is None else whole
        self.work_of_ours()  # compiles, and builds what is built once
        self.work_of_twin()

    def work_of_ours(self) -> int:
        """Makes the next batch; returns its size in tokens."""
        self.task.windows(0, "train", self.first, BATCH, self.window)
        self.first += BATCH
        if self.first + BATCH > self.last:
            self.first = 0
        return BATCH * self.window

    def work_of_twin(self) -> int:
        """Makes a few windows; returns their size in tokens."""
        tokens, _, _ = self.twin.windows(self.task, self.rng, 4, self.window)
        return sum(map(len, tokens))

    def round(self) -> None:
        """Measures both, side by side."""
        self.naive.append(rate(self.work_of_twin))
        self.ours.append(rate(self.work_of_ours))

    def report(self) -> dict[str, Any]:
        """Prints a row of the table; returns it as plain data."""
        ratios = [ours / naive for ours, naive in zip(self.ours, self.naive, strict=True)]
        ratio = statistics.median(ratios)
        result = {
            "task": self.name,
            "window": self.window,
            "naive_tokens_per_second": round(statistics.median(self.naive)),
            "tokens_per_second": round(statistics.median(self.ours)),
            "ratio": round(ratio, 1),
            "ratio_by_round": [round(r, 1) for r in ratios],
            "demanded": self.demanded,
            "passed": ratio >= self.demanded,
        }
        millions = statistics.median(self.naive) / 1e6, statistics.median(self.ours) / 1e6
        print(f"{self.name:14s} {self.window:6d} {millions[0]:10.3f} {millions[1]:10.2f}", end=" ")
        print(f"{ratio:8.1f} {self.demanded:8.0f}   {'pass' if result['passed'] else 'FAIL'}")
        return result


@dataclass
class Distributions:
    """Lano's exact next-token distributions, a string at a time."""

    task: Lano
    rates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.strings = [self.task.example(0, "test", index)[0] for index in range(64)]
        self.next = 0
        self.work()

    def work(self) -> int:
        """One string."""
        self.task.next_token_distribution(self.strings[self.next])
        self.next = (self.next + 1) % len(self.strings)
        return 1

    def round(self) -> None:
        """Measures."""
        self.rates.append(rate(self.work))

    def report(self) -> dict[str, Any]:
        """Prints the figure; returns it as plain data."""
        median = statistics.median(self.rates)
        passed = median >= STRINGS_PER_SECOND
        print(
            f"\n{DISTRIBUTIONS}: {median:.0f} strings/s, demanded {STRINGS_PER_SECOND:.0f}   {'pass' if passed else 'FAIL'}"
        )
        tokens = sum(map(len, self.strings)) / len(self.strings)
        return {
            "task": DISTRIBUTIONS,
            "mean_tokens": round(tokens, 1),
            "strings_per_second": round(median, 1),
            "demanded": STRINGS_PER_SECOND,
            "passed": passed,
        }


def machine() -> dict[str, Any]:
    """What was measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {"python": platform.python_version(), "numpy": np.__version__, "numba": numba.__version__}
    return {"cpu": models[0] if models else platform.processor(), "cpus": os.cpu_count()} | versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="beginnings of names of cases")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    names = [name for name, *_ in CASES] + [DISTRIBUTIONS]
    wanted = [name for name in names if not options.only or name.startswith(tuple(options.only))]
    if not wanted or options.rounds < 1:
        parser.error(f"--only: choose beginnings of {', '.join(names)}; --rounds: at least 1")

    cases: list[Case | Distributions] = [
        Case(name, build(), window, demanded) for name, build, window, demanded in CASES if name in wanted
    ]
    if DISTRIBUTIONS in wanted:
        cases.append(Distributions(Lano(grammar="cfg3k")))
    for _ in range(options.rounds):
        for case in cases:
            case.round()
    print(
        f"{'task':14s} {'window':>6s} {'twin':>10s} {'ours':>10s} {'ratio':>8s} {'demanded':>8s}   (million tokens/s, one core)"
    )
    results = [case.report() for case in cases]
    if options.out:
        command = "python benchmarks/data.py " + " ".join(sys.argv[1:])
        data = {"command": command, "machine": machine(), "rounds": options.rounds, "results": results}
        options.out.write_text(json.dumps(data, indent=2) + "\n")
    sys.exit(0 if all(result["passed"] for result in results) else 1)


if __name__ == "__main__":
    main()
