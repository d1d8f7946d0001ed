"""What a 1.3B model costs on a GPU: ``python benchmarks/gpu_scale.py``; writes benchmarks/results/gpu_scale.json.

LlamaCanon and GDN2Canon, bf16, compiled blocks, with and without activation checkpointing: tokens per second, model FLOPs utilisation
and memory of whole training steps (forward, backward, clipping, AdamW), the first of which are left out.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from src.build import build_model
from src.callbacks.throughput import peak_flops
from src.components.backbone import Backbone
from src.components.kernels.registry import forget_backends, used_backends
from src.modules.losses import NextTokenLoss

FAMILIES = {"LlamaCanon": "family=llama_canon", "GDN2Canon": "family=gdn2_canon"}


def measure(net: Backbone, rows: int, window: int, steps: int, warm_up: int) -> dict[str, Any]:
    """Median seconds of a step, and what follows from it."""
    device = next(net.parameters()).device
    loss, optimizer = NextTokenLoss(), torch.optim.AdamW(net.parameters(), lr=1e-4, fused=device.type == "cuda")
    ids = torch.randint(net.vocab_size, (rows, window + 1), device=device)
    targets, every = ids[:, 1:].reshape(-1), torch.ones(rows, window, dtype=torch.bool, device=device)
    seconds = []
    for step in range(warm_up + steps):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            if loss.is_fused(targets.numel(), net.vocab_size, device):
                total, _ = net(ids[:, :-1], select=every, head=lambda h, w: loss.of_features(h, w, targets=targets))
            else:
                total = loss(net(ids[:, :-1], select=every), targets)[0].sum()
        (total / targets.numel()).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if step >= warm_up:
            seconds.append(time.perf_counter() - started)
    rate = rows * window / statistics.median(seconds)
    peak = peak_flops(device)
    return {
        "tokens_per_second": rate,
        "mfu": None if peak is None else 3 * net.flops_per_token(window) * rate / peak,
        "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "seconds_a_step": statistics.median(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1B")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    name = torch.cuda.get_device_name() if given.device == "cuda" else given.device
    found = []
    for family, override in FAMILIES.items():
        for recompute in ("none", "selective", "block"):
            forget_backends()
            net = build_model([override, f"size={given.size}"], device=given.device).train()
            if recompute != "none":
                net.recompute_blocks(recompute)
            if not given.eager:
                net.compile_blocks()
            row: dict[str, Any] = {"model": family, "parameters": net.count_parameters(), "recompute": recompute}
            row |= {"compiled": not given.eager, "rows": given.rows, "window": given.window, "device": name}
            try:
                row |= measure(net, given.rows, given.window, given.steps, given.warm_up) | {"kernels": used_backends()}
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            print(json.dumps(row), flush=True)
            found.append(row)
            del net
            if given.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    path = Path(__file__).parent / "results" / "gpu_scale.json"
    path.write_text(
        json.dumps({"command": " ".join(["python", *sys.argv]), "torch": torch.__version__, "rows": found}, indent=2)
        + "\n"
    )


if __name__ == "__main__":
    main()
