"""Time of a split feed-forward network that reads only the experts in use, over the dense one.

The whole layer: router, selection and network, beside the dense layer (three products, or two),
in the same run, in rotated order. Every token has experts of its own: tokens and router are
random, and the router's threshold is set so that it selects the wanted share on average. Calls
rotate among copies of the layer, so that no weights in use are left in the L2 cache.
Shapes: T tokens, D features, E experts, m neurons of one.

    python -m benchmarks.split.decode            # one NVIDIA H200: bf16, in a CUDA graph
    python -m benchmarks.split.decode --pdl      # and beside it with early launches
    OMP_NUM_THREADS=2 taskset -c 0,1 python -m benchmarks.split.decode --cpu --seconds 60
    python -m benchmarks.split.decode --table    # the tables of the page

GPU and CPU parts are merged in the file of `--out`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lab import clocks
from benchmarks.lab.tables import insert, markdown
from sparsecraft.kernels import selection, split
from sparsecraft.kernels.split import SplitNet

HERE = Path(__file__).parent
# Name: D, F, m, gated, copies whose eighth is more than the L2 cache.
SHAPES = {
    "gated 4096x11008": (4096, 11008, 32, True, 6),
    "plain 4096x16384": (4096, 16384, 32, False, 6),
    "gated 576x1536": (576, 1536, 32, True, 192),
}
ROUTERS = ("linear, threshold", "norm predictor, relative", "linear, top_k")
SHARES = (1.0, 0.5, 0.25, 0.125)
PREDICTOR = 128  # hidden features of the norm predictor


# ------------------------------------------------------------------ layers
def random_net(D: int, width: int, m: int, gated: bool, dtype, device: str) -> SplitNet:
    def make(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) * 0.02).to(dtype)

    act = nn.SiLU() if gated else nn.GELU()
    E = width // m
    return SplitNet(make(E, 2 * m if gated else m, D), make(E, m, D), act)


def dense_of(net: SplitNet) -> Callable[[Tensor], Tensor]:
    """The same function as a Transformer's layer computes it, with weights of its own."""
    first = [p.flatten(0, 1).clone() for p in net.first_EMD.split(net.m, 1)]
    down = net.down_EHD.flatten(0, 1).t().contiguous()

    def dense(x: Tensor) -> Tensor:
        hidden = net.activation(F.linear(x, first[0]))
        return F.linear(hidden * F.linear(x, first[1]) if net.gated else hidden, down)

    return dense


class Router:
    """Scores and a rule; `set_share` finds the threshold on random tokens."""

    def __init__(self, kind: str, E: int, D: int, dtype, device: str):
        self.kind, self.E = kind, E
        self.norms = kind.startswith("norm")
        at = {"device": device}
        width = PREDICTOR if self.norms else D
        self.last_EW = (torch.randn(E, width, **at) * width**-0.5).to(dtype)
        self.first_WD = (torch.randn(width, D, **at) * D**-0.5).to(dtype) if self.norms else None
        self.rule = kind.split(", ")[1]
        self.k, self.threshold = 1, torch.tensor(0.0, **at)

    def scores(self, x: Tensor) -> Tensor:
        if self.norms:
            x = selection.score(x, self.first_WD, outcome="relu")
            return selection.score(x, self.last_EW, outcome="abs")
        outcome = "sigmoid" if self.rule == "threshold" else "none"
        return selection.score(x, self.last_EW, outcome=outcome)

    def set_share(self, share: float, tokens: Tensor) -> None:
        scores = self.scores(tokens)
        if self.rule == "relative":
            scores = scores / scores.max(-1, keepdim=True).values.clamp(min=1e-30)
        self.k = max(1, round(share * self.E))
        if share == 1.0:
            self.threshold.fill_(-1.0)
        else:
            self.threshold.copy_(scores.flatten().float().quantile(1 - share))

    def __call__(self, x: Tensor):
        return selection.select(self.scores(x), self.rule, self.k, self.threshold)


def sparse(net: SplitNet, router: Router, path: str = "gather") -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        if path == "masked, beside":
            return split.masked_beside(net, x, lambda: router(x)[0])
        weights_TE, used = router(x)
        if path == "masked":
            return split.masked(net, x, weights_TE)
        return split.gather(net, x, weights_TE, used)

    return run


def bytes_read(net: SplitNet, router: Router | None, used: float) -> float:
    """Weights of the experts in use and of the router; `used` is their share of all."""
    tensors = [] if router is None else [router.last_EW, router.first_WD]
    own = sum(t.nbytes for t in tensors if t is not None)
    return own + used * (net.first_EMD.nbytes + net.down_EHD.nbytes)


# ------------------------------------------------------------------ clocks
def captured(layers: list[Callable], inputs: list[Tensor]) -> Callable[[], object]:
    """One graph of a call of each layer."""

    def once():
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)

    return clocks.graph(once)


# ------------------------------------------------------------------ on a GPU
@torch.no_grad()
def measure_gpu(args) -> dict:
    rows = []
    for name in args.shapes:
        D, width, m, gated, copies = SHAPES[name]
        nets = [random_net(D, width, m, gated, torch.bfloat16, "cuda") for _ in range(copies)]
        denses = [dense_of(net) for net in nets]
        routers = {
            kind: [Router(kind, width // m, D, torch.bfloat16, "cuda") for _ in range(copies)]
            for kind in ROUTERS
        }
        check(nets[0], denses[0], routers, D)
        first = name == next(iter(SHAPES))
        for T in args.tokens or ((1, 2, 4, 8, 16) if first else (1, 16)):
            rows += time_tokens(args, name, T, nets, denses, routers)
            print(json.dumps(rows[-1]), flush=True)
        del nets, denses, routers
        torch.cuda.empty_cache()
    return {"copy_tb_per_s": clocks.copy_rate(), "rows": rows}


def time_tokens(args, name: str, T: int, nets, denses, routers) -> list[dict]:
    D, copies = nets[0].D, len(nets)
    inputs = [torch.randn(T, D, device="cuda").bfloat16() for _ in range(copies)]
    sample = torch.randn(1024, D, device="cuda").bfloat16()
    sides, facts = {"dense": captured(denses, inputs)}, {}
    thresholds = []  # a graph reads its own
    for kind, share in itertools.product(ROUTERS, args.shares):
        for router in routers[kind]:
            router.threshold = torch.zeros((), device="cuda")
            router.set_share(share, sample)
        thresholds.append([router.threshold for router in routers[kind]])
        chosen = [router(x)[0] for router, x in zip(routers[kind], inputs, strict=True)]
        union = statistics.mean((c > 0).any(0).float().mean().item() for c in chosen)
        own = statistics.mean(c.mean().item() for c in chosen)
        best = split.choose(nets[0], inputs[0], chosen[0])
        if best == "masked" and T > split.CUDA_GATHER_TOKENS:
            best = "masked, beside"  # as in every CUDA graph
        for path in paths_of(args, T, kind, share):
            layers = [sparse(n, r, path) for n, r in zip(nets, routers[kind], strict=True)]
            key = f"{kind}, {share}, {path}"
            usual = selection.EARLY_LAUNCH
            selection.EARLY_LAUNCH = usual or path == "gather, early"
            sides[key] = captured(layers, inputs)
            selection.EARLY_LAUNCH = usual
            read = bytes_read(nets[0], routers[kind][0], 1.0 if "masked" in path else union)
            facts[key] = {
                "router": kind, "share": share, "path": path, "own": own, "union": union,
                "bytes": read, "chosen": path == best,
            }  # fmt: skip
    facts["dense"] = {"path": "dense", "bytes": bytes_read(nets[0], None, 1.0)}
    number = 12 if copies < 20 else 3
    timed = lambda call: clocks.turn(call, number) / copies  # noqa: E731
    found = clocks.against_dense(clocks.rounds_of(sides, args.rounds, timed))
    rows = []
    for key, side in found.items():
        row = {"shape": name, "tokens": T, **facts[key], **side}
        row["gb_per_s"] = row.pop("bytes") / row["ms"] / 1e6
        rows.append(row)
    return rows


def paths_of(args, T: int, kind: str, share: float) -> list[str]:
    """`masked` costs the same for, but for noise, every share."""
    found = ["gather"]
    if args.pdl and T <= 4:
        found.append("gather, early")
    if T > split.CUDA_GATHER_TOKENS and share < 1:
        found.append("masked, beside")
    if kind == ROUTERS[0] and share == 0.5:
        found.append("masked")
    return found


def check(net: SplitNet, dense: Callable, routers: dict, D: int) -> None:
    """The timed functions are those that they are said to be."""
    for T in (1, 2, 4, 16):
        x = torch.randn(T, D, device="cuda").bfloat16()
        weights = torch.ones(T, net.E, device="cuda")
        pairs = [(split.gather(net, x, weights), dense(x))]
        for kind in ROUTERS:
            router = routers[kind][0]
            router.set_share(0.5, x)
            weights, used = router(x)
            pairs.append((split.gather(net, x, weights, used), split.masked(net, x, weights)))
        for got, want in pairs:
            error = ((got - want).float().norm() / want.float().norm()).item()
            if not error < 2e-2:
                raise SystemExit(f"The sparse layer differs from the dense one: {error}.")


# ------------------------------------------------------------------ on a CPU
@torch.no_grad()
def measure_cpu(args) -> dict:
    D, width, m, gated, _ = SHAPES[args.shapes[0]]
    rows = []
    cases = list(itertools.product((torch.float32, torch.bfloat16), args.tokens or (1, 16)))
    for dtype, T in cases:
        net = random_net(D, width, m, gated, dtype, "cpu")
        dense, x = dense_of(net), torch.randn(T, D).to(dtype)
        sides, paths = {"dense": lambda f=dense, x=x: f(x)}, {}
        for share in (0.5, 0.25):
            router = Router(ROUTERS[0], net.E, D, dtype, "cpu")
            router.set_share(share, torch.randn(64, D).to(dtype))
            paths[share] = split.choose(net, x, router(x)[0])
            for path in ("gather", "masked") if T == 1 else ("masked",):
                run = sparse(net, router, path)
                sides[f"{share}, {path}"] = lambda run=run, x=x: run(x)
        seconds = args.seconds / len(cases)
        found = clocks.against_dense(clocks.rounds_of(sides, args.rounds, host_turn, seconds))
        for key, side in found.items():
            share, _, path = key.partition(", ")
            row = {"dtype": str(dtype).removeprefix("torch."), "tokens": T, "side": key, **side}
            if path:
                row["chosen"] = paths[float(share)]
            rows.append(row)
        print(json.dumps(rows[-len(found) :]), flush=True)
    return {"threads": torch.get_num_threads(), "shape": args.shapes[0], "rows": rows}


def processor() -> str:
    """The name that Linux gives it, and on how many cores this may run."""
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {len(os.sched_getaffinity(0))} cores"


def host_turn(call: Callable) -> float:
    """The fastest of three: other programs share the cores."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


# ------------------------------------------------------------------ page
def tables(result: dict) -> str:
    out = []
    if gpu := result.get("gpu"):
        out.append(
            f"{gpu['machine']}, torch {gpu['torch']}, bf16: `{gpu['command']}`. A CUDA graph of a "
            "call of each copy, timed by events; the median of "
            f"{max(r['rounds'] for r in gpu['rows'])} rotated rounds. A copy moves "
            f"{gpu['copy_tb_per_s']:.2f} TB/s (read and written). A star marks the path that the "
            "library takes."
        )
        header = ["tokens", "router", "share", "experts read", "path", "us", "spread",
                  "dense / this", "GB/s"]  # fmt: skip
        for name in dict.fromkeys(row["shape"] for row in gpu["rows"]):
            rows = [row for row in gpu["rows"] if row["shape"] == name]
            out += [f"## {name}, experts of {SHAPES[name][2]}", markdown(header, [
                [r["tokens"], r.get("router"), f"{r['own']:.3f}" if "own" in r else None,
                 f"{r['union']:.3f}" if "union" in r else None,
                 r["path"] + " *" * r.get("chosen", False), f"{1e3 * r['ms']:.1f}",
                 f"{r['spread']:.0%}", f"{r['speedup']:.2f}x", f"{r['gb_per_s']:.0f}"]
                for r in rows
            ])]  # fmt: skip
    if cpu := result.get("cpu"):
        out += [f"## CPU, {cpu['threads']} threads, {cpu['shape']}", f"{cpu['machine']}, torch "
                f"{cpu['torch']}: `{cpu['command']}`. The fastest of three calls; the median of "
                f"{min(r['rounds'] for r in cpu['rows'])} rotated rounds at least.", markdown(
            ["dtype", "tokens", "share, path", "ms", "spread", "dense / this", "chosen path"],
            [[r["dtype"], r["tokens"], r["side"], f"{r['ms']:.2f}", f"{r['spread']:.0%}",
              f"{r['speedup']:.2f}x", r.get("chosen")] for r in cpu["rows"]],
        )]  # fmt: skip
    return "\n\n".join(out)


def options() -> list[str]:
    """Those that say what was measured; not where it was written."""
    given = sys.argv[1:]
    if "--out" in given:
        at = given.index("--out")
        del given[at : at + 2]
    return given


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--pdl", action="store_true", help="early launches beside the others")
    parser.add_argument("--table", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--shapes", nargs="+", default=tuple(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of the CPU's rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "decode.json")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    part = None
    if not args.table:
        part = measure_cpu(args) if args.cpu else measure_gpu(args)
    # Read after measuring: the two parts may be measured at the same time.
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    if part:
        part |= {"torch": torch.__version__, "seed": args.seed}
        part["command"] = " ".join(["python -m benchmarks.split.decode", *options()])
        part["machine"] = processor() if args.cpu else torch.cuda.get_device_name()
        result["cpu" if args.cpu else "gpu"] = part
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    page = args.out.with_suffix(".md")
    insert(page, tables(result))
    print(page.read_text())


if __name__ == "__main__":
    main()
