"""Data files -> packed arrays: a clean split of P3, and choices as trees.

Shapes: N packs, S = 512 tokens of a pack, P prompts.

    python -m benchmarks.cohere.data --data ../shared/data --out cohere.npz
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.lab.corpus import LENGTH, TASKS, encoded_choices, options, read, save
from sparsecraft.data.encoding import IGNORED, encode
from sparsecraft.data.limits import pad_id
from sparsecraft.data.rows import load_choices
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer

# Whole datasets that training never sees, one of each kind of task, and how many rows of each.
UNSEEN = ("adversarial_qa", "amazon_polarity", "gigaword", "glue_mrpc", "quartz")
UNSEEN_ROWS = 240
HELD_OUT = 800  # rows whose underlying examples training never sees
GRAM, TEMPLATE = 8, 30  # words of a gram; a gram in more rows than this is the template's


# ------------------------------------------------------------------ the split
def text(row: dict) -> str:
    return " ".join(message["content"] for message in row["messages"])


def grams(row: dict) -> set[str]:
    words = text(row).lower().split()
    return {" ".join(words[i : i + GRAM]) for i in range(max(1, len(words) - GRAM + 1))}


def examples(rows: list[dict]) -> list[int]:
    """Row -> its group: rows that share a gram which is no template's, or a long answer."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    found = [grams(row) | _answers(row) for row in rows]
    count = Counter(gram for own in found for gram in own)
    first: dict[str, int] = {}
    for i, own in enumerate(found):
        for gram in own:
            if count[gram] <= TEMPLATE:
                parent[root(i)] = root(first.setdefault(gram, i))
    return [root(i) for i in range(len(rows))]


def _answers(row: dict) -> set[str]:
    answer = row["messages"][-1]["content"].strip().lower()
    return {f"= {answer}"} if len(answer) >= 20 else set()


def dataset_of(row: dict) -> str:
    return next((name for name in UNSEEN if row["source"].startswith(f"p3/{name}")), "")


def split(rows: list[dict], seed: int) -> dict[str, list[dict]]:
    """train; held_out, whose underlying examples train has not; unseen, of datasets it has not."""
    rng = random.Random(seed)
    parts: dict[str, list[dict]] = {"train": [], "held_out": [], "unseen": []}
    for name in UNSEEN:
        own = [row for row in rows if dataset_of(row) == name]
        parts["unseen"] += rng.sample(own, min(UNSEEN_ROWS, len(own)))
    rest = [row for row in rows if not dataset_of(row)]
    groups: dict[int, list[dict]] = defaultdict(list)
    for row, group in zip(rest, examples(rest), strict=True):
        groups[group].append(row)
    order = list(groups.values())
    rng.shuffle(order)
    for group in order:  # large groups hang together by chance
        small = len(group) <= 40 and len(parts["held_out"]) < HELD_OUT
        parts["held_out" if small else "train"] += group
    return parts


def shared(rows: list[dict], train: list[dict]) -> float:
    """Share of rows with more than half of their own (no template's) grams in the training rows."""
    count = Counter(gram for row in [*train, *rows] for gram in grams(row))
    seen = {gram for row in train for gram in grams(row)}
    own = [[g for g in grams(row) if count[g] <= TEMPLATE] for row in rows]
    return sum(2 * sum(g in seen for g in o) > len(o) for o in own) / len(rows)


# ------------------------------------------------------------------ documents
def document(row: dict, tokenizer) -> dict | None:
    found = encode(row, tokenizer, LENGTH)
    if found is None:
        return None
    size = len(found["input_ids"])
    return {
        "ids": found["input_ids"],
        "trained": [label != IGNORED for label in found["labels"]],
        "positions": list(range(size)),
        "branch": [0] * size,
        "prompt": row["messages"][0]["content"],
    }


def tree(row: dict, tokenizer, first: int) -> dict | None:
    """The prompt once and every choice as a branch, which opens with the prompt's last token.

    Branches do not see each other. `owner` counts the choices from `first`.
    """
    out: dict = {key: [] for key in ("ids", "trained", "positions", "branch", "owner")}
    encoded = encoded_choices(row, lambda chat: encode(chat, tokenizer, LENGTH))
    if None in encoded:
        return None
    for number, found in enumerate(encoded):
        ids = found["input_ids"]
        trained = [label != IGNORED for label in found["labels"]]
        start = trained.index(True)
        if number == 0:
            prompt, begin = ids[:start], 0
        else:
            begin = start - 1
        if ids[:start] != prompt:
            raise ValueError(f"the prompt's tokens depend on the choice: {row['prompt'][:80]!r}")
        branch = [0] * (start - 1 - begin) + [number + 1] * (len(ids) - max(start - 1, begin))
        out["ids"] += ids[begin:]
        out["trained"] += trained[begin:]
        out["positions"] += range(begin, len(ids))
        out["branch"] += branch
        out["owner"] += [first + number] * (len(ids) - begin)
    return out | {"prompt": row["prompt"]} if len(out["ids"]) <= LENGTH else None


def choices(folder: Path, tokenizer) -> tuple[list[dict], list[dict], Counter]:
    documents, questions, dropped = [], [], Counter()
    total = 0
    for task in TASKS:
        for row in load_choices(folder / f"{task}.jsonl.gz"):
            found = tree(row, tokenizer, total)
            if found is None:
                dropped[task] += 1
                continue
            documents.append(found)
            number = len(row["choices"])
            facts = {"task": task, "template": row.get("template", ""), "answer": row["answer"]}
            questions.append(facts | {"documents": [total, total + number]})
            total += number
    return documents, questions, dropped


# ------------------------------------------------------------------ packs
def best_fit(sizes: list[int]) -> list[list[int]]:
    """Bins of LENGTH tokens: the longest first, each into the fullest bin with room."""
    bins: list[list[int]] = []
    room: dict[int, list[int]] = defaultdict(list)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        left = next((r for r in range(sizes[item], LENGTH + 1) if room[r]), None)
        if left is None:
            left = LENGTH
            room[left].append(len(bins))
            bins.append([])
        at = room[left].pop()
        bins[at].append(item)
        room[left - sizes[item]].append(at)
    return bins


def arrays(documents: list[dict], prompts: dict[str, int], pad: int) -> dict[str, np.ndarray]:
    """(N, S) of every array that a step needs; padding is documents of one token."""
    bins = best_fit([len(d["ids"]) for d in documents])
    shape = len(bins), LENGTH
    kinds = {"ids": np.uint16, "positions": np.uint16, "branch": np.uint8, "owner": np.uint16}
    kinds |= {"sentence": np.uint16, "trained": bool, "real": bool}
    out = {key: np.zeros(shape, dtype) for key, dtype in kinds.items()}
    out["ids"][:] = pad
    for pack, items in enumerate(bins):
        start = 0
        for item in items:
            own = documents[item]
            at = slice(start, start + len(own["ids"]))
            for key in ("ids", "positions", "branch", "trained"):
                out[key][pack, at] = own[key]
            out["owner"][pack, at] = own.get("owner", item)
            out["sentence"][pack, at] = prompts.setdefault(own["prompt"], len(prompts))
            out["real"][pack, at] = True
            start = at.stop
    return out


def stand_in(texts: list[str]) -> np.ndarray:
    """Random unit vectors, for trials without the sentence encoder."""
    found = np.random.default_rng(0).standard_normal((len(texts), 384), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def encoder(name: str) -> Callable[[list[str]], np.ndarray]:
    if name == "none":
        return stand_in
    from sparsecraft.data.sentences import embed

    return lambda texts: embed(texts).float().cpu().numpy()


def quantized(vectors_PD: np.ndarray) -> dict[str, np.ndarray]:
    """Eight bits and a scale for each vector: float16 would not travel beside the model."""
    scale_P1 = np.abs(vectors_PD).max(1, keepdims=True) / 127
    return {
        "prompts/values": np.round(vectors_PD / scale_P1).astype(np.int8),
        "prompts/scale": scale_P1.astype(np.float32),
    }


def main() -> None:
    parser = options("cohere.npz")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--encoder", default="minilm", help="`none`: random vectors, for a trial")
    args = parser.parse_args()
    tokenizer = load_tokenizer(hub.resolve(args.model))
    folder = args.data / "instruct"
    parts = split(read(folder / "general.train.jsonl.gz"), args.seed)
    for name in ("general", "math", "code"):
        parts[name] = read(folder / f"{name}.valid.jsonl.gz")
    facts: dict = {"shared": {n: shared(parts[n], parts["train"]) for n in list(parts)[1:4]}}
    out, prompts = {}, {}
    for name, own in parts.items():
        found = [(row, document(row, tokenizer)) for row in own]
        kept = [(row, doc) for row, doc in found if doc]
        if name == "unseen":
            facts["datasets"] = [dataset_of(row) for row, _ in kept]
        facts[name] = {"rows": len(own), "kept": len(kept)}
        new = arrays([doc for _, doc in kept], prompts, pad_id(tokenizer))
        out |= {f"{name}/{key}": value for key, value in new.items()}
        print(name, facts[name], "filled", round(float(new["real"].mean()), 4))
    documents, facts["choice"], dropped = choices(args.data / "choice", tokenizer)
    new = arrays(documents, prompts, pad_id(tokenizer))
    out |= {f"choice/{key}": value for key, value in new.items()}
    facts |= {"choice_dropped": dropped, "encoder": args.encoder, "prompts": len(prompts)}
    out |= quantized(encoder(args.encoder)(list(prompts)))
    save(args.out, out, facts)
    print("dropped choices", dict(dropped), "shared grams", facts["shared"])


if __name__ == "__main__":
    main()
