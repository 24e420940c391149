"""Data files -> arrays of packs in one .npz, so that a GPU machine needs no tokenizer.

Shapes: N packs, S tokens of a pack.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np

LENGTH = 512
DOMAINS = ("general", "math", "code")
TASKS = ("sciq", "commonsense_qa", "cosmos_qa", "ag_news")


def options(out: str) -> argparse.ArgumentParser:
    """What every script of data takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seed", type=int, default=0)
    return parser


def read(path: Path) -> list[dict]:
    """Rows as they are: with their `source`, which `data.load_rows` leaves out."""
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def plain(row: dict) -> str:
    """A row as text: its turns, without chat marks, which cost nothing to predict."""
    return "\n".join(message["content"] for message in row["messages"])


def text_packs(
    rows: list[dict], tokenizer, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
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


def encoded_choices(row: dict, encode_one) -> list:
    """`encode_one` of the chat of every choice of a question."""
    found = []
    for choice in row["choices"]:
        turns = [("user", row["prompt"]), ("assistant", choice)]
        messages = [{"role": role, "content": text} for role, text in turns]
        found.append(encode_one({"messages": messages}))
    return found


def save(path: Path, arrays: dict[str, np.ndarray], facts: dict | None = None) -> None:
    """Write the arrays, and `facts` as JSON among them; say what there is."""
    if facts is not None:
        arrays = arrays | {"facts": np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    for name, array in arrays.items():
        print(name, array.shape, array.dtype)
    print(f"{path.stat().st_size / 2**20:.1f} MiB")
