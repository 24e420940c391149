"""Tokens per second of training whole models, side by side in one run.

A step is forward, backward, clipping and AdamW on random tokens, in mixed precision: what is
trained is float32, as `sc.train` and PEFT hold it, but for whole networks. Each side is a process
of its own, timed alone. `SIDE, sc.train` is the same work by `sc.train`, on chats packed to the
same length.

    python -m benchmarks.models.train --shape 1.1B      # one NVIDIA H200
    python -m benchmarks.models.train --table
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import sparsecraft as sc
from benchmarks.lab import alone, clocks
from benchmarks.lab.tables import f, markdown
from benchmarks.models.shapes import EXPERTS, SHAPES, dense_of, mixtral_of
from tests import tiny

HERE = Path(__file__).parent
KEYS = ("shape", "rows", "length", "side")
SKIPPED = 4  # steps that compile kernels and grow memory
RECIPES: dict[str, Callable[[], sc.Recipe]] = {
    "camel": sc.recipes.camel,
    "camelidae": sc.recipes.camelidae,
    "molora": sc.recipes.molora,
    "mov": sc.recipes.mov,
    "upcycling": lambda: sc.recipes.upcycling(EXPERTS, 2),
}
PEFT_LORA, MIXTRAL, BY_TRAIN = "LoRA of PEFT", "Mixtral of transformers", ", sc.train"
SIDES = (*RECIPES, PEFT_LORA, MIXTRAL, *(name + BY_TRAIN for name in ("camel", "camelidae")))
# Side -> what the issue of tokens per second is compared with.
BASES = {
    "camelidae": "camel", "molora": "camel", "mov": "camel", "camel": PEFT_LORA,
    "upcycling": MIXTRAL, "camel, sc.train": "camel", "camelidae, sc.train": "camelidae",
}  # fmt: skip


# ------------------------------------------------------------------ sides
def built(args, name: str) -> nn.Module:
    """The model that a side trains."""
    shape, device = SHAPES[args.shape], args.device
    if name == MIXTRAL:
        model = mixtral_of(shape, torch.bfloat16, device).requires_grad_(True)
        return model.train()
    model = dense_of(shape, torch.bfloat16, device).requires_grad_(True)
    if name == PEFT_LORA:
        camel = sc.recipes.camel().edits[0].experts
        config = peft.LoraConfig(
            r=camel.rank, lora_alpha=camel.alpha, lora_dropout=camel.dropout,
            target_modules="all-linear", task_type="CAUSAL_LM",
        )  # fmt: skip
        return peft.get_peft_model(model, config).train()
    sc.convert(model, RECIPES[name.removesuffix(BY_TRAIN)](), certify=False)
    return model.train()


def timed(args, name: str, model: nn.Module) -> dict:
    row = {"shape": args.shape, "rows": args.rows, "length": args.length}
    row["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    times = by_train(args, model) if name.endswith(BY_TRAIN) else by_loop(args, name, model)
    row["ms"] = statistics.median(times[SKIPPED:])
    row["tokens_per_second"] = 1e3 * args.rows * args.length / row["ms"]
    if args.device == "cuda":
        row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def by_loop(args, name: str, model: nn.Module) -> list[float]:
    """Milliseconds of each step of a bare loop."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if name not in (MIXTRAL, "upcycling"):  # whose masters would not fit beside their states
        for parameter in trained:
            parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=args.device == "cuda")
    ids = torch.randint(5, model.config.vocab_size, (args.rows, args.length), device=args.device)

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = []
    for _ in range(SKIPPED + args.steps):
        begun = time.perf_counter()
        step()
        clocks.sync(args.device)
        times.append(1e3 * (time.perf_counter() - begun))
    return times


def by_train(args, model: nn.Module) -> list[float]:
    """Milliseconds of each step of `sc.train`, which does not wait for the device between them."""
    ends: list[float] = []

    def look(*_) -> None:
        if len(ends) in (SKIPPED, SKIPPED + args.steps - 1):
            clocks.sync(args.device)
        ends.append(time.perf_counter())

    hook = register_optimizer_step_post_hook(look)
    with tempfile.TemporaryDirectory() as folder:
        rows = tiny.write_rows(Path(folder) / "rows.jsonl", _rows(args))
        sc.train(
            model, [rows], Path(folder) / "out", tokenizer=tiny.tokenizer(), progress=False,
            steps=SKIPPED + args.steps, batch_size=args.rows, micro_batch=args.rows,
            max_length=args.length, log_every=10, save_every=10**6,
        )  # fmt: skip
    hook.remove()
    whole = 1e3 * (ends[-1] - ends[SKIPPED]) / (len(ends) - 1 - SKIPPED)
    return [whole] * len(ends)


def _rows(args) -> list[dict]:
    """Chats that fill each pack but for little."""
    words = (args.length - 24) // 3  # of three tokens each, behind a question of some twenty
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join(tiny.WORDS[(i + n) % 10] for n in range(9))},
                {"role": "assistant", "content": " ".join(["on"] * words)},
            ]
        }
        for i in range(args.rows * 4)
    ]


# ------------------------------------------------------------------ page
def tables(rows: list[dict]) -> str:
    header = ["model", "rows x length", "side", "trained", "ms", "tokens/s", "over", "ratio"]
    header += ["GiB", "of its memory"]
    lines = []
    for row in rows:
        same = {r["side"]: r for r in rows if all(r[k] == row[k] for k in KEYS[:-1])}
        base = same.get(BASES.get(row["side"]))
        over = base and row["tokens_per_second"] / base["tokens_per_second"]
        memory = base and row.get("GiB") and row["GiB"] / base["GiB"]
        lines.append(
            [
                row["shape"], f"{row['rows']} x {row['length']}", row["side"],
                f"{row['trained']:,}", f"{row['ms']:.0f}", f"{row['tokens_per_second']:,.0f}",
                base and base["side"], f(over, 2), f(row.get("GiB"), 1), f(memory, 2),
            ]
        )  # fmt: skip
    machines = sorted({f"{row['machine']}, torch {row['torch']}" for row in rows})
    return f"{'; '.join(machines)}.\n\n{markdown(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES])
    parser.add_argument("--table", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--out", type=Path, default=HERE / "train.json")
    alone.measure_and_write(parser.parse_args(), built, timed, tables, KEYS)


if __name__ == "__main__":
    main()
