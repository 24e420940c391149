"""The network that is fitted to a Linear, to run instead of it: what split experts are made of."""

from __future__ import annotations

import torch
from torch import nn

from sparsecraft.dense.donors import FFN, Linear
from sparsecraft.recipe.experts import SplitSpec


def imitation(
    spec: SplitSpec, donor: Linear, *, device: torch.device | str, dtype: torch.dtype
) -> FFN:
    """A random ReLU network of about the Linear's cost, to be fitted to it (D2DMoE, section 3.4).

    Its width is phi (I O + O) / (I + O + 1), to the nearest multiple of the number of experts.
    """
    I, O, E = donor.in_features, donor.out_features, spec.num_experts
    wanted = spec.flops_factor * (I * O + O) / (I + O + 1)
    width = max(1, round(wanted / E)) * E
    where = {"device": device, "dtype": dtype}
    return FFN(
        path=donor.path,
        gate=None,
        up=Linear(nn.Linear(I, width, **where), donor.path),
        down=Linear(nn.Linear(width, O, **where), donor.path),
        activation=nn.ReLU(),
        fused=False,
        hidden_dropout=0.0,
        output_dropout=0.0,
    )
