"""Tokens per second of whole models by the public `generate` on a GPU, over one dense decoding step
that was compiled whole and captured, of the same run.

Each side is a process of its own. All build their models and compile at once; then one after the
other is timed alone. A row says what `generate` gives, from the time that 256 further tokens
take beyond 32, and what its step alone takes. Weights are random; bytes says what a decoded token
would take of the dense model's time if weights were all that is read.

    python -m benchmarks.models.decode --shape 1.1B --batch 1      # one NVIDIA H200
    python -m benchmarks.models.decode --table
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import sparsecraft as sc
from benchmarks.lab import alone, clocks
from benchmarks.lab.tables import f, markdown
from benchmarks.models.shapes import SHAPES, SIDES, dense_of, mixtral_of, side_of
from sparsecraft.moe.decoding import loop, step
from sparsecraft.moe.decoding.generate import generates_fast

HERE = Path(__file__).parent
PROMPT, FEW, MORE, ROUNDS = 128, 32, 256, 5
EAGER_MORE = 64  # where a token takes as long as ten
KEYS = ("shape", "dtype", "batch", "side")


# Of the dense model, and of transformers' mixture: a captured step, or transformers' own loop.
COMPILED = ("dense, transformers' compiled", "Mixtral, transformers' compiled")
FLOOR, OURS = "dense", "dense, shared launches"  # of a step by torch's compiler alone, and by ours
PEERS = (FLOOR, OURS, "dense, eager", *COMPILED)
EAGER = ("camelidae, eager", "camelidae, fast, eager")
CAPTURED = ", captured"  # without the compiler
CAPTURED_ONLY = ("dense" + CAPTURED, "camelidae" + CAPTURED, "camelidae, fast" + CAPTURED)


# ------------------------------------------------------------------ sides
def built(args, name: str) -> nn.Module:
    shape, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
    if name.startswith("Mixtral"):
        return mixtral_of(shape, dtype, args.device)
    model = dense_of(shape, dtype, args.device)
    if name.startswith("dense"):
        if name in (FLOOR, OURS, "dense" + CAPTURED):
            generates_fast(model)
        return model
    return side_of(name.removesuffix(", eager").removesuffix(CAPTURED), shape, dtype, args.device)


def prepared(args, name: str) -> tuple[Callable[[int], torch.Tensor], nn.Module, float]:
    """What generates so many tokens, its model, and the seconds of the first two calls."""
    model = built(args, name)
    if name == FLOOR:
        step.backend = "inductor"
    if name.endswith("eager"):
        loop.DEVICES = ()
    elif args.device == "cpu":
        loop.DEVICES = ("cpu",)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if name.endswith(CAPTURED):
        options["disable_compile"] = True
    if name in COMPILED:
        options |= {"cache_implementation": "static", "max_cache_len": 512}
    ids = torch.randint(5, model.config.vocab_size, (args.batch, PROMPT), device=args.device)

    def call(new: int) -> torch.Tensor:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options
        )

    begun = time.perf_counter()
    call(FEW), call(FEW)
    clocks.sync(args.device)
    return call, model, time.perf_counter() - begun


def timed(args, name: str, built: tuple[Callable, nn.Module, float]) -> dict:
    call, model, first = built
    row = {"shape": args.shape, "dtype": args.dtype, "batch": args.batch, "first_seconds": first}
    more = EAGER_MORE if name.endswith("eager") else MORE

    def seconds(new: int) -> float:
        clocks.sync(args.device)
        begun = time.perf_counter()
        call(new)
        clocks.sync(args.device)
        return time.perf_counter() - begun

    times = [(seconds(FEW + more) - seconds(FEW)) / more for _ in range(ROUNDS)]
    row["ms"] = 1e3 * statistics.median(times)
    row["tokens_per_second"] = 1e3 * args.batch / row["ms"]
    made = (
        [step for step in loop.STEPS[model].found.values() if step] if model in loop.STEPS else []
    )
    if made:
        row["compiled"] = made[-1].compiled
        row["step_ms"] = step_time(args, made[-1], model)
        if args.profile:
            row["kernels"] = kernels(made[-1], model)
    if not name.startswith("Mixtral"):
        row["active"] = sc.count(model).active
    return row


def step_time(args, step, model: nn.Module) -> float:
    """Median milliseconds of the step alone, behind the prompt."""

    def call() -> None:
        step(model)

    step.start(step.mask_BL)
    for layer in step.cache.layers:
        layer.cumulative_length.fill_(PROMPT)
    times = clocks.block_times([call], 100, args.device)
    return statistics.median(times[50:])


def kernels(step, model: nn.Module) -> dict[str, list[float]]:
    """Name -> launches and microseconds in one step, the longest first."""
    step.start(step.mask_BL)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            step(model)
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profile.key_averages():
        if event.self_device_time_total:
            launches, microseconds = found.setdefault(event.key[:90], [0.0, 0.0])
            both = launches + event.count / 5, microseconds + event.self_device_time_total / 5
            found[event.key[:90]] = [both[0], round(both[1], 1)]
    return dict(sorted(found.items(), key=lambda item: -item[1][1])[:24])


# ------------------------------------------------------------------ all
def tables(rows: list[dict]) -> str:
    header = ["model", "batch", "side", "tokens/s", "of the dense step", "bytes allow"]
    header += ["step alone", "compiled", "first calls, s"]
    lines = []
    shapes, sides = [*SHAPES], [*PEERS, *SIDES, *CAPTURED_ONLY, *EAGER]
    for row in sorted(
        rows, key=lambda r: (shapes.index(r["shape"]), r["batch"], sides.index(r["side"]))
    ):
        same = [r for r in rows if all(r[k] == row[k] for k in ("shape", "dtype", "batch"))]
        dense = next((r for r in same if r["side"] == "dense"), None)
        floor = dense and 1e3 * dense["batch"] / dense["step_ms"]
        step = row.get("step_ms") and 1e3 * row["batch"] / row["step_ms"]
        allow = dense and row.get("active") and row["batch"] == 1
        lines.append(
            [
                f"{row['shape']}, {row['dtype']}", row["batch"], row["side"],
                f"{row['tokens_per_second']:.0f}",
                f(floor and row["tokens_per_second"] / floor, 2),
                f(dense["active"] / row["active"], 2) if allow else None,
                f(step, 0), row.get("compiled"), f"{row['first_seconds']:.0f}",
            ]
        )  # fmt: skip
    machines = sorted({f"{row['machine']}, torch {row['torch']}" for row in rows})
    return f"{'; '.join(machines)}.\n\n{markdown(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=1)
    sides = [*PEERS, *SIDES, *CAPTURED_ONLY, *EAGER]
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides)
    parser.add_argument("--profile", action="store_true", help="the kernels of a step too")
    parser.add_argument("--table", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--out", type=Path, default=HERE / "decode.json")
    alone.measure_and_write(parser.parse_args(), prepared, timed, tables, KEYS)


if __name__ == "__main__":
    main()
