"""Whether `generate` by captured steps gives the tokens of the slow loop, on SmolLM2.

The slow loop is transformers' own, with experts in a Python loop. In float32 all tokens are to be
equal. In bfloat16 they are up to the first step whose two best logits lie closer than rounding
moves them: there the row says how close.

    python -m benchmarks.models.equal            # one GPU
    python -m benchmarks.models.equal --table
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import sparsecraft as sc
from benchmarks.lab import clocks
from benchmarks.lab.tables import markdown, measure_and_write
from benchmarks.models.shapes import fill
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer
from sparsecraft.moe.decoding import loop
from sparsecraft.moe.experts.base import set_dispatch

HERE = Path(__file__).parent
RECIPES: dict[str, Callable[[], sc.Recipe]] = {
    "camel": sc.recipes.camel,
    "camelidae": sc.recipes.camelidae,
    "molora": sc.recipes.molora,
    "mov": sc.recipes.mov,
    "upcycling": lambda: sc.recipes.upcycling(4, 2),
    "gmoefication": lambda: sc.recipes.gmoefication(num_experts=32),
    "moepp": sc.recipes.moepp,
}
PROMPTS = (
    "The sea is",
    "A list of ten things to take on a long walk in the mountains, and why:",
    "Once upon a time there was a mill by a river, and in it",
)
NEW, BEYOND = 256, 700  # the second is more than the first size of a cache


def measure(args) -> dict:
    folder, rows = hub.resolve("smollm2"), []
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    for dtype in (torch.float32, torch.bfloat16):
        for name in args.recipes:
            model = sc.hub.load_dense(folder).to(args.device, dtype)
            sc.convert(model, RECIPES[name](), certify=False)
            fill(model)
            model.eval().requires_grad_(False)
            if name == "gmoefication":
                sc.set_budget(model, 0.5)
            for prompts, new in ((PROMPTS[:1], args.new), (PROMPTS, args.new // 4)):
                rows.append(one(args, name, model, tokenizer, prompts, new))
            if name == "camelidae":
                rows.append(one(args, name, model, tokenizer, PROMPTS[:1], args.beyond))
    return clocks.about(args.device) | {"rows": rows}


def one(args, name: str, model: nn.Module, tokenizer, prompts: tuple[str, ...], new: int) -> dict:
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True).to(args.device)
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    fast = model.generate(**inputs, **options)
    set_dispatch(model, "loop")
    slow = type(model).generate(
        model, **inputs, **options, return_dict_in_generate=True, output_logits=True
    )
    set_dispatch(model, "auto")
    made = loop.STEPS[model].found.values() if model in loop.STEPS else ()
    row = {"recipe": name, "dtype": str(model.dtype).removeprefix("torch.")}
    row |= {"batch": len(prompts), "new": new, "compiled": [step.compiled for step in made][-1:]}
    row |= differences(fast, slow.sequences, torch.stack(slow.logits))
    print(row, flush=True)
    return row


def differences(fast_BN: Tensor, slow_BN: Tensor, logits_NBV: Tensor) -> dict:
    """The first new token of each sequence that differs, if one does, and by how much the slow
    loop's two best logits lie apart there, over its largest logit."""
    first, gaps = [], []
    prompt = slow_BN.shape[1] - len(logits_NBV)
    for b in range(len(slow_BN)):
        differ = (fast_BN[b, prompt:] != slow_BN[b, prompt:]).nonzero()
        if len(differ):
            first.append(int(differ[0]))
            best = logits_NBV[first[-1], b].float().topk(2).values
            gaps.append(float((best[0] - best[1]) / best.abs().max()))
    return {"differing": len(first), "first": first, "gaps": gaps}


def tables(results: dict) -> str:
    header = ["recipe", "type", "sequences", "new tokens", "compiled", "sequences that differ"]
    header += ["from token", "two best logits apart, of the largest"]
    lines = [
        [
            r["recipe"], r["dtype"], r["batch"], r["new"], ", ".join(map(str, r["compiled"])),
            r["differing"], ", ".join(map(str, r["first"])) or None,
            ", ".join(f"{gap:.1e}" for gap in r["gaps"]) or None,
        ]
        for r in results["rows"]
    ]  # fmt: skip
    return f"{results['machine']}, torch {results['torch']}.\n\n{markdown(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=[*RECIPES])
    parser.add_argument("--new", type=int, default=NEW)
    parser.add_argument("--beyond", type=int, default=BEYOND)
    parser.add_argument("--table", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--out", type=Path, default=HERE / "equal.json")
    args = parser.parse_args()
    if args.device == "cpu":
        loop.DEVICES = ("cpu",)
    measure_and_write(args, measure, tables)


if __name__ == "__main__":
    main()
