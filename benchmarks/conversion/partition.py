"""Time and inertia of balanced k-means, beside the k-means-constrained package on small cases.

Rows are scaled to unit length, so inertia is at most the number of neurons; every side gets the
same rows. The peer runs with MoEfication's arguments (k-means++ starts, the best of `n_init`).

    python -m benchmarks.conversion.partition                # CPU, and CUDA where there is one
    python -m benchmarks.conversion.partition --gpu-only     # adds CUDA to the figures of the CPU
    python -m benchmarks.conversion.partition --only 14336   # measures these cases again
    python -m benchmarks.conversion.partition --table        # the tables of the page

Shapes: F neurons, D features, E experts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.lab.tables import markdown, measure_and_write
from sparsecraft.moe.init.balanced import balanced_kmeans, inertia
from sparsecraft.moe.init.partition import random_partition

HERE = Path(__file__).parent
LARGE = "drawn, F=14336 D=4096 E=448"
CASES = {
    "drawn, F=1536 D=576 E=48": (1536, 576, 48),
    "SmolLM2-135M gate of layer 10, F=1536 D=576 E=48": (1536, 576, 48),
    "drawn, F=3072 D=768 E=96": (3072, 768, 96),
    LARGE: (14336, 4096, 448),
}
OURS = {"sparsecraft": {}, "sparsecraft, plain iterations": {"plain": True}}


def rows(name: str, seed: int) -> Tensor:
    """Drawn rows are noise, one of 2E centers and a strong part in 8 dimensions."""
    F, D, E = CASES[name]
    if name.startswith("SmolLM2"):
        from safetensors import safe_open

        from sparsecraft.dense import hub

        with safe_open(Path(hub.resolve("smollm2")) / "model.safetensors", "pt") as weights:
            rows_FD = weights.get_tensor("model.layers.10.mlp.gate_proj.weight").float()
    else:
        torch.manual_seed(seed)
        centers = torch.randn(2 * E, D)[torch.randint(0, 2 * E, (F,))]
        rows_FD = torch.randn(F, D) + centers + torch.randn(F, 8) @ torch.randn(8, D) / 2**0.5
    return functional.normalize(rows_FD, dim=1)


def timed(function: Callable, device: str) -> tuple[float, Tensor]:
    start = time.perf_counter()
    found = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def ours(args, name: str, rows_FD: Tensor, device: str) -> list[dict]:
    """Every variant on the seeds; on a GPU after one call that loads its kernels."""
    E = CASES[name][2]
    rows_FD = rows_FD.to(device)
    if device == "cuda":
        balanced_kmeans(rows_FD, E, iterations=2)
    found = []
    for label, options in OURS.items():
        runs = []
        for seed in range(1 if name == LARGE and device == "cpu" else args.seeds):
            call = lambda s=seed, o=options: balanced_kmeans(rows_FD, E, seed=s, **o)  # noqa: E731
            seconds, neurons_EM = timed(call, device)
            runs.append((seconds, inertia(rows_FD, neurons_EM)))
        found.append(summary(label, runs))
        print(device, name, found[-1], flush=True)
    return found


def summary(label: str, runs: list[tuple[float, float]]) -> dict:
    seconds, values = zip(*runs, strict=True)
    return {
        "side": label,
        "runs": len(runs),
        "load": round(os.getloadavg()[0], 1),  # other work on the machine stretches seconds
        "seconds_median": statistics.median(seconds),
        "inertia_median": statistics.median(values),
        "inertia_min": min(values),
        "inertia_max": max(values),
    }


def peer(args, name: str, rows_FD: Tensor) -> list[dict]:
    from k_means_constrained import KMeansConstrained

    F, _, E = CASES[name]
    found = []
    for starts in (1, 10) if F < 2000 else (1,):  # ten starts take a minute at F=3072
        runs = []
        for seed in range(args.seeds if starts == 1 else 1):
            model = KMeansConstrained(
                E, size_min=F // E, size_max=F // E, random_state=seed, n_init=starts
            )
            seconds, _ = timed(lambda m=model: m.fit(rows_FD.numpy()), "cpu")
            runs.append((seconds, float(model.inertia_)))
        found.append(summary(f"k-means-constrained, n_init={starts}", runs))
        print(name, found[-1], flush=True)
    return found


def chance(name: str, rows_FD: Tensor) -> dict:
    F, _, E = CASES[name]
    return summary("random partition", [(0.0, inertia(rows_FD, random_partition(F, E)))])


def measure(args) -> dict:
    kept = HERE / "partition.json"
    partial = args.gpu_only or args.only
    result = json.loads(kept.read_text()) if partial and kept.exists() else {}
    devices = ["cuda"] if args.gpu_only else ["cpu", *["cuda"] * torch.cuda.is_available()]
    for device in devices:
        cores = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
        machine = cores if device == "cpu" else torch.cuda.get_device_name()
        cases = result.get(device, {}).get("cases", {})
        for name in CASES:
            if args.only not in name or (args.gpu_only and name.startswith("SmolLM2")):
                continue  # that model's wheel is not on every machine
            rows_FD = rows(name, seed=0)
            cases[name] = ours(args, name, rows_FD, device)
            if device == "cpu":
                cases[name].append(chance(name, rows_FD))
                if name != LARGE:
                    cases[name] += peer(args, name, rows_FD)
        result[device] = {"machine": machine, "torch": torch.__version__, "cases": cases}
    return result


def tables(result: dict) -> str:
    header = ["", "runs", "load", "seconds", "inertia: median", "min", "max"]
    out = []
    for at in result.values():
        out.append(f"## {at['machine']}, torch {at['torch']}")
        for name, sides in at["cases"].items():
            numbers = ("inertia_median", "inertia_min", "inertia_max")
            lines = [
                [
                    s["side"],
                    s["runs"],
                    s.get("load"),
                    f"{s['seconds_median']:.2f}" if s["seconds_median"] else None,
                ]
                + [f"{s[n]:.1f}" for n in numbers]
                for s in sides
            ]
            out += [f"### {name}", markdown(header, lines)]
    return "\n\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3, help="one only for the large case on a CPU")
    parser.add_argument("--gpu-only", action="store_true", help="CUDA, beside kept CPU figures")
    parser.add_argument("--only", default="", help="cases with this in their name; keeps the rest")
    parser.add_argument("--table", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--out", type=Path, default=HERE / "partition.json")
    measure_and_write(parser.parse_args(), measure, tables)


if __name__ == "__main__":
    main()
