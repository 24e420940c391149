"""The attentive scorer: what a token asks for is compared with what every expert gives for it.

Shapes: T tokens, D width, E experts, O width of what experts give, H width of queries and keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparsecraft.kernels.projections import float32_product
from sparsecraft.moe.routers.scorer import Scorer
from sparsecraft.moe.routers.starts import draw
from sparsecraft.recipe.scorers import Attentive


class AttentiveScorer(Scorer):
    """Q . K_i / sqrt(H) with Q = W_q h_g and K_i = W_k h_i, h_g the token and h_i what expert i
    gives for it (Krishnamurthy et al. 2023). No parameter here is an expert's own."""

    def __init__(
        self,
        spec: Attentive,
        width: int,
        num_experts: int,
        *,
        outputs: int,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.width, self.num_experts = width, num_experts
        at = {"device": device, "dtype": dtype}
        self.query = nn.Parameter(draw(spec.query, torch.empty(spec.dim, width, **at)))
        self.key = nn.Parameter(draw(spec.start, torch.empty(spec.dim, outputs, **at)))

    def forward(self, x_TD: Tensor, y_TEO: Tensor) -> Tensor:
        # Q . (W_k h_i) = (W_k^T Q) . h_i: one more vector for a token, and no keys of all experts.
        query_TH = float32_product(x_TD, self.query)
        asked_TO = float32_product(query_TH, self.key.t())
        with torch.autocast(x_TD.device.type, enabled=False):  # which would multiply in bf16
            logits_TE = torch.einsum("to,teo->te", asked_TO, y_TEO.to(asked_TO.dtype))
        return logits_TE / math.sqrt(len(self.query))

    def remove(self, e: int) -> None:
        self.num_experts -= 1

    @property
    def repeated(self) -> int:
        return self.num_experts * self.key.shape[1]
