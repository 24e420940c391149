"""How the time of a layer grows with its experts, tokens, width of adapters and budget.

Forward and backward of a layer in bfloat16 (of a split network forward alone), over the dense
network that it stands for or beside, in the same turns; and what the layer's active parameters are
of the dense network's: the growth that computing alone would give.

    python -m benchmarks.layer.growth            # one NVIDIA H200
    python -m benchmarks.layer.growth --table
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparsecraft as sc
from benchmarks.lab import clocks
from benchmarks.lab.tables import f, markdown, measure_and_write
from sparsecraft import recipes

HERE = Path(__file__).parent
TOKENS, CHOSEN, WIDTH = 8192, 8, 512
PLAIN = "dense"


@dataclass(frozen=True, slots=True)
class Point:
    """One setting.

    Attributes:
        value: of what grows.
        hidden: neurons of the dense network, or of each copy of it.
        share: of a split network's experts that run.
    """

    growth: str
    value: float
    recipe: sc.Recipe
    hidden: int
    tokens: int = TOKENS
    share: float | None = None


def points(args) -> list[Point]:
    few, most = (8, 16), (args.tokens,)
    experts = few if args.tiny else (8, 16, 32, 64, 128)
    tokens = most if args.tiny else (1, 16, 128, 1024, 8192, 32768)
    widths = (16, 32) if args.tiny else (64, 128, 256, 512, 1024)
    shares = (0.25, 1.0) if args.tiny else (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
    small, large, n = args.width // 2, args.width * 11 // 4, args.tokens
    fine = recipes.upcycling
    return [
        *(Point("experts", e, fine(e, min(e, CHOSEN)), small, n) for e in experts),
        *(Point("tokens, full experts", t, fine(64, CHOSEN), small, t) for t in tokens),
        *(Point("tokens, adapters", t, _adapters(WIDTH), large, t) for t in tokens),
        *(Point("width of adapters", w, _adapters(w), large, n) for w in widths),
        *(Point("budget, a token", s, _split(args), large, 1, s) for s in shares),
        *(Point("budget, many tokens", s, _split(args), large, n, s) for s in shares),
    ]


def _adapters(width: int) -> sc.Recipe:
    return recipes.camelidae(num_experts=8, adapter_dim=width, lora_rank=0)


def _split(args) -> sc.Recipe:
    return recipes.gmoefication(num_experts=8 if args.tiny else 32)


# ------------------------------------------------------------------ measurements
def layer_of(args, point: Point) -> tuple[nn.Module, nn.Module, float]:
    """The layer, the dense network, and the active parameters of the one over the other's."""
    config = LlamaConfig(
        hidden_size=args.width, intermediate_size=point.hidden, num_hidden_layers=1,
        num_attention_heads=8, vocab_size=64, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device(args.device):
        model, plain = (LlamaForCausalLM(config).to(torch.bfloat16) for _ in range(2))
    before = sc.count(model).active
    network = sum(p.numel() for p in plain.model.layers[0].mlp.parameters())
    sc.convert(model, point.recipe, certify=False)
    if point.share is not None:
        model.eval().requires_grad_(False)
        sc.set_budget(model, point.share)
    added = sc.count(model).active - before
    return model.model.layers[0].mlp, plain.model.layers[0].mlp, 1 + added / network


def measure(args) -> dict:
    return clocks.about(args.device) | {"points": [one(args, point) for point in points(args)]}


def one(args, point: Point) -> dict:
    layer, plain, active = layer_of(args, point)
    calls = {name: call(args, point, module) for name, module in (("ours", layer), (PLAIN, plain))}
    rows = clocks.in_turns(args, calls)
    row = {"growth": point.growth, "value": point.value, "active": active}
    row["ms"] = statistics.median(row["ours"] for row in rows)
    row["over"] = statistics.median(row["ours"] / row[PLAIN] for row in rows)
    print(row, flush=True)
    return row


def call(args, point: Point, layer: nn.Module) -> Callable[[], object]:
    backward = point.share is None  # a split network that leaves parts out has no gradient
    x = torch.randn(1, point.tokens, args.width, device=args.device, dtype=torch.bfloat16)
    found = clocks.one_pass(layer, layer, x, backward)
    if not backward and args.device == "cuda" and point.tokens == 1:
        return clocks.graph(found)
    return found


# ------------------------------------------------------------------ page
def tables(plotted: Path, results: dict) -> str:
    rows = [
        [p["growth"], f"{p['value']:g}", f"{p['ms']:.3f}", f(p["over"], 2), f(p["active"], 2)]
        for p in results["points"]
    ]
    header = ["what grows", "to", "ms", "of the dense network", "active parameters of it"]
    plot(results["points"], plotted)
    machine = f"{results['machine']}, torch {results['torch']}"
    return f"{machine}.\n\n{markdown(header, rows)}\n\n![growth]({plotted.name})"


def plot(found: list[dict], path: Path) -> None:
    """Time over the dense network's against what grows, beside the active parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(p["growth"] for p in found))
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for axis, name in zip(axes.flat, names, strict=True):
        ours = [p for p in found if p["growth"] == name]
        values = [p["value"] for p in ours]
        axis.plot(values, [p["over"] for p in ours], "o-", label="time")
        axis.plot(values, [p["active"] for p in ours], "s--", label="active parameters")
        axis.set(title=name, xlabel=name.partition(",")[0], ylabel="of the dense network", ylim=0)
        if not name.startswith("budget"):
            axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--turn", type=float, default=0.1, help="seconds of a side's turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="few points, to try it")
    parser.add_argument("--table", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--out", type=Path, default=HERE / "growth.json")
    args = parser.parse_args()
    measure_and_write(args, measure, partial(tables, args.out.with_suffix(".svg")))


if __name__ == "__main__":
    main()
