"""Scorers: x_TD -> logits_TE, float32 (float64 of float64 tokens). T tokens, D width, E experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecraft.kernels.projections import float32_product, is_plain
from sparsecraft.moe.experts.stacked import with_one_more, without
from sparsecraft.moe.routers.scorer import Scorer
from sparsecraft.moe.routers.starts import draw
from sparsecraft.recipe.scorers import Linear


class LinearScorer(Scorer):
    """One bias-free row per expert (Shazeer et al. 2017; PESC Eq. 9; Mixtral).

    Attributes:
        extended: number of rows, the last ones, that came one at a time. Each is a product of its
            own, because in one of another shape the last bits of the others' logits may differ.
    """

    def __init__(self, spec: Linear, width: int, num_experts: int, *, device=None, dtype=None):
        super().__init__()
        self.spec, self.width, self.extended = spec, width, spec.extended
        weight = torch.empty(num_experts // spec.repeat, width, device=device, dtype=dtype)
        weight = draw(spec.start, weight)
        self.weight = nn.Parameter(weight.repeat_interleave(spec.repeat, dim=0))

    @torch.no_grad()
    def begin(self, rows_ED: Tensor) -> None:
        """Start from what data say of each expert: the rows' distances to their mean, as large as
        the start wants them."""
        rows_ED = rows_ED.double() - rows_ED.double().mean(0)
        size = rows_ED.square().mean().sqrt().item()
        self.weight.copy_(rows_ED * self.spec.start.factor(size) if size > 0 else rows_ED)

    def forward(self, x_TD: Tensor) -> Tensor:
        if not self.extended:
            return float32_product(x_TD, self.weight)
        rows = [len(self.weight) - self.extended, *[1] * self.extended]
        parts = [float32_product(x_TD, rows_ED) for rows_ED in self.weight.split(rows)]
        return torch.cat(parts, dim=-1)

    @torch.no_grad()
    def append(self, row_D: Tensor) -> None:
        """One more expert, the last, with this row. The logits of the others stay the same bits."""
        self.weight = with_one_more(self.weight, row_D)
        self.extended += 1

    @torch.no_grad()
    def remove(self, e: int) -> None:
        """Take expert `e` away. The logits of the others stay the same bits if it was appended, and
        but for rounding if not."""
        appended = e >= len(self.weight) - self.extended
        self.weight = without(self.weight, e)
        # Where none is left from the start, the first that came later takes its place.
        self.extended = min(self.extended - appended, len(self.weight) - 1)

    def weight_rows(self) -> Tensor:
        return self.weight

    def joint_rows(self) -> Tensor | None:
        return self.weight if is_plain(self, LinearScorer) and not self.extended else None
