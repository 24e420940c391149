"""Data files -> packed arrays in one .npz, so that a GPU machine needs neither `datasets` nor TRL.

Shapes: N packs, S = 512 tokens of a pack.

    python -m benchmarks.pesc.data --data ../shared/data --out packed.npz
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.lab.corpus import DOMAINS, LENGTH, TASKS, encoded_choices, options, save
from sparsecraft.data.batches import collate
from sparsecraft.data.encoding import IGNORED, encode
from sparsecraft.data.limits import pad_id
from sparsecraft.data.prepare import prepare
from sparsecraft.data.rows import load_choices
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer

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
        encoded = encoded_choices(row, lambda chat: encode(chat, tokenizer, LENGTH))
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
    parser = options("packed.npz")
    parser.add_argument("--model", default="smollm2")
    args = parser.parse_args()
    tokenizer = load_tokenizer(hub.resolve(args.model))
    packing = {"max_length": LENGTH, "packing": True, "seed": args.seed}
    out: dict[str, np.ndarray] = {}
    facts: dict[str, object] = {}
    folder = args.data / "instruct"
    sources = {"train": [folder / f"{domain}.train.jsonl.gz" for domain in DOMAINS]}
    sources |= {domain: folder / f"{domain}.valid.jsonl.gz" for domain in DOMAINS}
    sources["gsm8k"] = folder / "gsm8k.test.jsonl.gz"
    parts = {}
    for name, source in sources.items():
        packs, facts[name] = prepare(source, tokenizer, **packing)
        parts[name] = list(packs)
        print(name, facts[name])
    documents, questions = [], []
    for task in TASKS:
        new, asked = choice_rows(args.data / "choice" / f"{task}.jsonl.gz", tokenizer)
        for question in asked:
            question["documents"] = [len(documents) + n for n in question["documents"]]
        documents, questions = documents + new, questions + asked
    parts["choice"], out["choice/owner"] = pack_in_order(documents)
    for name, packs in parts.items():
        out |= {f"{name}/{key}": v for key, v in arrays(packs, pad_id(tokenizer)).items()}
    save(args.out, out, facts | {"choice": questions})
    templates = {task: {q["template"] for q in questions if q["task"] == task} for task in TASKS}
    print("templates", {task: len(found) for task, found in templates.items()})


if __name__ == "__main__":
    main()
