"""Time of the kernels of a split network with other constants than those of `split_triton`.

    python -m benchmarks.split.tune up2 down2 --out found.json    # all if none is named

One NVIDIA H200, bf16, in a CUDA graph, as decode.py times it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import torch

from benchmarks.lab import clocks
from benchmarks.split.decode import SHAPES, captured, random_net
from sparsecraft.kernels.selection import active
from sparsecraft.kernels.split_triton import gather


def grid(**options: tuple) -> list[dict]:
    values = itertools.product(*options.values())
    return [dict(zip(options, row, strict=True)) for row in values]


# Which kernel, for how many tokens (padded).
TUNED = {
    "up1": grid(BN=(4, 8), BD=(512,), STAGES=(1,), num_warps=(4,)),
    "up2": grid(BN=(8,), BD=(256,), STAGES=(1, 3, 4), num_warps=(4,))
    + grid(BN=(4, 8), BD=(512,), STAGES=(1,), num_warps=(4, 8)),
    "up4": grid(BN=(4,), BD=(256,), STAGES=(1, 3, 4), num_warps=(4,))
    + grid(BN=(8,), BD=(256,), STAGES=(1, 3), num_warps=(8,))
    + grid(BN=(8,), BD=(128,), STAGES=(1,), num_warps=(4,)),
    "up16": grid(BN=(32,), BD=(128,), num_warps=(4, 8), num_stages=(3, 4, 5)),
    "down1": grid(BR=(32,), BD=(128,), PER_SM=(3, 4, 5, 6), num_warps=(4,)),
    "down2": grid(BR=(16, 32), BD=(128,), PER_SM=(2, 4), num_warps=(4,))
    + grid(BR=(16,), BD=(128,), PER_SM=(6,), num_warps=(4,)),
    "down4": grid(BR=(16,), BD=(128,), PER_SM=(2, 3, 4), num_warps=(4,))
    + grid(BR=(32,), BD=(128,), PER_SM=(2,), num_warps=(4, 8))
    + grid(BR=(16,), BD=(64,), PER_SM=(4, 6), num_warps=(4,)),
    "down16": grid(BR=(64,), BD=(128, 256), PER_SM=(1, 2), num_warps=(4, 8), num_stages=(3,)),
}
CASES = {1: [(1, 0.5), (1, 0.25)], 2: [(2, 0.5), (2, 0.25)], 4: [(4, 0.5), (4, 0.125)]}
CASES[16] = [(16, 1.0), (8, 0.25)]


@torch.no_grad()
def tune(names: list[str]) -> dict[str, list]:
    """Microseconds of both kernels at the first shape, for tokens that each use a share of the
    experts; the other kernel keeps its constants."""
    D, width, m, gated, copies = next(iter(SHAPES.values()))
    nets = [random_net(D, width, m, gated, torch.bfloat16, "cuda") for _ in range(copies)]
    found: dict[str, list] = {}
    begun = time.perf_counter()
    for name in names:
        side, tokens = name.rstrip("0123456789"), int(name.lstrip("updown"))
        inputs, used = [], []
        for T, share in CASES[tokens]:
            weights = [(torch.rand(T, width // m, device="cuda") < share).float() for _ in nets]
            inputs.append(([torch.randn(T, D, device="cuda").bfloat16() for _ in nets], weights))
            used.append([active(w) for w in weights])
        for config in [None, *TUNED[name]]:
            chosen = {} if config is None else {side: config}
            times = []
            for (xs, weights), lists in zip(inputs, used, strict=True):
                layers = [
                    lambda x, n=n, w=w, u=u, c=chosen: gather(n, x, w, u, c)
                    for n, w, u in zip(nets, weights, lists, strict=True)
                ]
                try:
                    times.append(1e3 * clocks.turn(captured(layers, xs), 10) / copies)
                except Exception as error:  # too much shared memory for this card, say
                    times.append(float("inf"))
                    print(name, config, f"{type(error).__name__}: {error}"[:200], flush=True)
            found.setdefault(name, []).append([config or "as it is", *times])
        found[name].sort(key=lambda row: row[1] + row[2])
        print(f"{name}: us of both at {CASES[tokens]}, {time.perf_counter() - begun:.0f} s")
        for config, *times in found[name][:6]:
            print("   ", config, [round(t, 1) for t in times], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help=", ".join(TUNED))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    found = tune(args.names or list(TUNED))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
