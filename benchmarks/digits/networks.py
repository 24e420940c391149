"""The networks of Krishnamurthy et al. for 28 x 28 images, on images of 8 x 8, and the images.

Shapes: B samples, H features of a hidden layer, C classes, D features of the gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLASSES, HIDDEN, PLACES = 10, 32, 6 * 6  # of one channel after a convolution of 3 x 3
TRAINED = 1200  # of 1797 samples; the others are held out


class Expert(nn.Module):
    """conv(1 channel, 3 x 3)-fc5-fc32, and logits."""

    def __init__(self, narrow: int = 5, hidden: int = HIDDEN):
        super().__init__()
        first = (nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(PLACES, narrow), nn.ReLU())
        self.body = nn.Sequential(*first, nn.Linear(narrow, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden_BH = self.body(x)
        return hidden_BH, self.head(hidden_BH)


def trunk() -> nn.Module:
    """The gate's conv-fc128-fc32."""
    first = (nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(PLACES, 128), nn.ReLU())
    return nn.Sequential(*first, nn.Linear(128, HIDDEN), nn.ReLU())


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True, slots=True)
class Digits:
    """Samples (B, 1, 8, 8) from 0 to 1 and their classes, drawn apart by a seed."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor

    @classmethod
    def drawn(cls, seed: int) -> Digits:
        from sklearn.datasets import load_digits

        found = load_digits()
        x = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
        y = torch.tensor(found.target, dtype=torch.long)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        own, held = order[:TRAINED], order[TRAINED:]
        return cls(x[own], y[own], x[held], y[held])
