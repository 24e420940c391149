"""Logits that go on from those of the layer before. T tokens, D width, E experts, P of the layer
before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecraft.errors import SparsecraftError
from sparsecraft.kernels.projections import float32_product
from sparsecraft.moe.routers.scorer import Scorer
from sparsecraft.moe.routers.starts import draw
from sparsecraft.recipe.residual import Residual


class ResidualScorer(Scorer):
    """See `sparsecraft.recipe.residual.Residual`.

    Attributes:
        weight: W, (E, D); None where a tanh layer is in its place.
        first, second: A, (hidden E, D), and B, (E, hidden E), of that.
        previous: W_g, (E, P); None in the first layer of a stack.
    """

    def __init__(
        self,
        spec: Residual,
        width: int,
        num_experts: int,
        *,
        previous: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.spec, self.width = spec, width
        where = {"device": device, "dtype": dtype}
        hidden = (spec.hidden or 0) * num_experts
        sizes = {
            "weight": None if hidden else (num_experts, width),
            "first": (hidden, width) if hidden else None,
            "second": (num_experts, hidden) if hidden else None,
        }
        for name, size in sizes.items():
            tensor = None if size is None else draw(spec.start, torch.empty(size, **where))
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        before = None if previous is None else torch.zeros(num_experts, previous, **where)
        self.previous = None if before is None else nn.Parameter(before)

    def forward(self, x_TD: Tensor, before_TP: Tensor | None = None) -> Tensor:
        """
        Args:
            before_TP: logits of the layer before for the same tokens; None where it did not run.
        """
        if self.weight is not None:
            logits_TE = float32_product(x_TD, self.weight)
        else:
            logits_TE = float32_product(float32_product(x_TD, self.first).tanh(), self.second)
        if self.previous is None or before_TP is None:
            return logits_TE
        if len(before_TP) != len(x_TD):
            raise SparsecraftError(
                f"This router goes on from the logits of the layer before, which are of "
                f"{len(before_TP)} tokens, and routes {len(x_TD)}; a model that drops tokens "
                "between layers needs another scorer, such as 'linear'."
            )
        return logits_TE + float32_product(before_TP, self.previous)
