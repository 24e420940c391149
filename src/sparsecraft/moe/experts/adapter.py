"""Experts that are bottleneck adapters with a residual.

Shapes: n tokens, E experts, D features, H bottleneck width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from sparsecraft.errors import RecipeError, did_you_mean
from sparsecraft.kernels.two_layer import TwoLayer
from sparsecraft.moe.experts.base import Experts
from sparsecraft.recipe.experts import AdapterSpec


class AdapterExperts(Experts):
    """PESC's adapters (Wu et al. 2024, Eq. 8): x + s * up(GELU(down(dropout(x)))), no biases.

    `up` starts at zero, so that every expert starts as the identity.
    """

    residual = True
    # The largest count at which all experts at once lose nowhere on an H200, with a CUDA graph or
    # without (benchmarks/pesc_layer.md).
    dense_tokens = 128

    def __init__(self, spec: AdapterSpec, width: int, *, device=None, dtype=None):
        super().__init__()
        self.num_experts, self.out_features = spec.num_experts, width
        self.dropout, self.scale = spec.dropout, spec.scale
        if spec.activation not in ACT2FN:
            raise RecipeError(
                f"Unknown activation {spec.activation!r}." + did_you_mean(spec.activation, ACT2FN)
            )
        self.activation = ACT2FN[spec.activation]
        self.down = nn.Parameter(
            torch.empty(spec.num_experts, spec.dim, width, device=device, dtype=dtype)
        )
        self.up = nn.Parameter(
            torch.zeros(spec.num_experts, width, spec.dim, device=device, dtype=dtype)
        )
        for down_HD in self.down:  # one at a time: the fan-in is D, not E * D
            nn.init.kaiming_uniform_(down_HD, a=math.sqrt(5))

    def expert(self, e: int, x: Tensor) -> Tensor:
        hidden = F.linear(F.dropout(x, self.dropout, self.training), self.down[e].to(x.dtype))
        return x + self.scale * F.linear(self.activation(hidden), self.up[e].to(x.dtype))

    def two_layer(self, dtype: torch.dtype) -> TwoLayer:
        return TwoLayer(
            first_EMI=self.down.to(dtype),
            second_EOH=self.up.to(dtype),
            activate=self.activation,
            scale=self.scale,
            input_dropout=self.dropout if self.training else 0.0,
            residual=True,
        )
