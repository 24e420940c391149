"""Scorers: x_TD -> logits_TE, float32 (float64 of float64 tokens). T tokens, D width, E experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.recipe import RouterSpec


class LinearScorer(nn.Module):
    """One bias-free row per expert (Shazeer et al. 2017; PESC Eq. 9; Mixtral)."""

    def __init__(self, width: int, num_experts: int, spec: RouterSpec, *, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width, device=device, dtype=dtype))
        if spec.init == "kaiming_uniform":  # the default of nn.Linear, which PESC's code keeps
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        elif spec.init == "normal":
            nn.init.normal_(self.weight, std=spec.init_std)
        else:
            nn.init.zeros_(self.weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        # Without this, autocast would compute the product in bf16 all the same.
        with torch.autocast(x_TD.device.type, enabled=False):
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            return F.linear(x_TD.to(dtype), self.weight.to(dtype))
