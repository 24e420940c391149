"""What experts with constant weights are of dense weights: what `Experts.fold` gives.

Shapes: I input features, O output features, D width, F hidden width, G = 2 parts of the first
matrix where a network has a gate (its rows come first), else 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Update:
    """W + delta.

    Attributes:
        deltas: part of the network (`gate`, `up`, `down`), or "" for the only Linear, -> (O, I) in
            float64.
    """

    deltas: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Scale:
    """Features times a vector: diag(l) W behind a Linear, W diag(l) in front of one.

    Attributes:
        factors_O: l in float64, one for each feature that the experts stand at.
    """

    factors_O: Tensor


@dataclass(frozen=True, slots=True)
class Network:
    """A whole feed-forward network in the place of the dense one.

    Attributes:
        first: (G F, D), and its bias (G F,) or None.
        down: (D, F), and its bias (D,) or None.
        rectified: its activation is ReLU, and the dense network's another.
        activation: tensors of its activation, by their names in that.
    """

    first: Tensor
    first_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    rectified: bool = False
    activation: Mapping[str, Tensor] = field(default_factory=dict)
