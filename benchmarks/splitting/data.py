"""Data files -> packs of text, and tokens of texts for an encoder.

Shapes: N packs, S = 512 tokens of a pack; P texts for the encoder, 128 tokens of each at most.

    python -m benchmarks.splitting.data --data ../shared/data --out split.npz
"""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np

from benchmarks.lab.corpus import DOMAINS, options, plain, read, save, text_packs
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer

TRAIN_PACKS = 6144
ENCODER_LENGTH = 128
TRAIN_EACH, TEST_EACH = 48, 24  # texts of each P3 source for the encoder
PROMPTS, PROMPT_LENGTH = 8, 48  # of generation, each the beginning of a validation text


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
    args = options("split.npz").parse_args()
    folder = args.data / "instruct"
    tokenizer = load_tokenizer(hub.resolve("smollm2"))
    train = [row for name in DOMAINS for row in read(folder / f"{name}.train.jsonl.gz")]
    random.Random(args.seed).shuffle(train)
    out: dict[str, np.ndarray] = {}
    out["train/ids"], out["train/positions"] = text_packs(train, tokenizer, TRAIN_PACKS)
    prompts = []
    for name in DOMAINS:
        rows = read(folder / f"{name}.valid.jsonl.gz")
        out[f"{name}/ids"], out[f"{name}/positions"] = text_packs(rows, tokenizer)
        found = tokenizer([plain(row) for row in rows], add_special_tokens=False)["input_ids"]
        prompts += [own[:PROMPT_LENGTH] for own in found if len(own) > 2 * PROMPT_LENGTH][:PROMPTS]
    random.Random(args.seed).shuffle(prompts)
    out["prompts"] = np.array(prompts[:PROMPTS], dtype=np.uint16)
    encoder = load_tokenizer(hub.resolve("minilm"))
    out |= encoder_arrays(read(folder / "general.train.jsonl.gz"), encoder, args.seed)
    save(args.out, out)
    print(f"{out['encoder/test'].mean():.2f} in test")


if __name__ == "__main__":
    main()
