"""Scorers: x_TD -> logits_TE, float32 (float64 of float64 tokens). T tokens, D width, E experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparsecraft.kernels.projections import float32_product
from sparsecraft.recipe import RouterSpec


class LinearScorer(nn.Module):
    """One bias-free row per expert (Shazeer et al. 2017; PESC Eq. 9; Mixtral)."""

    def __init__(self, width: int, num_experts: int, spec: RouterSpec, *, device=None, dtype=None):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(num_experts, width, device=device, dtype=dtype))
        if spec.init == "kaiming_uniform":  # the default of nn.Linear, which PESC's code keeps
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        elif spec.init == "normal":
            nn.init.normal_(self.weight, std=spec.init_std)
        else:
            nn.init.zeros_(self.weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        return float32_product(x_TD, self.weight)
