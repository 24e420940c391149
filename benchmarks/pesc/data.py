"""Data files -> packed arrays in one .npz, so that a GPU machine needs neither `datasets` nor TRL.

Shapes: N packs, S = 512 tokens of a pack.

    python benchmarks/packing.py --data ../shared/data --out packed.npz
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from sparsecraft.data.batches import collate
from sparsecraft.data.encoding import IGNORED, encode, pad_id
from sparsecraft.data.prepare import prepare
from sparsecraft.data.rows import load_choices
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer

LENGTH = 512
DOMAINS = ("general", "math", "code")
TASKS = ("sciq", "commonsense_qa", "cosmos_qa", "ag_news")
CHOICE_ROWS = 300  # per task, evenly spaced over the file


def arrays(packs: list[dict], pad: int) -> dict[str, np.ndarray]:
    """What a step needs, (N, S): ids, positions that restart per document, and two masks."""
    # A full pack goes along so that all are padded to LENGTH, and is dropped again.
    full = {"input_ids": [pad] * LENGTH, "labels": [IGNORED] * LENGTH, "seq_lengths": [LENGTH]}
    batch = collate([*packs, full], pad, packed=True)
    batch = {key: tensor[:-1].numpy() for key, tensor in batch.items()}
    return {
        "ids": batch["input_ids"].astype(np.uint16),
        "positions": batch["position_ids"].astype(np.uint16),
        "trained": batch["labels"] != IGNORED,
        "real": batch["token_mask"],
    }


def choice_rows(path: Path, tokenizer) -> tuple[list[dict], list[dict]]:
    """One document per choice, and per question what is needed to score it."""
    rows = load_choices(path)
    rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), CHOICE_ROWS)).astype(int)]
    documents, questions = [], []
    for row in rows:
        encoded = []
        for choice in row["choices"]:
            turns = [("user", row["prompt"]), ("assistant", choice)]
            messages = [{"role": role, "content": text} for role, text in turns]
            encoded.append(encode({"messages": messages}, tokenizer, LENGTH))
        if None in encoded:
            continue  # longer than a pack
        first = len(documents)
        documents += encoded
        questions.append(
            {
                "task": path.name.split(".")[0],
                "template": row.get("template", ""),
                "answer": row["answer"],
                "documents": [first, len(documents)],
            }
        )
    return documents, questions


def pack_in_order(documents: list[dict]) -> tuple[list[dict], np.ndarray]:
    """First fit in the order given, so that the document of every label stays known."""
    packs, owner = [], []
    for number, document in enumerate(documents):
        size = len(document["input_ids"])
        if not packs or len(packs[-1]["input_ids"]) + size > LENGTH:
            packs.append({"input_ids": [], "labels": [], "seq_lengths": []})
            owner.append([])
        for key in ("input_ids", "labels"):
            packs[-1][key] += list(document[key])
        packs[-1]["seq_lengths"].append(size)
        owner[-1] += [number] * size
    owner_NS = np.zeros((len(packs), LENGTH), dtype=np.uint16)
    for row, numbers in zip(owner_NS, owner, strict=True):
        row[: len(numbers)] = numbers
    return packs, owner_NS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("packed.npz"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = load_tokenizer(hub.resolve(args.model))
    pad = pad_id(tokenizer)
    out: dict[str, np.ndarray] = {}
    facts: dict[str, object] = {}
    options = {"max_length": LENGTH, "packing": True, "seed": args.seed}

    folder = args.data / "instruct"
    files = [folder / f"{domain}.train.jsonl.gz" for domain in DOMAINS]
    packs, facts["train"] = prepare(files, tokenizer, **options)
    parts = {"train": list(packs)}
    for domain in DOMAINS:
        packs, facts[domain] = prepare(folder / f"{domain}.valid.jsonl.gz", tokenizer, **options)
        parts[domain] = list(packs)
    packs, facts["gsm8k"] = prepare(folder / "gsm8k.test.jsonl.gz", tokenizer, **options)
    parts["gsm8k"] = list(packs)
    documents, questions = [], []
    for task in TASKS:
        new, asked = choice_rows(args.data / "choice" / f"{task}.jsonl.gz", tokenizer)
        for question in asked:
            question["documents"] = [len(documents) + n for n in question["documents"]]
        documents, questions = documents + new, questions + asked
    parts["choice"], out["choice/owner"] = pack_in_order(documents)
    for name, packs in parts.items():
        out |= {f"{name}/{key}": value for key, value in arrays(packs, pad).items()}
    facts["choice"] = questions
    out["facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **out)
    for name in parts:
        print(
            name,
            facts.get(name) if name != "choice" else len(questions),
            out[f"{name}/ids"].shape,
            "real",
            round(float(out[f"{name}/real"].mean()), 4),
            "trained",
            round(float(out[f"{name}/trained"].mean()), 4),
        )
    print(
        "templates", {t: len({q["template"] for q in questions if q["task"] == t}) for t in TASKS}
    )


if __name__ == "__main__":
    main()
