"""Experts that are bottleneck adapters with a residual.

Shapes: n tokens, E experts, D features, H bottleneck width.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from sparsecraft.dense.donors import Donor
from sparsecraft.dense.sites import Site
from sparsecraft.errors import RecipeError, did_you_mean
from sparsecraft.kernels.two_layer import TwoLayer
from sparsecraft.moe.experts.base import Experts, Rate
from sparsecraft.recipe.edits import Edit, Place
from sparsecraft.recipe.experts import AdapterSpec


class AdapterExperts(Experts):
    """PESC's adapters (Wu et al. 2024, Eq. 8): x + s * up(GELU(down(dropout(x)))), no biases.

    `up` starts at zero, so that every expert starts as the identity.
    """

    dropout = Rate()
    residual = True
    # The largest count at which all experts at once lose nowhere on an H200, with a CUDA graph or
    # without (benchmarks/layer/pesc.md).
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
        for down_HD in self.down if not self.down.is_meta else ():
            # One at a time: the fan-in is D, not E * D.
            nn.init.kaiming_uniform_(down_HD, a=math.sqrt(5))

    @classmethod
    def build(
        cls,
        spec: AdapterSpec,
        donor: Donor,
        site: Site,
        place: Place,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        return cls(spec, donor.out_features, device=device, dtype=dtype)

    def expert(self, e: int, x: Tensor) -> Tensor:
        hidden = F.linear(F.dropout(x, self.dropout, self.training), self.down[e].to(x.dtype))
        return x + self.scale * F.linear(self.activation(hidden), self.up[e].to(x.dtype))

    def two_layer(self, dtype: torch.dtype) -> TwoLayer:
        return TwoLayer(
            first_EMI=self.down.to(dtype),
            second_EOH=self.up.to(dtype),
            activate=self.activation,
            activation=self.activation,
            scale=self.scale,
            input_dropout=self.dropout if self.training else 0.0,
            residual=True,
        )

    def why_no_fold(self, edit: Edit, site: Site, single: bool) -> str:
        return "an adapter has an activation inside, and no dense Linear computes that"

    def joined(self, weights_E: Tensor) -> dict[str, Tensor]:
        """One adapter of width E H: x + s [w_1 U_1 ... w_E U_E] act([D_1; ...; D_E] x)."""
        down_EHD, up_EDH = self.down.detach(), self.up.detach()
        up_EDH = up_EDH.double() * weights_E[:, None, None]
        up_1DN = up_EDH.permute(1, 0, 2).flatten(1)[None]
        return {"down": down_EHD.flatten(0, 1)[None], "up": up_1DN}
