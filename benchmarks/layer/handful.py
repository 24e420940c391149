"""What a decoding step is made of, in microseconds of a captured graph: products of one input over
cuBLAS, attention to a static cache over torch's, experts over the bytes of those in use at the rate
at which this card copies. Matrices are other ones at every call, as in a model's layers.

    python -m benchmarks.layer.handful            # one NVIDIA H200
    python -m benchmarks.layer.handful --table
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lab import clocks
from benchmarks.lab.tables import f, markdown, measure_and_write
from sparsecraft.kernels import few
from sparsecraft.kernels.attend import attend
from sparsecraft.kernels.products import products
from sparsecraft.kernels.two_layer import TwoLayer

HERE = Path(__file__).parent
TOKENS = (1, 4, 16)
BEYOND_CACHE = 3e8  # bytes of the copies that take turns, more than a card's cache holds
# Width, and rows of each matrix.
LINEARS = {
    "1.1B q, k, v": (2048, (2048, 256, 256)),
    "1.1B o": (2048, (2048,)),
    "1.1B gate, up": (2048, (5632, 5632)),
    "1.1B down": (5632, (2048,)),
    "7B q, k, v": (4096, (4096, 4096, 4096)),
    "7B o": (4096, (4096,)),
    "7B gate, up": (4096, (11008, 11008)),
    "7B down": (11008, (4096,)),
    "LoRAs of q, k, v": (2048, (64, 64, 64)),
    "head": (2048, (32000,)),
    "tiny": (64, (64, 32)),
}
# Sequences, heads, heads of keys, width, positions, of which are shown.
CACHES = {
    "1.1B": (1, 32, 4, 64, 512, 300),
    "1.1B, 16 sequences": (16, 32, 4, 64, 512, 300),
    "7B": (1, 32, 32, 128, 512, 300),
    "7B, 16 sequences": (16, 32, 32, 128, 512, 300),
    "1.1B, 2,048 positions": (1, 32, 4, 64, 2048, 1500),
    "1.1B, 8,192 positions": (1, 32, 4, 64, 8192, 8000),
    "tiny": (2, 4, 2, 16, 70, 40),
}
# Width, hidden width, experts, experts of a token, gated.
EXPERTS = {
    "adapters, 1.1B": (2048, 512, 8, 2, False),
    "adapters, 7B": (4096, 512, 8, 2, False),
    "4 networks, 1.1B": (2048, 5632, 4, 2, True),
    "Mixtral": (4096, 14336, 8, 2, True),
    "fine": (2048, 1024, 64, 8, True),
    "finer": (2048, 768, 128, 8, True),
    "tiny": (64, 32, 4, 2, True),
}


# ------------------------------------------------------------------ calls
def drawn(args, *shape: int) -> Tensor:
    return 0.02 * torch.randn(shape, device=args.device, dtype=torch.bfloat16)


def of_linears(args, name: str, tokens: int) -> tuple[dict[str, list[Callable]], int]:
    """Side -> its calls, which take turns; the bytes that one reads."""
    width, rows = LINEARS[name]
    size = 2 * width * sum(rows)
    x = drawn(args, tokens, width)
    found = [[drawn(args, n, width) for n in rows] for _ in range(copies(args, size))]
    ours = [lambda w=w: products(x, w, [False] * len(w)) for w in found]
    return {"ours": ours, "cuBLAS": [lambda w=w: [F.linear(x, m) for m in w] for w in found]}, size


def of_attention(args, name: str) -> tuple[dict[str, list[Callable]], int]:
    B, H, N, D, L, shown = CACHES[name]
    q, size = drawn(args, B, H, 1, D), 4 * B * N * shown * D
    mask = (torch.arange(L, device=args.device) < shown).expand(B, 1, 1, L)

    def torchs(k: Tensor, v: Tensor) -> Tensor:  # as transformers' models call it
        k, v = (t[:, :, None].expand(B, N, H // N, L, D).reshape(B, H, L, D) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    found = [[drawn(args, B, N, L, D) for _ in "kv"] for _ in range(copies(args, size))]
    ours = [lambda kv=kv: attend(q, *kv, mask, None) for kv in found]
    return {"ours": ours, "torch": [lambda kv=kv: torchs(*kv) for kv in found]}, size


def of_experts(args, name: str, tokens: int) -> tuple[dict[str, list[Callable]], int]:
    width, hidden, E, K, gated = EXPERTS[name]
    act, x = nn.SiLU(), drawn(args, tokens, width)

    def activate(h: Tensor) -> Tensor:
        return act(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1] if gated else act(h)

    each = 2 * (3 if gated else 2) * width * hidden
    nets = [
        TwoLayer(
            drawn(args, E, hidden * (1 + gated), width), drawn(args, E, width, hidden), activate,
            activation=act, residual=not gated,
        )
        for _ in range(copies(args, each * E))
    ]  # fmt: skip
    torch.manual_seed(0)
    chosen = torch.stack([torch.randperm(E, device=args.device)[:K] for _ in range(tokens)])
    weights = torch.rand(tokens, K, device=args.device)
    ours = [lambda net=net: few.networks(net, x, weights, chosen, False) for net in nets]
    return {"ours": ours}, each * len(chosen.unique())


def copies(args, size: int) -> int:
    return max(1, min(16, int(BEYOND_CACHE // size))) if args.device == "cuda" else 1


# ------------------------------------------------------------------ measurements
def measure(args) -> dict:
    cuda = args.device == "cuda"
    rate, rows = clocks.copy_rate() if cuda else None, []
    names = (["tiny"],) * 3 if args.tiny else (LINEARS, CACHES, EXPERTS)
    linears, caches, experts = ([n for n in table if args.tiny or n != "tiny"] for table in names)
    tasks = [("products", n, t, of_linears) for n in linears for t in TOKENS]
    tasks += [("attention", n, None, of_attention) for n in caches]
    tasks += [("experts", n, t, of_experts) for n in experts for t in TOKENS if cuda]
    for what, name, tokens, calls_of in tasks:
        calls, size = calls_of(args, name, tokens) if tokens else calls_of(args, name)
        row = {"what": what, "case": name, "tokens": tokens}
        row["us"] = {side: microseconds(args, each) for side, each in calls.items()}
        row["bytes_us"] = size / rate / 1e6 if rate else None
        print(row, flush=True)
        rows.append(row)
        del calls
    return clocks.about(args.device) | {"rows": rows}


def microseconds(args, calls: list[Callable]) -> float:
    """Median of one call."""

    def all_of_them() -> None:
        for call in calls:
            call()

    with torch.no_grad():
        graph = clocks.graph(all_of_them) if args.device == "cuda" else all_of_them
        times = clocks.block_times([graph], 30, args.device)
    return 1e3 * statistics.median(times[10:]) / len(calls)


def tables(results: dict) -> str:
    header = ["what", "case", "tokens", "ours, us", "cuBLAS or torch", "over it", "over bytes"]
    lines = []
    for row in results["rows"]:
        ours, *peer = row["us"].values()
        over = [f(peer[0], 1), f(ours / peer[0], 2)] if peer else [None, None]
        least = row["bytes_us"] and f(ours / row["bytes_us"], 2)
        lines.append([row["what"], row["case"], row["tokens"], f(ours, 1), *over, least])
    machine = f"{results['machine']}, torch {results['torch']}"
    return f"{machine}.\n\n{markdown(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="few small cases, to try it")
    parser.add_argument("--table", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--out", type=Path, default=HERE / "handful.json")
    measure_and_write(parser.parse_args(), measure, tables)


if __name__ == "__main__":
    main()
