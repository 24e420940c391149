"""Data files -> arrays for split_quality.py, so that a GPU machine needs no tokenizer.

Shapes: N packs, S = 512 tokens of a pack; P texts for the encoder, 128 tokens of each at most.

    python benchmarks/split_data.py --data ../shared/data --out split.npz
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np

from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer

LENGTH = 512
DOMAINS = ("general", "math", "code")
TRAIN_PACKS = 6144
ENCODER_LENGTH = 128
TRAIN_EACH, TEST_EACH = 48, 24  # texts of each P3 source for the encoder
PROMPTS, PROMPT_LENGTH = 8, 48  # of generation, each the beginning of a validation text


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def plain(row: dict) -> str:
    """A row as text: its turns, without chat marks, which cost nothing to predict."""
    return "\n".join(message["content"] for message in row["messages"])


def packs(rows: list[dict], tokenizer, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Texts in one stream cut every S tokens: ids (N, S), and where in its text each token stands.

    Positions start again at a text and at a pack: a token sees its own text, in its own pack.
    """
    ids: list[int] = []
    places: list[int] = []
    for row in rows:
        own = [
            *tokenizer(plain(row), add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        ids += own
        places += range(len(own))
        if limit and len(ids) >= limit * LENGTH:
            break
    count = len(ids) // LENGTH
    ids_NS = np.array(ids[: count * LENGTH], dtype=np.uint16).reshape(count, LENGTH)
    place_NS = np.array(places[: count * LENGTH]).reshape(count, LENGTH)
    # Of the text that a pack begins in the middle of, the count starts at zero again.
    cut_NS = np.cumsum(place_NS == 0, axis=1) == 0
    place_NS = np.where(cut_NS, np.arange(LENGTH), place_NS)
    return ids_NS, place_NS.astype(np.uint16)


def encoder_arrays(rows: list[dict], tokenizer, seed: int) -> dict[str, np.ndarray]:
    """Prompts of P3 by source, as many of each source in training and in test."""
    by_source = defaultdict(list)
    for row in rows:
        by_source[row["source"]].append(row["messages"][0]["content"])
    texts, labels, test = [], [], []
    for label, source in enumerate(sorted(by_source)):
        own = sorted(set(by_source[source]))
        random.Random(seed).shuffle(own)
        own = own[: TRAIN_EACH + TEST_EACH]
        texts += own
        labels += [label] * len(own)
        test += [number >= TRAIN_EACH for number in range(len(own))]
    found = tokenizer(texts, truncation=True, max_length=ENCODER_LENGTH)["input_ids"]
    ids_PS = np.zeros((len(found), ENCODER_LENGTH), dtype=np.uint16)
    for row, own in zip(ids_PS, found, strict=True):
        row[: len(own)] = own
    return {
        "encoder/ids": ids_PS,
        "encoder/lengths": np.array([len(own) for own in found], dtype=np.uint8),
        "encoder/labels": np.array(labels, dtype=np.uint8),
        "encoder/test": np.array(test),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("split.npz"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.data / "instruct"
    tokenizer = load_tokenizer(hub.resolve("smollm2"))
    train = [row for name in DOMAINS for row in read(folder / f"{name}.train.jsonl.gz")]
    random.Random(args.seed).shuffle(train)
    out: dict[str, np.ndarray] = {}
    out["train/ids"], out["train/positions"] = packs(train, tokenizer, TRAIN_PACKS)
    prompts = []
    for name in DOMAINS:
        rows = read(folder / f"{name}.valid.jsonl.gz")
        out[f"{name}/ids"], out[f"{name}/positions"] = packs(rows, tokenizer)
        found = tokenizer([plain(row) for row in rows], add_special_tokens=False)["input_ids"]
        prompts += [own[:PROMPT_LENGTH] for own in found if len(own) > 2 * PROMPT_LENGTH][:PROMPTS]
    random.Random(args.seed).shuffle(prompts)
    out["prompts"] = np.array(prompts[:PROMPTS], dtype=np.uint16)
    encoder = load_tokenizer(hub.resolve("minilm"))
    out |= encoder_arrays(read(folder / "general.train.jsonl.gz"), encoder, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **out)
    for name, array in out.items():
        print(name, array.shape, array.dtype)
    print(f"{args.out.stat().st_size / 2**20:.1f} MiB; {out['encoder/test'].mean():.2f} in test")


if __name__ == "__main__":
    main()
