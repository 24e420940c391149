"""Time and memory of full experts over transformers' grouped_mm, and over SonicMoE where it can be
imported (and only there; it needs a Hopper GPU).

Forward and backward of whole layers, router included, in bfloat16, in turns. For few tokens the
forward pass alone, captured in a CUDA graph, beside the bytes of the experts in use at the rate at
which this card copies.

    python -m benchmarks.layer.full            # one NVIDIA H200
    python -m benchmarks.layer.full --table
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import sparsecraft as sc
from benchmarks.lab import clocks
from benchmarks.lab.tables import f, markdown, measure_and_write

HERE = Path(__file__).parent
# Name -> width, hidden width, experts, experts of a token.
SHAPES = {
    "Mixtral": (4096, 14336, 8, 2),
    "fine": (2048, 1024, 64, 8),
    "finer": (2048, 768, 128, 8),
    "tiny": (64, 64, 4, 2),
}
FEW, MANY = (1, 16), (256, 2048, 8192, 32768)
OURS, PEER, SONIC = "ours", "grouped_mm", "SonicMoE"


def sides_of(args, shape: str) -> dict[str, nn.Module]:
    """The same layer of everybody, by name."""
    width, hidden, experts, k = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=8, vocab_size=64,
    )  # fmt: skip
    with torch.device(args.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    sc.convert(model, sc.recipes.upcycling(experts, k), certify=False)
    peer = MixtralConfig(
        hidden_size=width, intermediate_size=hidden, num_local_experts=experts,
        num_experts_per_tok=k,
    )  # fmt: skip
    peer._experts_implementation = "grouped_mm"
    with torch.device(args.device):
        found = {OURS: model.model.layers[0].mlp, PEER: MixtralSparseMoeBlock(peer)}
    for layer in found.values():
        layer.to(torch.bfloat16).requires_grad_(True).train()
        for parameter in layer.parameters():
            nn.init.normal_(parameter.data, std=0.02)
    sonic = _sonic(width, hidden, experts, k)
    return found | ({SONIC: sonic.to(args.device, torch.bfloat16)} if sonic else {})


def _sonic(width: int, hidden: int, experts: int, k: int) -> nn.Module | None:
    try:
        import sonicmoe
        from sonicmoe.enums import ActivationType
    except ImportError:
        return None
    return sonicmoe.MoE(experts, k, width, hidden, ActivationType.SWIGLU, False, 0.02)


# ------------------------------------------------------------------ calls
def call(name: str, layer: nn.Module, x: Tensor, backward: bool) -> Callable[[], object]:
    def forward(x: Tensor) -> Tensor:
        found = layer(x.flatten(0, 1) if name == SONIC else x)
        return (found[0] if isinstance(found, tuple) else found).view(x.shape)

    return clocks.one_pass(forward, layer, x, backward)


# ------------------------------------------------------------------ measurements
def measure(args) -> dict:
    cuda = args.device == "cuda"
    rate, rows = clocks.copy_rate() if cuda else None, []
    for shape in args.shapes:
        sides = sides_of(args, shape)
        width, hidden, experts, k = SHAPES[shape]
        for tokens in (*FEW, *MANY) if cuda else (2, 8):
            x = torch.randn(1, tokens, width, device=args.device, dtype=torch.bfloat16)
            row = {"shape": shape, "tokens": tokens, "backward": tokens not in FEW}
            calls = {n: call(n, layer, x, row["backward"]) for n, layer in sides.items()}
            if cuda and not row["backward"]:
                calls = {n: clocks.graph(calls[n]) for n in (OURS, PEER)}
                read = 2 * 3 * width * hidden * min(experts, tokens * k)
                row["bytes_ms"] = read / rate / 1e9
            turns = clocks.in_turns(args, calls)
            row["ms"] = {n: statistics.median(turn[n] for turn in turns) for n in calls}
            if cuda:
                row["GiB"] = {n: clocks.peak_beyond(c, "cuda") / 2**30 for n, c in calls.items()}
            print(row, flush=True)
            rows.append(row)
        del sides, calls
    return clocks.about(args.device) | {"rows": rows}


def tables(results: dict) -> str:
    header = ["layer", "tokens", "pass", "ours, ms", "over grouped_mm", "over SonicMoE"]
    header += ["over bytes", "GiB", "grouped_mm", "SonicMoE"]
    lines = []
    for row in results["rows"]:
        ms, memory = row["ms"], row.get("GiB", {})
        over = [f(ms[OURS] / ms[side], 3) if side in ms else None for side in (PEER, SONIC)]
        direct = "bytes_ms" in row and f(ms[OURS] / row["bytes_ms"], 2)
        kind = "forward + backward" if row["backward"] else "forward, graph"
        taken = [f(memory.get(side), 2) for side in (OURS, PEER, SONIC)]
        lines.append(
            [row["shape"], f"{row['tokens']:,}", kind, f"{ms[OURS]:.3f}", *over, direct or None]
            + (taken if row["backward"] else [None] * 3)
        )
    machine = f"{results['machine']}, torch {results['torch']}"
    return f"{machine}.\n\n{markdown(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["Mixtral", "fine", "finer"])
    parser.add_argument("--turn", type=float, default=0.1, help="seconds of a side's turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--out", type=Path, default=HERE / "full.json")
    measure_and_write(parser.parse_args(), measure, tables)


if __name__ == "__main__":
    main()
