"""Experts that are vectors, and scale features.

Shapes: T tokens, E experts, O features, V features of one head.
"""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor, nn

from sparsecraft.dense.donors import Donor
from sparsecraft.dense.sites import Site
from sparsecraft.kernels.vectors import mix_vectors
from sparsecraft.moe.experts.base import Experts
from sparsecraft.moe.experts.folded import Scale
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.edits import Edit, Place
from sparsecraft.recipe.experts import VectorSpec


class VectorExperts(Experts):
    """Vectors that scale features, x * l_e, as (IA)3's do (Liu et al. 2022); ones at the start.

    A mixture of them is one vector for each token (MoV, Zadouri et al. 2023). A router that
    decides by head gives each head of a token its own mixture.
    """

    residual = True  # l x = x + (l - 1) x
    merges = True
    folds = Scale

    def __init__(self, spec: VectorSpec, width: int, *, device=None, dtype=None):
        super().__init__()
        self.num_experts, self.out_features = spec.num_experts, width
        ones = torch.ones(spec.num_experts, width, device=device, dtype=dtype)
        if spec.init_std:
            ones += spec.init_std * torch.randn_like(ones)
        self.vectors = nn.Parameter(ones)

    @classmethod
    def build(
        cls,
        spec: VectorSpec,
        donor: Donor,
        site: Site,
        place: Place,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        width = donor.in_features if place == "before" else donor.out_features
        return cls(spec, width, device=device, dtype=dtype)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return x * self.vectors[e].to(x.dtype)

    def forward(self, x_TO: Tensor, routing: Routing | None = None) -> Tensor:
        heads = 1 if routing is None else len(routing.indices_TK) // max(1, len(x_TO))
        if heads > 1 and not self.runs_merged:
            return self._by_head(heads, x_TO, routing)
        return super().forward(x_TO, routing)

    def _by_head(self, heads: int, x_TO: Tensor, routing: Routing) -> Tensor:
        """The same by one bank for each head."""
        T, columns = len(x_TO), []
        parts = zip(x_TO.chunk(heads, dim=1), self.vectors.chunk(heads, dim=1), strict=True)
        for head, (x_TV, vectors_EV) in enumerate(parts):
            one = Routing(
                *(t.reshape(T, heads, -1)[:, head] for t in (
                    routing.weights_TK, routing.indices_TK, routing.logits_TE,
                )),
                sums_to_one=routing.sums_to_one,
            )  # fmt: skip
            bank = copy.copy(self)
            bank._parameters = {"vectors": vectors_EV}
            bank.out_features = vectors_EV.shape[1]
            columns.append(bank(x_TV, one))
        return torch.cat(columns, dim=1)

    def merged(self, x_TO: Tensor, routing: Routing) -> Tensor:
        return mix_vectors(x_TO, routing.weights_TE(), self.vectors, routing.sums_to_one)

    def why_no_fold(self, edit: Edit, site: Site, single: bool) -> str | None:
        if edit.place == "before" and site.kind == "activation":
            return "a vector before the activation does not commute with it"
        return None

    def fold(self, weights_E: Tensor) -> Scale:
        return Scale(torch.einsum("e,eo->o", weights_E, self.vectors.detach().double()))
