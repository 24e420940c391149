"""Time and memory of MoE++'s experts, and of MPOE's, over plain experts of the same code.

Plain are copies of the feed-forward network, with as many feed-forward experts; all sides take the
same tokens, two experts for each, drawn by the loads that they are meant to have: even for plain
experts, tau times as many for a feed-forward expert as for a zero-computation one. A side is a bank
with its routing given; a layer adds its router. Of MPOE whole training steps are timed too.

    python -m benchmarks.layer.moepp                      # one NVIDIA H200: d 4096, f 14336, 8 + 4
    python -m benchmarks.layer.moepp --what mpoe          # MPOE at SmolLM2's shape
    python -m benchmarks.layer.moepp --table [--what mpoe]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparsecraft as sc
from benchmarks.lab import clocks
from benchmarks.lab.tables import markdown, measure_and_write
from sparsecraft import recipes
from sparsecraft.moe.batch import Batch
from sparsecraft.moe.routing import Routing
from sparsecraft.surgery.build import build_parts
from sparsecraft.surgery.plan import plan

HERE = Path(__file__).parent
TAUS = (1.0, 0.75, 0.5, 0.25, 0.1)
MEMORY = {"whole step": "MiB in all"}
SHAPES = {"moepp": (4096, 14336), "mpoe": (576, 1536)}


# ------------------------------------------------------------------ sides
def parts(args, recipe) -> tuple[nn.Module, nn.Module]:
    """The experts and the router of the second layer of a small Llama of this shape."""
    config = LlamaConfig(
        hidden_size=args.width, intermediate_size=args.hidden, num_hidden_layers=2, vocab_size=64,
        num_attention_heads=8, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device(args.device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    experts, router = build_parts(model, plan(model, recipe)[1], number=1)
    return experts.train(), router.train()


def routing_of(experts: nn.Module, args) -> Routing:
    """Two experts for each token, drawn by the loads that experts are meant to have."""
    E = experts.num_experts
    load = getattr(experts, "load", None) or (1 / E,) * E
    shares_TE = torch.tensor(load, device=args.device).expand(args.tokens, E)
    indices_TK = shares_TE.multinomial(2)
    weights_TK = torch.full(indices_TK.shape, 0.5, device=args.device)
    return Routing(weights_TK, indices_TK, torch.zeros_like(shares_TE), sums_to_one=True)


def recipes_of(args) -> dict[str, sc.Recipe]:
    plain = {"plain": recipes.upcycling(args.experts, 2)}
    if args.what == "mpoe":
        return plain | {"mpoe": recipes.mpoe(args.experts, 2)}
    others = {"num_experts": args.experts, "constant": 2, "hold_steps": 0}
    return plain | {f"tau {tau:g}": recipes.moepp(tau=tau, **others) for tau in TAUS}


# ------------------------------------------------------------------ calls
def bank_call(args, experts: nn.Module, backward: bool) -> Callable[[], object]:
    x_TD = torch.randn(args.tokens, args.width, device=args.device, dtype=torch.bfloat16)
    routing = routing_of(experts, args)
    return clocks.one_pass(lambda x: experts(x, routing), experts, x_TD, backward)


def router_call(args, router: nn.Module) -> Callable[[], object]:
    """A forward pass of the router behind another, with its capacity where it has one."""
    x_TD = torch.randn(args.tokens, args.width, device=args.device, dtype=torch.bfloat16)
    E = router.scorer(x_TD[:1]).shape[-1]
    before_TE = torch.randn(args.tokens, E, device=args.device)
    batch = Batch(logits={router.previous: (before_TE, False)})

    def call() -> Routing:
        with torch.no_grad():
            routing = router(x_TD, batch)
            return router.limited(routing, None, False) if router.spec.limited else routing

    return call


def step_call(args, recipe) -> tuple[Callable[[], object], int]:
    """A step of AdamW on a whole model of SmolLM2's shape that trains in mixed precision, and the
    bytes of what stays between steps."""
    config = LlamaConfig(
        hidden_size=args.width, intermediate_size=args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    sc.convert(model, recipe, certify=False)
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = torch.randint(0, config.vocab_size, (args.tokens // 512, 512), device=args.device)

    def call() -> None:
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    call()
    held = [*model.parameters()]
    held += [t for state in optimizer.state.values() for t in state.values()]
    return call, sum(t.nbytes for t in held)


# ------------------------------------------------------------------ measurements
def timed(args, calls: dict[str, Callable]) -> dict[str, dict[str, float]]:
    """Median milliseconds of each side, and the median over rounds of plain over it."""
    rows = clocks.in_turns(args, calls)
    return {
        name: {
            "ms": statistics.median(row[name] for row in rows),
            "speedup": statistics.median(row["plain"] / row[name] for row in rows),
        }
        for name in calls
    }


def measure(args) -> dict:
    torch.manual_seed(args.seed)
    width, hidden = SHAPES[args.what]
    args.width, args.hidden = args.width or width, args.hidden or hidden
    sides = {name: parts(args, recipe) for name, recipe in recipes_of(args).items()}
    rows = {}
    for name, backward in {"forward": False, "forward + backward": True}.items():
        calls = {n: bank_call(args, experts, backward) for n, (experts, _) in sides.items()}
        rows[name] = timed(args, calls)
        if backward and args.device == "cuda":
            for n, call in calls.items():
                rows[name][n]["MiB"] = clocks.peak_beyond(call, args.device) / 2**20
        print(name, rows[name], flush=True)
    rows["router"] = timed(args, {n: router_call(args, router) for n, (_, router) in sides.items()})
    if args.what == "mpoe":
        steps = {n: step_call(args, recipe) for n, recipe in recipes_of(args).items()}
        rows["whole step"] = timed(args, {n: call for n, (call, _) in steps.items()})
        for n, (call, held) in steps.items() if args.device == "cuda" else ():
            rows["whole step"][n]["MiB"] = (held + clocks.peak_beyond(call, args.device)) / 2**20
    networks = {
        n: (routing_of(experts, args).indices_TK < args.experts).float().mean().item()
        for n, (experts, _) in sides.items()
    }
    shape = {k: getattr(args, k) for k in ("width", "hidden", "experts", "tokens")}
    numbers = {n: sum(p.numel() for p in experts.parameters()) for n, (experts, _) in sides.items()}
    about = {**clocks.about(args.device), "seed": args.seed, "shape": shape}
    return about | {"times": rows, "networks": networks, "parameters": numbers}


def tables(result: dict) -> str:
    out = [
        f"{result['machine']}, torch {result['torch']}, seed {result['seed']}, {result['shape']}, "
        "bfloat16, top-2."
    ]
    for what, rows in result["times"].items():
        memory = any("MiB" in row for row in rows.values())
        header = ["side", "parameters", "slots with a network", "ms", "plain over it"]
        out += [
            f"## {what[0].upper()}{what[1:]}",
            markdown(
                [*header, *([MEMORY.get(what, "MiB beyond")] if memory else [])],
                [
                    [
                        name,
                        f"{result['parameters'][name]:,}",
                        f"{result['networks'][name]:.3f}",
                        f"{row['ms']:.3f}",
                        f"{row['speedup']:.2f}",
                        *([f"{row['MiB']:.0f}"] if memory else []),
                    ]
                    for name, row in rows.items()
                ],
            ),
        ]
    return "\n\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", choices=SHAPES, default="moepp")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, help="of the model; None: that of --what")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--experts", type=int, default=8, help="feed-forward ones")
    parser.add_argument("--layers", type=int, default=30, help="of the whole model")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--turn", type=float, default=0.3, help="seconds per turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.out = args.out or HERE / f"{args.what}.json"
    measure_and_write(args, measure, tables)


if __name__ == "__main__":
    main()
