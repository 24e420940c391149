"""A router scores tokens against experts and selects some of them. T tokens, D width, E experts."""

from __future__ import annotations

from torch import Tensor, nn

from sparsecraft.recipe import RouterSpec
from sparsecraft.routing import Routing


class Router(nn.Module):
    """A scorer, x_TD -> logits_TE, followed by a selector, logits_TE -> weights and indices."""

    def __init__(self, scorer: nn.Module, spec: RouterSpec, select):
        super().__init__()
        self.scorer = scorer
        self.spec = spec
        self.select = select

    def forward(self, x_TD: Tensor) -> Routing:
        # float32 throughout: bf16 logits tie often enough to change which experts are chosen.
        logits_TE = self.scorer(x_TD) / self.spec.temperature
        weights_TK, indices_TK = self.select(logits_TE)
        return Routing(weights_TK, indices_TK, logits_TE)

    def extra_repr(self) -> str:
        return f"select={self.spec.select}, top_k={self.spec.top_k}"
