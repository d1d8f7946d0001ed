"""What a report over many runs costs: seconds and peak memory of reading all of them and writing the page.

    python benchmarks/report.py --runs 2000 10000 --out benchmarks/results/report.json

The runs are made up, and as large as real ones: a whole configuration, run.json, results.json and some hundred rows of metrics.
``outside``: none belongs to a sweep; ``sweeps``: all are jobs of sweeps with four variants, three learning rates and three seeds.
Each report is written by a process of its own, so that its peak is its own.
"""

import argparse
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = 400  # of metrics.csv: 300 of training, 100 of validation
VARIANTS = ("NoPE", "NoPE + Canon", "RoPE", "RoPE + Canon")
RATES, SEEDS = (5e-4, 1e-3, 2e-3), (1, 2, 3)
CELLS = 48  # tasks and settings of one sweep

# What the measured process does: the command itself, and what it took.
MEASURED = """
import resource, sys, time
folder = sys.argv[1]
sys.argv = ["report", f"paths.log_dir={folder}", f"output={folder}/report", f"hydra.run.dir={folder}/hydra"]
started = time.perf_counter()
import src.report
imported = time.perf_counter()
src.report.entrypoint("report", src.report.report)
ended = time.perf_counter()
unit = 1 if sys.platform == "darwin" else 1024
page = __import__("os").stat(f"{folder}/report/index.html").st_size
print(imported - started, ended - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, page)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[2000])
    parser.add_argument("--kinds", nargs="+", default=["outside", "sweeps"], choices=["outside", "sweeps"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {"command": " ".join(["python", *sys.argv]), "cpus": os.cpu_count(), "reports": []}
    for runs in options.runs:
        for kind in options.kinds:
            with tempfile.TemporaryDirectory() as folder:
                make(Path(folder), runs, kind)
                row = {"runs": runs, "kind": kind} | measured(Path(folder))
            print(row, flush=True)
            result["reports"].append(row)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def measured(folder: Path) -> dict[str, float]:
    """Of one report, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    imports, seconds, peak, page = map(float, done.stdout.split()[-4:])
    return {
        "seconds": round(seconds, 1),
        "of_which_imports": round(imports, 1),
        "peak_megabytes": round(peak / 1e6),
        "page_megabytes": round(page / 1e6, 1),
    }


def make(folder: Path, runs: int, kind: str) -> None:
    """Writes the runs, and the manifests of their sweeps."""
    config = configuration()
    of_one = CELLS * len(VARIANTS) * len(RATES) * len(SEEDS)
    if kind == "outside":
        for number in range(runs):
            make_run(folder / "runs" / f"{number:06d}", f"{number:012x}", 1 + number % 3, 1e-3, 0.7, config)
        return
    for number, first in enumerate(range(0, runs, of_one)):
        make_sweep(folder, f"results/R{number + 1}", min(of_one, runs - first), config)


def configuration() -> str:
    """A resolved configuration as a run writes it, with a place for the seed and one for the learning rate."""
    code = (
        "from omegaconf import OmegaConf; from src.build import compose_config; from src.config import to_plain\n"
        "c = to_plain(compose_config(['experiment=smoke/lano', 'seed=123456789', 'optimizer.lr=0.123456789', "
        "'paths.output_dir=here', 'compare=null']))\n"
        "c.pop('compare'); print(OmegaConf.to_yaml(OmegaConf.create(c)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.replace("0.123456789", "@rate").replace("123456789", "@seed")


def make_sweep(folder: Path, name: str, runs: int, config: str) -> None:
    """A manifest, and the runs of its jobs; rows of four variants, each with all learning rates and seeds."""
    tasks = [f"task {number}" for number in range(12)]
    jobs = []
    for number in range(runs):
        seed = SEEDS[number // (runs // len(SEEDS) + 1)]
        place = number % (runs // len(SEEDS) + 1)
        rate, place = RATES[place % len(RATES)], place // len(RATES)
        variant, cell = VARIANTS[place % len(VARIANTS)], place // len(VARIANTS)
        task, size = tasks[cell % len(tasks)], f"{8 + cell // len(tasks)}L512D"
        word = hashlib.sha256(f"{name} {number}".encode()).hexdigest()[:12]
        score = 0.3 + 0.15 * VARIANTS.index(variant) + 0.02 * seed
        make_run(folder / "jobs" / word, word, seed, rate, score, config)
        settings = {"seed,data.seed": seed, "size": size, "optimizer.lr": rate}
        overrides = f"experiment=smoke/lano compare=null size={size} seed={seed} data.seed={seed} optimizer.lr={rate}"
        jobs.append(
            {"name": word, "task": task, "variant": variant, "settings": settings, "seed": seed, "learning_rate": rate}
            | {"folder": f"{'../' * (name.count('/') + 3)}jobs/{word}", "command": f"python src/train.py {overrides}"}
        )
    manifest = {"name": name, "scale": "paper", "title": "A sweep", "note": None, "source": None, "variants": VARIANTS}
    manifest |= {"metrics": dict.fromkeys(tasks, "test/accuracy"), "selections": dict.fromkeys(tasks, "val/accuracy")}
    manifest |= {"axes": {"optimizer.lr": RATES, "seed,data.seed": SEEDS}, "match": None, "published": {}}
    manifest |= {"expect": [{"better": VARIANTS[-1], "than": VARIANTS[0], "by": 0.1, "task": None}], "jobs": jobs}
    path = folder / "sweeps" / name / "paper" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(manifest | {"command": f"python src/sweep.py sweep={name} scale=paper"}, indent=2))


def make_run(folder: Path, word: str, seed: int, rate: float, score: float, config: str) -> None:
    """What a run leaves behind, but for its checkpoints."""
    (folder / "csv").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.replace("@seed", str(seed)).replace("@rate", f"{rate:.6f}"))
    packages = {"torch": "2.13.0", "lightning": "2.6.1", "hydra-core": "1.3.8", "numpy": "2.3.0", "numba": "0.62"}
    record = {
        "status": "finished",
        "config_hash": word,
        "command": ["train.py", "experiment=smoke/lano", "compare=null", f"seed={seed}", f"optimizer.lr={rate}"],
        "resumed_from": None,
        "started": "2026-11-27T22:41:25.930+00:00",
        "ended": "2026-11-27T22:51:25.930+00:00",
        "seconds": 600.0,
        "exit_status": 0,
        "error": None,
        "host": "elsewhere",
        "pid": 1,
        "git": {"commit": "304ade544c8504bc5056c465a2329a6355beaff6", "branch": "main", "dirty": False, "changed": []},
        "environment": {"python": "3.12.1", "processor": "x86_64", "cpus": 2, "threads": 1, "packages": packages},
        "earlier": [],
    }
    (folder / "run.json").write_text(json.dumps(record, indent=2))
    score += 0.01 * random.Random(word).random()
    names = ("loss", "token_accuracy", "accuracy", "accuracy/hop1", "accuracy/hop2", "accuracy/hop4", "accuracy/hop8")
    metrics = {f"{split}/{name}": score for split in ("val", "test") for name in names}
    shares = {name: {"low": 0.9 * score, "high": 1.1 * score, "total": 512} for name in metrics if "acc" in name}
    results = {
        "name": "lano",
        "config_hash": word,
        "data": {"task": "lano", "grammar": "cfg3f", "seed": 42},
        "parameters": 104_000,
        "flops_per_token": 208_000,
        "state_size": 24_448,
        "backends": {"causal_conv": "numba", "attention": "torch"},
        "steps": 3000,
        "tokens": 2_048_000,
        "training_flops": 1.3e12,
        "tokens_per_second": 21_400.0,
        "mfu": None,
        "data_wait": 0.01,
        "peak_memory_bytes": 1.2e9,
        "seconds": 600.0,
        "torch": "2.13.0",
        "metrics": metrics,
        "intervals": shares,
        "chance": {"accuracy": 0.2} | {f"accuracy/hop{hop}": 0.2 for hop in (1, 2, 4, 8)},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    lines = ["data_wait,epoch,step,tokens_per_second,train/grad_norm,train/loss,train/lr,val/accuracy,val/loss"]
    for step in range(9, 3000, 3000 * 4 // (3 * ROWS)):
        done = 1 / (1 + math.exp(-(step - 1200) / 300))
        lines.append(f"0.01,0,{step},21400.5,0.731234567,{3 - 2.5 * done},0.00123456789,,")
        if step % 30 == 29:
            lines.append(f",0,{step},,,,,{done * score},{3 - 2.5 * done}")
    (folder / "csv" / "metrics.csv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s in all")
