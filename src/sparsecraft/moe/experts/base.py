"""A bank of experts, and the loop over them that specifies what every faster path computes.

Shapes: T tokens, K slots per token, E experts, I input features, O output features,
M first-layer features, H hidden features after the activation (M = 2H when gated).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.errors import SparsecraftError
from sparsecraft.kernels.two_layer import TwoLayer
from sparsecraft.moe.experts.dispatch import PATHS, choose_path
from sparsecraft.moe.routing import Routing


class Experts(nn.Module, ABC):
    """E experts in stacked tensors. A kind writes `expert`; dispatch is inherited.

    Attributes:
        num_experts: E.
        out_features: O.
        dispatch: `auto`, `loop`, `grouped`, `dense` or `merged`; see `sparsecraft.kernels`.
        residual: every expert is x plus something; see `loop`.
        merges: the bank can mix its experts' parameters before they meet a token, which is then
            always the cheapest way; see `sparsecraft.kernels.merged`.
        dense_tokens: up to this many tokens, `auto` computes all experts at once; small banks
            set it, because fewer launches are worth more there than fewer multiplications.
        whole: the bank takes whole sequences and all that the dense module is called with.
        imitates: of place `imitate`: the bank has been fitted, and runs instead of the base.
    """

    num_experts: int
    out_features: int
    dispatch: str = "auto"
    residual: bool = False
    merges: bool = False
    dense_tokens: int = 0
    whole: bool = False
    records: bool = False
    imitates: bool = False

    @property
    def runs_merged(self) -> bool:
        """Whether `dispatch` mixes the parameters first, in a bank that can."""
        return self.merges and self.dispatch in ("auto", "merged")

    @abstractmethod
    def expert(self, e: int, x: Tensor) -> Tensor:
        """Expert `e` on tokens x (n, I) -> (n, O)."""

    def two_layer(self, dtype: torch.dtype) -> TwoLayer | None:
        """The bank's tensors in `dtype` for the fast paths; None if it has no such form."""
        return None

    def forward(self, x_TI: Tensor, routing: Routing | None = None) -> Tensor:
        """Mix the experts' outputs, y_TO = sum_k w_k expert_k(x).

        Args:
            routing: None for a single expert that needs no router.
        """
        if routing is None:
            return self.expert(0, x_TI)
        return PATHS[choose_path(self, x_TI, routing)](self, x_TI, routing)

    def noted(self, routing: Routing) -> Routing:
        """The routing of the latest pass, with what losses read of the bank itself."""
        return routing


class CopiedExperts(Experts):
    """A bank of copies of the dense module, each with memory of its own."""

    @abstractmethod
    def append(self, donor: Any) -> None:
        """One more expert, the last: the donor's module."""

    @abstractmethod
    def remove(self, e: int) -> None:
        """Take expert `e` away."""


def set_dispatch(model: nn.Module, path: str) -> None:
    """Make every bank of experts in `model` run by one path, such as loop, or auto."""
    if path not in ("auto", "gather", *PATHS):
        raise SparsecraftError(
            f"Unknown dispatch {path!r}; known: auto, {', '.join((*PATHS, 'gather'))}."
        )
    for module in model.modules():
        if isinstance(module, Experts):
            module.dispatch = path
