"""What `analyze` takes: its time over plain forward passes of the same tokens, and its memory
beside the model for a million tokens.

Time: SmolLM2 upcycled to eight experts, rows of three domains; with the twin, without the loss of
each expert. Memory: a narrow model of 24 layers with eight experts, random words; what the process
holds at most beyond what it held after a first pass, in a process of its own.

    python -m benchmarks.models.analyze --data general.jsonl math.jsonl code.jsonl
    python -m benchmarks.models.analyze --table
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsecraft as sc
from benchmarks.lab import clocks
from benchmarks.lab.tables import markdown, measure_and_write
from sparsecraft.evaluation.held_out import listed_batches
from sparsecraft.evaluation.logprobs import label_logprobs
from sparsecraft.surgery.record import tokenizer_of
from tests import tiny

HERE = Path(__file__).parent
EXPERTS, LAYERS, DOMAINS = 8, 24, 3
WORDS_OF_ROW = 200


def measure(args) -> dict:
    memory = []
    context = multiprocessing.get_context("spawn")
    for tokens in args.tokens:
        with context.Pool(1) as pool:
            memory.append(pool.apply(memory_of, (tokens,)))
            print(memory[-1], flush=True)
    rows = [time_of(args)] if args.data else []
    return clocks.about("cpu") | {
        "threads": torch.get_num_threads(), "time": rows, "memory": memory,
    }  # fmt: skip


def time_of(args) -> dict:
    model = sc.hub.load_dense(sc.hub.resolve("smollm2"))
    tokenizer = tokenizer_of(model)
    sc.convert(model, sc.recipes.upcycling(EXPERTS, 2), certify=False)
    model.eval()
    options = {"tokenizer": tokenizer, "limit": args.limit}

    def plain() -> int:
        tokens = 0
        with torch.no_grad():
            for batches in listed_batches(model, args.data, tokenizer, None, args.limit).values():
                for batch in batches:
                    tokens += int(batch.pop("token_mask", batch["input_ids"] + 1).bool().sum())
                    label_logprobs(model, batch)
        return tokens

    def analyzed() -> None:
        sc.analyze(model, args.data, drop=False, **options)

    row = {"tokens": plain()}
    times: dict[str, list[float]] = {"plain": [], "analyze": []}
    for _ in range(args.rounds):
        for name, call in (("plain", plain), ("analyze", analyzed)):
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)
    row |= {name: min(values) for name, values in times.items()}
    print(row, flush=True)
    return row


def memory_of(tokens: int) -> dict:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": LAYERS}
    tokenizer = tiny.tokenizer()
    config = LlamaConfig(**sizes, num_attention_heads=2, vocab_size=len(tokenizer))
    model = LlamaForCausalLM(config).eval()
    sc.convert(model, sc.recipes.upcycling(EXPERTS, 2), certify=False)
    draw = random.Random(0)

    def files(folder: str, tokens: int) -> list[str]:
        words = [" ".join(draw.choices(tiny.WORDS, k=WORDS_OF_ROW)) for _ in range(8)]
        of_row = len(tokenizer(words[0])["input_ids"])
        rows = -(-tokens // of_row // DOMAINS)
        return [
            tiny.write_rows(
                Path(folder) / f"{domain}.{tokens}.jsonl",
                [{"text": " ".join(draw.choices(tiny.WORDS, k=WORDS_OF_ROW))} for _ in range(rows)],
            )
            for domain in range(DOMAINS)
        ]

    with tempfile.TemporaryDirectory() as folder:
        options = {"tokenizer": tokenizer, "drop": False}
        sc.analyze(model, files(folder, 5000), **options)
        before = _held()
        found = sc.analyze(model, files(folder, tokens), **options)
        return {"tokens": found["tokens"], "layers": LAYERS, "MiB": (_held() - before) / 2**20}


def _held() -> int:
    """Bytes that the process has held at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tables(results: dict) -> str:
    times = [
        [f"{r['tokens']:,}", f"{r['plain']:.1f}", f"{r['analyze']:.1f}",
         f"{r['analyze'] / r['plain']:.2f}"]
        for r in results["time"]
    ]  # fmt: skip
    memory = [[f"{r['tokens']:,}", r["layers"], f"{r['MiB']:,.0f}"] for r in results["memory"]]
    return "\n\n".join(
        [
            f"{results['machine']}, {results['threads']} threads, torch {results['torch']}.",
            markdown(["tokens", "plain passes, s", "analyze, s", "ratio"], times),
            markdown(["tokens", "layers", "MiB beside the model"], memory),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="*", default=())
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="*", default=(100_000, 1_000_000))
    parser.add_argument("--table", action="store_true", help="only rewrite the page's tables")
    parser.add_argument("--out", type=Path, default=HERE / "analyze.json")
    measure_and_write(parser.parse_args(), measure, tables)


if __name__ == "__main__":
    main()
