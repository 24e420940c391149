"""Two checkouts of sparsecraft, timed in turns on one GPU: layers, decoding, graph breaks.

    python benchmarks/house/before_after.py --before OLD/src --after src --out before_after.json

Each turn is a process of its own that imports one of the two; turns go before, after, after,
before, ... Every case is built by the public names alone, which both have. Times are the medians
of a turn, and the ratio is of the smallest medians.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

FORWARD_TOKENS, BACKWARD_TOKENS = (1, 16, 256, 2048, 8192), (16, 2048, 8192)


def sizes(tiny: bool) -> dict[str, int]:
    if tiny:
        return {"width": 64, "hidden": 96, "mixture": 128, "rank": 4, "adapter": 16, "split": 256}
    return {"width": 4096, "hidden": 11008, "mixture": 14336, "rank": 4, "adapter": 512,
            "split": 8192}  # fmt: skip


def cases(size: dict[str, int]):
    """Name -> (hidden width, recipe, budget, path of the module that is timed)."""
    import sparsecraft as sc

    pesc = sc.recipes.camelidae(
        num_experts=8, top_k=2, adapter_dim=size["adapter"], lora_rank=0, dropout=0.0
    )
    mlp, base = "model.layers.0.mlp", size["hidden"]
    return {
        "pesc": (base, pesc, None, mlp),
        "upcycling": (size["mixture"], sc.recipes.upcycling(8, 2), None, mlp),
        "molora": (base, sc.recipes.molora(10, rank=size["rank"]), None, f"{mlp}.up_proj"),
        "mov": (base, sc.recipes.mov(10), None, f"{mlp}.act_fn"),
        "mov keys": (base, sc.recipes.mov(10), None, "model.layers.0.self_attn.k_proj"),
        "split": (size["split"], sc.recipes.gmoefication(64, 13), 0.25, mlp),
    }


def build(hidden: int, recipe, budget: float | None, width: int, device: str):
    import torch
    import transformers

    import sparsecraft as sc

    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=max(1, width // 128),
        num_key_value_heads=max(1, width // 512),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).eval()
    sc.convert(model, recipe, certify=False)
    model.train().eval()  # experts that shared one tensor's memory get their own
    for parameter in model.parameters():  # routers that start at zero choose one expert alone
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    if budget is not None:
        sc.set_budget(model, budget)
    return model


def median_ms(call, device: str, seconds: float) -> float:
    """Wall time of one call, launches included, over at least `seconds`."""
    import torch

    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(3):
        call()
    sync()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        call()
        sync()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def breaks(module, x) -> int:
    import torch

    torch._dynamo.reset()
    with torch.no_grad():
        return torch._dynamo.explain(module)(x).graph_break_count


def turn(tiny: bool, seconds: float) -> dict[str, float]:
    """Every case of the checkout that this process imports, in milliseconds; breaks as counts."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, found = sizes(tiny), {}
    for name, (hidden, recipe, budget, path) in cases(size).items():
        model = build(hidden, recipe, budget, size["width"], device)
        module = model.get_submodule(path)
        shape = 1, hidden if path.endswith("act_fn") else size["width"]
        found |= {
            f"{name} {what}": value
            for what, value in timed(model, module, shape, seconds, tiny, budget is None).items()
        }
        x = torch.randn(1, 16, shape[1], device=device, dtype=model.dtype)
        found[f"{name} graph breaks"] = breaks(module, x)
    return found


def timed(model, module, shape, seconds: float, tiny: bool, trains: bool) -> dict[str, float]:
    """Milliseconds by pass and number of tokens."""
    import torch

    found, device = {}, model.device.type
    for tokens in (t for t in FORWARD_TOKENS if t <= (64 if tiny else max(FORWARD_TOKENS))):
        x = torch.randn(1, tokens, shape[1], device=device, dtype=model.dtype)
        with torch.no_grad():
            found[f"forward {tokens}"] = median_ms(functools.partial(module, x), device, seconds)
            if device == "cuda":
                replay = captured(module, x).replay
                found[f"forward {tokens}, CUDA graph"] = median_ms(replay, device, seconds)
        if trains and tokens in BACKWARD_TOKENS:
            step = functools.partial(one_step, model, module, x.requires_grad_())
            module.train()
            found[f"forward+backward {tokens}"] = median_ms(step, device, seconds)
            module.eval()
    return found


def captured(module, x):
    """The module's forward pass as a CUDA graph: the card's time without the host's."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            module(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(x)
    return graph


def one_step(model, module, x) -> None:
    module(x).square().mean().backward()
    model.zero_grad(set_to_none=True)


def run_turn(source: Path, arguments: list[str]) -> dict[str, float]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{source}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, __file__, "--turn", *arguments]
    cores = sorted(os.sched_getaffinity(0))[-2:]  # always the same two: the host's time counts
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if done.returncode:
        raise SystemExit(f"The turn of {source} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--after", type=Path)
    parser.add_argument("--rounds", type=int, default=2, help="two turns of each in a round")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each median")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.turn:
        print(json.dumps(turn(asked.tiny, asked.seconds)))
        return
    import torch

    passed = ["--seconds", str(asked.seconds), *(["--tiny"] if asked.tiny else [])]
    turns: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    for _ in range(asked.rounds):
        for which in ("before", "after", "after", "before"):
            turns[which].append(run_turn(getattr(asked, which), passed))
    rows = {}
    for name in turns["before"][0]:
        before, after = ([t[name] for t in turns[which]] for which in ("before", "after"))
        ratio = min(after) / min(before) if min(before) else float(min(after) == 0)
        rows[name] = {"before": before, "after": after, "ratio": round(ratio, 4)}
        print(f"{name:36s} {min(before):10.4f} {min(after):10.4f} {ratio:7.3f}", flush=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    asked.out.write_text(
        json.dumps({"card": card, "torch": torch.__version__, "cases": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
