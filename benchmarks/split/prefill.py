"""Time of a split feed-forward network on many tokens: the dense layer, all of it under a mask, and
only the pairs of a token and an expert in use, in grouped products.

Router and selection included; eager, as a prompt is read. Shapes: T tokens, E experts of m neurons.

    python -m benchmarks.split.prefill            # one NVIDIA GPU, bf16
    python -m benchmarks.split.prefill --table    # the tables of the page
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.lab import clocks
from benchmarks.lab.tables import insert, markdown
from benchmarks.split.decode import Router, dense_of, random_net
from sparsecraft.kernels import split

HERE = Path(__file__).parent
D, WIDTH = 4096, 11008
NEURONS = (32, 128, 1376, 2752)
SHARES = (0.25, 0.5, 0.75)
TOKENS = (64, 256, 1024, 4096)


@torch.no_grad()
def measure(args) -> list[dict]:
    rows = []
    for m in args.neurons:
        net = random_net(D, WIDTH, m, True, torch.bfloat16, "cuda")
        dense, router = dense_of(net), Router("linear, top_k", net.E, D, torch.bfloat16, "cuda")
        for T in args.tokens:
            x = torch.randn(T, D, device="cuda").bfloat16()
            sides = {"dense": lambda x=x, f=dense: f(x)}
            for share in SHARES:
                router.set_share(share, x)
                sides |= both(net, router, x, share)
            rounds = clocks.rounds_of(sides, args.rounds, lambda call: clocks.turn(call, 10))
            found = clocks.against_dense(rounds)
            for key, side in found.items():
                share, _, path = key.partition(", ")
                facts = {"neurons": m, "experts": net.E, "tokens": T, "path": path or "dense"}
                rows.append(facts | {"share": float(share) if path else None, **side})
            print(json.dumps(rows[-len(found) :]), flush=True)
        del net, dense
        torch.cuda.empty_cache()
    return rows


def both(net, router: Router, x, share: float) -> dict:
    """The two paths at one share, checked to be one function."""
    k = router.k

    def weights(x):
        router.k = k
        return router(x)[0]

    ways = {path: getattr(split, path) for path in ("masked", "grouped")}
    got = {path: way(net, x, weights(x)).float() for path, way in ways.items()}
    error = (got["grouped"] - got["masked"]).norm() / got["masked"].norm()
    if not error < 2e-2:
        raise SystemExit(f"The paths differ by {error.item()} at {len(x)} tokens.")
    return {f"{share}, {p}": lambda way=way: way(net, x, weights(x)) for p, way in ways.items()}


def tables(result: dict) -> str:
    rows = result["rows"]
    said = (
        f"{result['machine']}, torch {result['torch']}, bf16, width {D}, {WIDTH} neurons, gated: "
        f"`{result['command']}`. Medians of {max(r['rounds'] for r in rows)} rotated rounds, over "
        "the dense layer."
    )
    ways = [f"{path} at {share}" for share in SHARES for path in ("masked", "grouped")]
    header = ["experts", "neurons of each", "tokens", "dense, us", *ways]
    lines = []
    for m, T in dict.fromkeys((r["neurons"], r["tokens"]) for r in rows):
        mine = [r for r in rows if (r["neurons"], r["tokens"]) == (m, T)]
        dense = next(r for r in mine if r["path"] == "dense")
        cells = {(r["share"], r["path"]): f"{r['speedup']:.2f}x" for r in mine}
        lines.append([dense["experts"], m, T, f"{1e3 * dense['ms']:.0f}",
                      *(cells[s, p] for s in SHARES for p in ("masked", "grouped"))])  # fmt: skip
    return f"{said}\n\n{markdown(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--neurons", type=int, nargs="+", default=NEURONS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "prefill.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    if not args.table:
        result = {"rows": measure(args), "torch": torch.__version__,
                  "machine": torch.cuda.get_device_name(),
                  "command": "python -m benchmarks.split.prefill"}  # fmt: skip
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    insert(args.out.with_suffix(".md"), tables(json.loads(args.out.read_text())))


if __name__ == "__main__":
    sys.exit(main())
