"""Tokens per second of whole models on two cores of a CPU, over the dense model in the same run.

Every side decodes one token behind 128 others with transformers' own cache, and reads a prompt of
256 tokens; sides take turns with the dense model. `fast` sides have been given their form for
inference (`sc.fast`). Split networks run half of their experts, by top-k, with random routers.
Weights are random; bytes says what a decoded token would take of the dense model's time if weights
were all that is read.

    OMP_NUM_THREADS=2 python -m benchmarks.models.cpu
    python -m benchmarks.models.cpu --table
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache
from transformers import MixtralForCausalLM as Mixtral

import sparsecraft as sc
from benchmarks.lab import alone, clocks
from benchmarks.lab.tables import markdown, measure_and_write
from benchmarks.models.shapes import SHAPES, SIDES, dense_of, mixtral_of, side_of

HERE = Path(__file__).parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BEHIND, PROMPT = 128, 256


# Of `SIDES`, those that a CPU is asked for, and transformers' own mixture.
MIXTRAL = "Mixtral of transformers"
ASKED = ("camelidae", "camelidae, fast", "molora", "molora, fast", "mov, fast", "split at half")
ASKED += ("upcycling", MIXTRAL)


# ------------------------------------------------------------------ sides
def made(name: str, shape: dict, dtype: torch.dtype) -> nn.Module:
    return mixtral_of(shape, dtype) if name == MIXTRAL else side_of(name, shape, dtype)


def calls_of(model: nn.Module) -> dict[str, Callable[[], None]]:
    generator = torch.Generator().manual_seed(0)
    words = min(30000, model.config.vocab_size)
    ids = torch.randint(5, words, (1, PROMPT), generator=generator)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :BEHIND], past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def decode() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    @torch.no_grad()
    def prefill() -> None:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return {"decode": decode, "prefill": prefill}


# ------------------------------------------------------------------ measurements
def paired(calls: dict[str, Callable], rounds: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of both, and the median over rounds of dense over the other."""
    each = {}
    for name, call in calls.items():
        call()
        begun = time.perf_counter()
        call()
        each[name] = max(1, int(seconds / (time.perf_counter() - begun)))

    def timed(name: str) -> float:
        begun = time.perf_counter()
        for _ in range(each[name]):
            calls[name]()
        return 1e3 * (time.perf_counter() - begun) / each[name]

    rows = clocks.rounds_of({name: name for name in calls}, rounds, timed)
    dense, other = calls
    return {
        "ms": statistics.median(row[other] for row in rows),
        "dense_ms": statistics.median(row[dense] for row in rows),
        "of_dense": statistics.median(row[dense] / row[other] for row in rows),
    }


def measure(args) -> dict:
    torch.set_num_threads(args.threads)
    rows = []
    for shape in args.shapes:
        for dtype in args.dtypes:
            dense = dense_of(SHAPES[shape], DTYPES[dtype])
            theirs = calls_of(dense)
            for name in args.sides:
                model = made(name, SHAPES[shape], DTYPES[dtype])
                row = {"shape": shape, "dtype": dtype, "side": name}
                row["bytes"] = sc.count(dense).active / _read(model)
                for what, call in calls_of(model).items():
                    pair = {"dense": theirs[what], name: call}
                    row[what] = paired(pair, args.rounds, args.turn)
                print(row, flush=True)
                rows.append(row)
                del model, pair, call
                gc.collect()
            del dense, theirs
            gc.collect()
    old = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows = alone.merge(old, rows, ("shape", "dtype", "side"))
    return clocks.about("cpu") | {"threads": args.threads, "rows": rows}


def _read(model: nn.Module) -> int:
    """Weights that one token meets; of transformers' own mixture as of ours."""
    if isinstance(model, Mixtral):
        config = model.config
        each = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
        idle = config.num_local_experts - config.num_experts_per_tok
        return sc.count(model).total - idle * each
    return sc.count(model).active


def tables(result: dict) -> str:
    header = ["model", "type", "side", "decode ms (dense)", "of dense", "bytes allow"]
    header += ["prefill ms (dense)", "of dense"]
    lines = []
    for row in result["rows"]:
        decode, prefill = row["decode"], row["prefill"]
        cells = [row["shape"], row["dtype"], row["side"]]
        cells += [f"{decode['ms']:.1f} ({decode['dense_ms']:.1f})", f"{decode['of_dense']:.2f}"]
        cells += [f"{row['bytes']:.2f}"]
        cells += [f"{prefill['ms']:.0f} ({prefill['dense_ms']:.0f})", f"{prefill['of_dense']:.2f}"]
        lines.append(cells)
    about = f"{result['machine']}, {result['threads']} threads, torch {result['torch']}."
    return f"{about}\n\n{markdown(header, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["SmolLM2 135M", "1.1B"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--sides", nargs="+", choices=[*SIDES, MIXTRAL], default=list(ASKED))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=float, default=1.0, help="seconds per turn")
    parser.add_argument("--table", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--out", type=Path, default=HERE / "cpu.json")
    args = parser.parse_args()
    measure_and_write(args, measure, tables)


if __name__ == "__main__":
    main()
