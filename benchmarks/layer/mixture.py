"""Time and memory of MoV and MoLORA over the frozen Linear that they stand on.

Ten experts at 4096 -> 11008 (Llama-2-7B's up projection), bf16, a soft linear router on the
layer's input, the new parameters in float32; no dropout; input and new parameters take gradients.
Shapes: T tokens, I input features, O output features, E experts, R rank.

    python -m benchmarks.layer.mixture            # one NVIDIA H200
    python -m benchmarks.layer.mixture --table    # the tables of the page
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.lab import clocks
from benchmarks.lab.tables import measure_and_write
from benchmarks.layer.page import mixture_tables
from sparsecraft.kernels.projections import float32_product
from sparsecraft.kernels.vectors import mix_vectors
from sparsecraft.moe.experts.lora import LoRAExperts
from sparsecraft.moe.experts.vector import VectorExperts
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.build import build_router
from sparsecraft.recipe.experts import LoRASpec, VectorSpec
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.selections import Soft

HERE = Path(__file__).parent
INPUTS = 4  # inputs in rotation
DECODE_TOKENS = 16  # up to here also without gradients in a CUDA graph, and in bf16
# Calls in one CUDA graph, as the layers of a model stand in one: replays have a cost of their own.
GRAPH_CALLS = 20
SOFT = RouterSpec(select=Soft())


# ------------------------------------------------------------------ the layers
def plain_linear(args) -> nn.Linear:
    linear = nn.Linear(
        args.width, args.hidden, bias=False, device=args.device, dtype=torch.bfloat16
    )
    nn.init.normal_(linear.weight, std=0.02)
    return linear.requires_grad_(False)


def molora(args, base: nn.Module, dtype=torch.float32) -> MoELayer:
    """sparsecraft's layer; B is random, so that no gradient is zero."""
    at = {"device": args.device, "dtype": dtype}
    spec = LoRASpec(num_experts=args.experts, rank=args.rank, alpha=2.0 * args.rank, dropout=0.0)
    bank = LoRAExperts(spec, args.width, args.hidden, **at)
    nn.init.normal_(bank.lora_B, std=0.02)
    return MoELayer("beside", bank, build_router(SOFT, args.width, args.experts, **at), base)


def one_lora(args, base: nn.Module, dtype=torch.float32) -> MoELayer:
    """A single LoRA with as many parameters, without a router."""
    spec = LoRASpec(num_experts=1, rank=args.rank * args.experts, dropout=0.0)
    bank = LoRAExperts(spec, args.width, args.hidden, device=args.device, dtype=dtype)
    nn.init.normal_(bank.lora_B, std=0.02)
    return MoELayer("beside", bank, None, base)


def mov(args, base: nn.Module, dtype=torch.float32) -> MoELayer:
    at = {"device": args.device, "dtype": dtype}
    bank = VectorExperts(VectorSpec(num_experts=args.experts), args.hidden, **at)
    nn.init.normal_(bank.vectors, mean=1.0, std=0.1)
    return MoELayer("after", bank, build_router(SOFT, args.width, args.experts, **at), base)


def plain_weights(weight: Tensor, x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype)).softmax(-1).to(x.dtype)


class NaiveMoLORA(nn.Module):
    """Every expert's output in memory, (T, E, O), then their weighted sum."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.base, self.router, self.experts = layer.base, layer.router, layer.experts

    def forward(self, x: Tensor) -> Tensor:
        weights = plain_weights(self.router.scorer.weight, x)
        low = torch.einsum("...i,eri->...er", x, self.experts.lora_A.to(x.dtype))
        each = torch.einsum("...er,eor->...eo", low, self.experts.lora_B.to(x.dtype))
        return self.base(x) + self.experts.scale * (each * weights[..., None]).sum(-2)


class NaiveMoV(nn.Module):
    """Every expert's output in memory, (T, E, O), then their weighted sum."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.base, self.router, self.experts = layer.base, layer.router, layer.experts

    def forward(self, x: Tensor) -> Tensor:
        weights = plain_weights(self.router.scorer.weight, x)
        each = self.base(x)[..., None, :] * self.experts.vectors.to(x.dtype)
        return (each * weights[..., None]).sum(-2)


def peft_layers(args, base: nn.Linear) -> dict[str, nn.Module]:
    """PEFT's LoRA of the same number of parameters, and its (IA)3; none where PEFT is absent."""
    try:
        import peft
    except ImportError:
        return {}
    found = {}
    for name, config in {
        "peft_lora": peft.LoraConfig(
            r=args.rank * args.experts, lora_dropout=0.0, target_modules=["0"]
        ),
        "peft_ia3": peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    }.items():
        try:
            layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
        except Exception as error:  # another PEFT than ours; the comparison is optional
            print(f"{name} left out: {type(error).__name__}: {error}", flush=True)
            continue
        for key, parameter in layer.named_parameters():
            if key.startswith("lora_B"):
                nn.init.normal_(parameter, std=0.02)
        found[name] = layer
        base.requires_grad_(False)
    return found


# ------------------------------------------------------------------ clocks
def random_inputs(args, tokens: int, number: int = INPUTS) -> list[tuple[Tensor, Tensor]]:
    def make(width: int) -> Tensor:
        return torch.randn(1, tokens, width, device=args.device).to(torch.bfloat16)

    return [(make(args.width).requires_grad_(), make(args.hidden)) for _ in range(number)]


def paired(args, sides: dict[str, list[Callable]]) -> dict[str, dict[str, float]]:
    """Median milliseconds of each side, and the median over rounds of its ratio to `plain`."""
    for calls in sides.values():
        for call in calls * 2:
            call()
    blocks = {
        name: clocks.block_size(calls, args.turn, args.device, passes=2)
        for name, calls in sides.items()
    }
    turns = {name: (sides[name], blocks[name]) for name in sides}

    def timed(side: tuple[list[Callable], int]) -> float:
        times = clocks.block_times(*side, args.device)
        return statistics.median(times[len(times) // 2 :])

    rounds = clocks.rounds_of(turns, args.rounds, timed)
    return {
        name: {
            "ms": statistics.median(row[name] for row in rounds),
            "ratio": statistics.median(row[name] / row["plain"] for row in rounds),
        }
        for name in sides
    }


# ------------------------------------------------------------------ measurements
def time_layers(args, sides: dict[str, nn.Module], halves: dict[str, nn.Module]) -> list[dict]:
    """Every side at every number of tokens; `halves` hold their new parameters in bf16."""
    rows = []
    for tokens in args.tokens:
        few = tokens <= DECODE_TOKENS
        layers = sides | halves if few else sides
        inputs = random_inputs(args, tokens)
        for backward, graphed in [(False, False), (True, False), (False, True)]:
            if graphed and not (few and args.device == "cuda"):
                continue
            calls = {name: clocks.steps(layer, inputs, backward) for name, layer in layers.items()}
            if graphed:
                calls = {name: [clocks.graph(many(c))] for name, c in calls.items()}
            found = paired(args, calls)
            for side in found.values():
                side["ms"] /= GRAPH_CALLS if graphed else 1
            row = {"tokens": tokens, "backward": backward, "graph": graphed}
            rows.append(row | {"sides": found})
            print(rows[-1], flush=True)
        del inputs, calls
    return rows


def many(calls: list[Callable]) -> Callable[[], object]:
    return lambda: [calls[i % len(calls)]() for i in range(GRAPH_CALLS)]


def peak_memory(args, layer: nn.Module, tokens: int) -> dict[str, float]:
    """MiB of one forward and backward: with weights, x and dy, and beyond them."""
    inputs = random_inputs(args, tokens, 1)
    (call,) = clocks.steps(layer, inputs, backward=True)
    beyond = clocks.peak_beyond(call, args.device)
    own = [*layer.parameters(), *inputs[0]]
    total = beyond + sum(t.numel() * t.element_size() for t in own)
    return {"total": total / 2**20, "beyond": beyond / 2**20}


def errors(args, layer: nn.Module, tokens: int = 1000) -> dict[str, float]:
    """Relative error of the output and of each gradient against the layer in float64."""
    ((x, dy),) = random_inputs(args, tokens, 1)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]

    def run(layer: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = layer(x)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy.to(y.dtype))]

    wanted = run(copy.deepcopy(layer).double(), x.double())
    return {
        name: ((got.double() - want).norm() / want.norm()).item()
        for name, got, want in zip(["y", "x", *names], run(layer, x), wanted, strict=True)
    }


def parts(args, layer: MoELayer, tokens: int) -> dict[str, float]:
    """Milliseconds of the functions alone, beside a copy of the output."""
    inputs = random_inputs(args, tokens)
    weight, vectors = layer.router.scorer.weight, layer.experts.vectors
    weights = [layer.router(x).weights_TK.detach().requires_grad_() for x, _ in inputs]
    scored = [x.detach()[0].requires_grad_() for x, _ in inputs]
    grads = [torch.randn_like(w) for w in weights]
    mixed = [dy[0].detach().requires_grad_() for _, dy in inputs]

    def mix(i: int) -> Tensor:
        return mix_vectors(mixed[i], weights[i], vectors, True)

    def mix_both(i: int):
        return torch.autograd.grad(mix(i), [mixed[i], weights[i], vectors], mixed[1 - i].detach())

    def score(i: int) -> Tensor:
        return float32_product(scored[i], weight)

    def score_both(i: int):
        return torch.autograd.grad(score(i), [scored[i], weight], grads[i])

    copied = torch.empty_like(mixed[0])
    named = {
        "copy of the output": lambda i: copied.copy_(mixed[i].detach()),
        "mix_vectors": mix,
        "mix_vectors, both": mix_both,
        "float32_product": score,
        "float32_product, both": score_both,
    }
    calls = {n: [lambda f=f, i=i: f(i) for i in range(2)] for n, f in named.items()}
    calls["plain"] = calls["copy of the output"]
    return {name: row["ms"] for name, row in paired(args, calls).items() if name != "plain"}


def measure(args) -> dict:
    torch.manual_seed(args.seed)
    base = plain_linear(args)
    ours = {"molora": molora(args, base), "mov": mov(args, base), "one_lora": one_lora(args, base)}
    sides = {"plain": base, **ours}
    sides["naive_molora"] = NaiveMoLORA(ours["molora"])
    sides["naive_mov"] = NaiveMoV(ours["mov"])
    sides |= peft_layers(args, base)
    half = {"molora_bf16": molora, "mov_bf16": mov, "one_lora_bf16": one_lora}
    halves = {name: make(args, base, torch.bfloat16) for name, make in half.items()}
    on_gpu = args.device == "cuda"
    result = {
        **clocks.about(args.device),
        "seed": args.seed,
        "shape": {k: getattr(args, k) for k in ("width", "hidden", "experts", "rank")},
        "ceilings": clocks.ceilings(args.device),
        "errors": {n: errors(args, sides[n]) for n in sides if "mo" in n},
    }
    if on_gpu:
        result["memory"] = [
            {"tokens": t, "sides": {n: peak_memory(args, s, t) for n, s in sides.items()}}
            for t in args.tokens
        ]
    print(json.dumps(result), flush=True)
    result["times"] = time_layers(args, sides, halves)
    result["parts"] = parts(args, ours["mov"], max(args.tokens))
    print(result["parts"], flush=True)
    if on_gpu:
        inputs = random_inputs(args, max(args.tokens), 2)
        result["kernels"] = {
            name: clocks.kernel_table(clocks.steps(sides[name], inputs, True), args.device)
            for name in ("plain", "molora", "mov")
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=11008)
    parser.add_argument("--experts", type=int, default=10)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=(8192, 2048, 16, 1))
    parser.add_argument("--rounds", type=int, default=18)
    parser.add_argument("--turn", type=float, default=0.1, help="seconds per turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--out", type=Path, default=HERE / "mixture.json")
    measure_and_write(parser.parse_args(), measure, mixture_tables)


if __name__ == "__main__":
    main()
