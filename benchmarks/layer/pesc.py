"""Time of the PESC layer over the dense FFN that it stands on, at Llama-2-7B's shape.

Base frozen, no LoRA, no dropout, bf16; adapters, router and the input take gradients. Every side
runs in the same process on the same random inputs, in turn; medians of CUDA event times.
Shapes: T tokens, D width, F hidden width, H adapter width, E experts, K experts per token.

    python -m benchmarks.layer.pesc            # one NVIDIA H200
    python -m benchmarks.layer.pesc --table    # the tables of the page
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.lab import clocks
from benchmarks.lab.tables import measure_and_write
from benchmarks.layer.page import tables
from sparsecraft.moe.experts.adapter import AdapterExperts
from sparsecraft.moe.experts.dispatch import PATHS
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.build import build_router
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.experts import AdapterSpec
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.selections import TopK

HERE = Path(__file__).parent
TOKENS = (1, 16, 2048, 8192)
GRAPH_TOKENS = (1, 16)
SWEEP = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
INPUTS = 4  # inputs in rotation
BANK_PATHS = ("loop", "grouped", "dense")  # of a bank whose experts cannot be merged
ROUNDS = 4


# ------------------------------------------------------------------ the layers
def dense_ffn(args) -> nn.Module:
    config = LlamaConfig(hidden_size=args.width, intermediate_size=args.hidden, hidden_act="silu")
    with torch.device(args.device):
        mlp = LlamaMLP(config).to(torch.bfloat16)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.02)
    return mlp.requires_grad_(False)


def pesc_layer(args, base: nn.Module, num_experts: int, dim: int, top_k: int) -> MoELayer:
    """sparsecraft's layer; `up` is random, so that no gradient is zero. One expert: no router."""
    at = {"device": args.device}
    spec = AdapterSpec(num_experts=num_experts, dim=dim, dropout=0.0)
    bank = AdapterExperts(spec, args.width, dtype=torch.bfloat16, **at)
    nn.init.normal_(bank.up, std=0.02)
    routed = num_experts > 1
    spec = RouterSpec(select=TopK(top_k))
    router = build_router(spec, args.width, num_experts, **at) if routed else None  # float32
    return MoELayer("after", bank, router, base)


class ReleasedStyle(nn.Module):
    """What the released layer does, written anew from its description: no code of it is here.

    The FFN's output is repeated K times, and a Python loop runs each expert on a boolean mask.
    """

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.base, self.K = layer.base, layer.router.spec.slots
        self.gate = nn.Parameter(layer.router.scorer.weight.detach().to(torch.bfloat16))
        self.down = nn.ParameterList(d.detach().clone() for d in layer.experts.down)
        self.up = nn.ParameterList(u.detach().clone() for u in layer.experts.up)

    def forward(self, x_TD: Tensor) -> Tensor:
        top_TK, expert_TK = F.linear(x_TD, self.gate).topk(self.K, dim=-1)
        weight_TK = top_TK.softmax(-1)
        u_SD = self.base(x_TD).repeat_interleave(self.K, dim=0)
        y_SD, expert_S = torch.empty_like(u_SD), expert_TK.flatten()
        for e, (down_HD, up_DH) in enumerate(zip(self.down, self.up, strict=True)):
            mask_S = expert_S == e
            u = u_SD[mask_S]
            y_SD[mask_S] = u + F.linear(F.gelu(F.linear(u, down_HD)), up_DH)
        return (y_SD.view(-1, self.K, y_SD.shape[-1]) * weight_TK[..., None]).sum(1)


# ------------------------------------------------------------------ clocks
def steps(layer: nn.Module, inputs: list[Tensor], backward: bool) -> list[Callable[[], object]]:
    """One call per input: forward without gradients, or forward and backward."""
    pairs = [(x, None) for x in inputs]
    if backward:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        pairs = list(zip(leaves, [torch.randn_like(x) for x in inputs], strict=True))
    return clocks.steps(layer, pairs, backward)


def medians(sides: dict[str, list[Callable]], device: str, budget: float) -> dict[str, float]:
    """Median milliseconds of each side under its own sustained load, `budget` seconds each."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for calls in sides.values():
        for call in calls * 2:
            call()
    for order in clocks.rotations(list(sides), ROUNDS):
        for name in order:
            block = clocks.block_size(sides[name], budget / ROUNDS, device)
            times[name] += clocks.block_times(sides[name], block, device)[block // 2 :]
    return {name: statistics.median(values) for name, values in times.items()}


# ------------------------------------------------------------------ measurements
def random_inputs(args, tokens: int) -> list[Tensor]:
    shape = (tokens, args.width)
    return [torch.randn(shape, device=args.device).to(torch.bfloat16) for _ in range(INPUTS)]


def time_sides(
    args, sides: dict[str, nn.Module], tokens_of: tuple | None = None, graphed: bool = False
) -> list[dict]:
    rows = []
    for tokens in tokens_of or args.tokens:
        inputs = random_inputs(args, tokens)
        for backward in (False, True):
            calls = {name: steps(layer, inputs, backward) for name, layer in sides.items()}
            if graphed:
                calls = {name: list(map(clocks.graph, c)) for name, c in calls.items()}
            row = medians(calls, args.device, args.budget)
            rows.append({"tokens": tokens, "backward": backward, "ms": row})
            print(rows[-1], flush=True)
    return rows


def sweep_paths(args, layer: MoELayer, graphed: bool = False) -> list[dict]:
    """The bank alone, by each dispatch path; the loop waits for the host and is not captured."""
    rows = []
    for tokens in [t for t in SWEEP if t <= max(args.tokens)]:
        inputs = random_inputs(args, tokens)
        with torch.no_grad():
            routing = layer.router(inputs[0])
        for backward in (False, True):
            sides = {}
            for path in ("dense", "grouped") if graphed else ("dense", "grouped", "loop"):
                bank = _Bank(layer.experts, path, routing)
                calls = steps(bank, inputs, backward)
                sides[path] = list(map(clocks.graph, calls)) if graphed else calls
            row = medians(sides, args.device, args.budget / 4)
            rows.append({"tokens": tokens, "backward": backward, "ms": row})
    return rows


class _Bank(nn.Module):
    """A bank by one path, with a routing computed before."""

    def __init__(self, experts: nn.Module, path: str, routing: Routing):
        super().__init__()
        self.experts, self.path, self.routing = experts, path, routing

    def forward(self, x: Tensor) -> Tensor:
        return PATHS[self.path](self.experts, x, self.routing)


def errors(args, layer: MoELayer, tokens: int = 1000) -> dict[str, dict[str, float]]:
    """Each path against the loop in float64: relative error of output and gradients."""
    x, grad = random_inputs(args, tokens)[:2]
    found = layer.router(x)

    def run(bank, path, dtype):
        u = x.to(dtype).requires_grad_()
        kept = found.logits_TE.gather(1, found.indices_TK).detach()
        kept = kept.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        logits_TE = found.logits_TE.detach()
        routing = Routing(kept.softmax(-1), found.indices_TK, logits_TE, sums_to_one=True)
        y = PATHS[path](bank, u, routing)
        grads = torch.autograd.grad(y, [u, kept, bank.down, bank.up], grad.to(dtype))
        return [t.double() for t in (y, *grads)]

    names = ("y", "grad_x", "grad_logits", "grad_down", "grad_up")
    want = run(copy.deepcopy(layer.experts).double(), "loop", torch.float64)
    return {
        path: {
            name: ((got - ref).norm() / ref.norm()).item()
            for name, got, ref in zip(
                names, run(layer.experts, path, torch.bfloat16), want, strict=True
            )
        }
        for path in BANK_PATHS
    }


def compiled(args, sides: dict[str, nn.Module]) -> list[dict] | str:
    """Both sides under torch.compile in one graph each, or the reason why not."""
    try:
        whole = {}
        for name, layer in sides.items():
            whole[name] = copy.deepcopy(layer)
            whole[name].compile(fullgraph=True, dynamic=False)
        torch._dynamo.config.recompile_limit = 64
        return time_sides(args, whole, args.compile_tokens)
    except Exception as error:  # the compiler's errors have no common base; the reason is kept
        return f"{type(error).__name__}: {str(error)[:500]}"


def measure(args) -> dict:
    torch.manual_seed(args.seed)
    base = dense_ffn(args)
    ours = pesc_layer(args, base, args.experts, args.dim, args.top_k)
    one = pesc_layer(args, base, 1, args.dim * args.top_k, 1)
    sides = {
        "dense": base,
        "sparsecraft": ours,
        "one_adapter": one,
        "released_style": ReleasedStyle(ours),
    }
    on_gpu = args.device == "cuda"
    result = {
        **clocks.about(args.device),
        "seed": args.seed,
        "shape": {k: getattr(args, k) for k in ("width", "hidden", "dim", "experts", "top_k")},
        "ceilings": clocks.ceilings(args.device),
        "errors": errors(args, ours),
    }
    print(result, flush=True)
    result["eager"] = time_sides(args, sides)
    del sides["released_style"]  # it waits for the host and cannot be captured
    if on_gpu:
        result["graph"] = time_sides(args, sides, GRAPH_TOKENS, graphed=True)
    result["paths"] = sweep_paths(args, ours)
    if on_gpu:
        result["paths_graph"] = sweep_paths(args, ours, graphed=True)
        inputs = random_inputs(args, max(args.tokens))
        result["kernels"] = {
            name: clocks.kernel_table(steps(sides[name], inputs, backward=True), args.device)
            for name in ("dense", "sparsecraft")
        }
    if args.compile_tokens:
        pair = {name: sides[name] for name in ("dense", "sparsecraft")}
        result["compiled"] = compiled(args, pair)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=11008)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--budget", type=float, default=0.5, help="seconds per median")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile-tokens", type=int, nargs="*", default=(1, 2048, 8192))
    parser.add_argument("--table", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--out", type=Path, default=HERE / "pesc.json")
    measure_and_write(parser.parse_args(), measure, tables)


if __name__ == "__main__":
    main()
