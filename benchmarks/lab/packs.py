"""Packed chats: arrays of an .npz, and the tensors of every step made of them.

Shapes: N packs, B packs of a batch, S = 512 tokens of a pack.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsecraft.data.encoding import IGNORED


class Packs:
    """The arrays of a file, by part."""

    def __init__(self, path: Path, rows: int | None = None):
        with np.load(path) as file:
            self.parts: dict[str, dict[str, np.ndarray]] = {}
            for name in file.files:
                if "/" in name:
                    part, key = name.split("/")
                    self.parts.setdefault(part, {})[key] = file[name][:rows]
            self.facts = json.loads(file["facts"].tobytes())

    def labels(self, part: str) -> np.ndarray:
        """(N, S): the token that each position has to predict, IGNORED where none."""
        arrays = self.parts[part]
        target = np.where(arrays["trained"], arrays["ids"].astype(np.int64), IGNORED)
        return np.concatenate([target[:, 1:], np.full_like(target[:, :1], IGNORED)], axis=1)

    def step_rows(self, seed: int, steps: int, batch: int) -> np.ndarray:
        """(steps, batch): the packs of every step, in the order of `seed`."""
        order = np.random.default_rng(seed).permutation(len(self.parts["train"]["ids"]))
        return order[: steps * batch].reshape(steps, batch)


class Recorded(Packs):
    """One batch of another loop as packs, for one step."""

    def __init__(self, batch: dict[str, Tensor]):
        found = {key: value.cpu().numpy() for key, value in batch.items()}
        self.parts = {
            "train": {
                "ids": found["input_ids"],
                "positions": found["position_ids"],
                "trained": found["labels"] != IGNORED,
                "real": found["real"],
            }
        }
        self.facts = {}

    def step_rows(self, seed: int, steps: int, batch: int) -> np.ndarray:
        return np.arange(batch).reshape(1, batch)


def training_steps(
    packs: Packs, seed: int, steps: int, batch: int, room: int = 5120
) -> dict[str, Tensor]:
    """Every step's tensors, stacked; of one shape, so that a CUDA graph can replay them.

    label_index (L) are the positions that predict a trained token, padded with position 0 and an
    ignored target. real_index (R) are the first R real tokens, R the fewest of any step: the
    balance loss sees at least 97 % of the real tokens and no padding. L is `room` at least, for
    the other seeds' steps.
    """
    arrays, labels = packs.parts["train"], packs.labels("train")
    rows = packs.step_rows(seed, steps, batch)
    label_SB = labels[rows].reshape(steps, -1)
    real = arrays["real"][rows].reshape(steps, -1)
    most, fewest = int((label_SB != IGNORED).sum(1).max()), int(real.sum(1).min())
    most = max(room, -(-most // 512) * 512)
    label_index = np.zeros((steps, most), dtype=np.int64)
    targets = np.full((steps, most), IGNORED, dtype=np.int64)
    real_index = np.zeros((steps, fewest), dtype=np.int64)
    for step in range(steps):
        found = np.flatnonzero(label_SB[step] != IGNORED)
        label_index[step, : len(found)] = found
        targets[step, : len(found)] = label_SB[step][found]
        real_index[step] = np.flatnonzero(real[step])[:fewest]
    stacked = {
        "ids": arrays["ids"][rows].astype(np.int64),
        "positions": arrays["positions"][rows].astype(np.int64),
        "label_index": label_index,
        "targets": targets,
        "real_index": real_index,
    }
    return {key: torch.from_numpy(value) for key, value in stacked.items()} | {
        "real_tokens": torch.tensor(int(real.sum()))
    }


def document_mask(positions_BS: Tensor, branch_BS: Tensor | None = None) -> Tensor:
    """(B, 1, S, S), True where a token may look: earlier in its own document.

    What transformers builds from the same position_ids, without its wait for the host. Branches
    of a document, 1 and up, see its trunk, 0, and themselves.
    """
    document_BS = (positions_BS == 0).cumsum(1)
    same = document_BS[:, None, :, None] == document_BS[:, None, None, :]
    if branch_BS is not None:
        trunk, own = branch_BS[:, None, None, :] == 0, branch_BS[:, None, :, None]
        same = same & (trunk | (branch_BS[:, None, None, :] == own))
    return same.tril()
