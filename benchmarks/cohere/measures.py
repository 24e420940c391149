"""What a model is measured on: batches of one shape, and scores from token losses.

Shapes: B packs of a batch, S = 512 tokens of a pack, N batches, L labels of a batch, P sentences.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.lab.packs import Packs, training_steps
from benchmarks.lab.scores import accuracies
from sparsecraft.data.encoding import IGNORED

PARTS = ("held_out", "unseen", "general", "math", "code")
SEEDS = (0, 1, 2)


class CoherePacks(Packs):
    """The arrays that data.py wrote, and the embedding of every prompt."""

    def __init__(self, path: Path, rows: int | None = None):
        super().__init__(path, rows)
        del self.parts["prompts"]
        if rows:  # a trial: the questions whose every choice is there
            there = set(np.unique(self.parts["choice"]["owner"]).tolist())
            asked = [q for q in self.facts["choice"] if there.issuperset(range(*q["documents"]))]
            self.facts["choice"] = asked
        with np.load(path) as file:
            vectors_PD = file["prompts/values"] * file["prompts/scale"]
        self.vectors = torch.from_numpy(vectors_PD.astype(np.float32))
        self._sizes: dict[int, int] = {}

    def sentences(self, rows_NB: np.ndarray, part: str = "train") -> dict[str, Tensor]:
        """For every batch the embeddings of its prompts, and each token's place among them."""
        ids = [np.unique(self.parts[part]["sentence"][rows], return_inverse=True)
               for rows in rows_NB]  # fmt: skip
        width = self.most_sentences(rows_NB.shape[1])
        embedding = torch.zeros(len(ids), width, self.vectors.shape[1])
        for step, (found, _) in enumerate(ids):
            embedding[step, : len(found)] = self.vectors[torch.from_numpy(found.astype(np.int64))]
        places = np.stack([inverse.reshape(rows_NB.shape[1], -1) for _, inverse in ids])
        return {"embedding": embedding, "sentence": torch.from_numpy(places.astype(np.int64))}

    def most_sentences(self, batch: int) -> int:
        """Room for the prompts of any batch: the packs with the most, all in one."""
        if batch not in self._sizes:
            most = 0
            for arrays in self.parts.values():
                own = sorted(len(np.unique(pack)) for pack in arrays["sentence"])
                most = max(most, sum(own[-batch:]))
            self._sizes[batch] = -(-most // 64) * 64
        return self._sizes[batch]

    def steps(self, seed: int, steps: int, batch: int, by_sentence: bool) -> dict[str, Tensor]:
        """Every training step's tensors, of the same shapes for every seed."""
        labels = self.labels("train") != IGNORED
        most = 0
        for one in SEEDS:
            counts = labels[self.step_rows(one, steps, batch)].reshape(steps, -1).sum(1)
            most = max(most, int(counts.max()))
        out = training_steps(self, seed, steps, batch, room=-(-most // 512) * 512)
        del out["real_index"]
        if by_sentence:
            out |= self.sentences(self.step_rows(seed, steps, batch))
        return out


class Batches:
    """One part as stacked tensors, (N, ...); the last batch is filled with rows that count nowhere.

    `owner` (N, L) is the document of every label, `documents` for padding.
    """

    def __init__(self, packs: CoherePacks, part: str, batch: int, room: int, device: str):
        arrays, labels = packs.parts[part], packs.labels(part)
        number, extra = -(-len(labels) // batch), -len(labels) % batch
        rows = np.pad(np.arange(len(labels)), (0, extra)).reshape(number, batch)
        labels = labels[rows]
        labels[-1, batch - extra :] = IGNORED
        labels = labels.reshape(number, -1)
        owners = arrays["owner"][rows].reshape(number, -1).astype(np.int64)
        self.documents = int(arrays["owner"].max()) + 1
        index = np.zeros((number, room), dtype=np.int64)
        target = np.full((number, room), IGNORED, dtype=np.int64)
        owner = np.full((number, room), self.documents, dtype=np.int64)
        for step in range(number):
            found = np.flatnonzero(labels[step] != IGNORED)
            index[step, : len(found)] = found
            target[step, : len(found)] = labels[step][found]
            owner[step, : len(found)] = owners[step][found]
        tensors = {"index": index, "target": target, "owner": owner}
        for key in ("ids", "positions", "branch"):
            tensors[key] = arrays[key][rows].astype(np.int64)
        tensors["real"] = arrays["real"][rows]
        found = {key: torch.from_numpy(value) for key, value in tensors.items()}
        found |= packs.sentences(rows, part)
        self.tensors = {key: value.to(device) for key, value in found.items()}

    def __len__(self) -> int:
        return len(self.tensors["ids"])


def all_batches(packs: CoherePacks, batch: int, device: str) -> dict[str, Batches]:
    parts = (*PARTS, "choice")
    most = 0
    for part in parts:
        counts = (packs.labels(part) != IGNORED).sum(1)
        most = max(most, int(np.sort(counts)[-batch:].sum()))
    room = -(-most // 512) * 512
    return {part: Batches(packs, part, batch, room, device) for part in parts}


# ------------------------------------------------------------------ scores
def losses(totals: dict[str, Tensor], datasets: list[str]) -> dict:
    """Loss per label token of every part; `unseen` is the mean over its datasets."""
    valid = {part: float(found[0].sum() / found[1].sum()) for part, found in totals.items()}
    by = {}
    for name in sorted(set(datasets)):
        at = [i for i, own in enumerate(datasets) if own == name and i < totals["unseen"].shape[1]]
        found = totals["unseen"][:, at].sum(1)
        by[name] = float(found[0] / found[1])
    return {"valid": valid | {"unseen": statistics.mean(by.values())}, "unseen": by}


def choice_scores(questions: list[dict], totals_2D: Tensor) -> dict:
    """Accuracy by summed and by mean log-probability, the median over each task's templates.

    `ag_news` has two labels, 61:39: the area under the ROC curve and the balanced accuracy beside.
    """
    total, count = totals_2D[0].neg(), totals_2D[1]
    scores = {"sum": total.tolist(), "mean": (total / count).tolist()}
    out: dict = {name: accuracies(questions, values) for name, values in scores.items()}
    for name, values in scores.items():
        out[name]["average"] = statistics.mean(out[name].values())
        out[name] |= _two_labels([q for q in questions if q["task"] == "ag_news"], values)
    return out


def _two_labels(questions: list[dict], scores: list[float]) -> dict[str, float]:
    if not questions:  # a trial
        return {}
    areas, balanced = [], []
    for template in sorted({q["template"] for q in questions}):
        own = [q for q in questions if q["template"] == template]
        gap = np.array([scores[q["documents"][0] + 1] - scores[q["documents"][0]] for q in own])
        answer = np.array([q["answer"] for q in own])
        one, zero = gap[answer == 1], gap[answer == 0]
        pairs = one[:, None] - zero[None]
        areas.append(float((pairs > 0).mean() + (pairs == 0).mean() / 2))
        balanced.append(float(((one > 0).mean() + (zero < 0).mean()) / 2))
    return {
        "ag_news AUC": statistics.median(areas),
        "ag_news balanced": statistics.median(balanced),
    }
