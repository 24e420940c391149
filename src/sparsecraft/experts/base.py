"""A bank of experts, and the loop over them that specifies what every faster path computes.

Shapes: T tokens, K slots per token, E experts, I input features, O output features,
M first-layer features, H hidden features after the activation (M = 2H when gated).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsecraft.routing import Routing


@dataclass(frozen=True, slots=True)
class TwoLayer:
    """The form that the fast paths understand: scale * second(activate(first(x))).

    A residual bank adds x.
    """

    first_EMI: Tensor
    second_EOH: Tensor
    activate: Callable[[Tensor], Tensor]
    first_bias_EM: Tensor | None = None
    second_bias_EO: Tensor | None = None
    scale: float = 1.0
    input_dropout: float = 0.0
    output_dropout: float = 0.0


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
    """

    num_experts: int
    out_features: int
    dispatch: str = "auto"
    residual: bool = False
    merges: bool = False
    dense_tokens: int = 0

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

    def rows_of_input(self) -> Tensor | None:
        """The matrix (N, I) whose product with each token is all that `add_to` reads of it, if it
        is; a caller may compute it together with other products."""
        return None

    def forward(
        self, x_TI: Tensor, routing: Routing | None = None, sums_to_one: bool = False
    ) -> Tensor:
        """Mix the experts' outputs, y_TO = sum_k w_k expert_k(x).

        Args:
            routing: None for a single expert that needs no router.
            sums_to_one: the weights of every token are known to sum to one, so that a residual
                expert's `x` passes through exactly.
        """
        if routing is None:
            return self.expert(0, x_TI)
        from sparsecraft.kernels import PATHS, choose_path

        return PATHS[choose_path(self, x_TI, routing)](self, x_TI, routing, sums_to_one)

    def add_to(
        self,
        y_TO: Tensor,
        x_TI: Tensor,
        routing: Routing | None = None,
        sums_to_one: bool = False,
        in_place: bool = False,
        z_TN: Tensor | None = None,
    ) -> Tensor:
        """y_TO plus the mixture on x_TI.

        Args:
            in_place: y_TO belongs to nobody else, and a kind may write to it.
            z_TN: x_TI times `rows_of_input`, where it is known.
        """
        return y_TO + self(x_TI, routing, sums_to_one)


class CopiedExperts(Experts):
    """A bank of copies of the dense module, which start as expanded views of one tensor: they cost
    no memory until `materialize`, which `train()` calls because an optimizer cannot step a view."""

    def materialize(self) -> None:
        """Give every copy memory of its own."""
        for parameter in self.parameters():
            if parameter.stride(0) == 0:
                parameter.data = parameter.data.contiguous()

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.materialize()
        return super().train(mode)

    @abstractmethod
    def append(self, donor: Any) -> None:
        """One more expert, the last: the donor's module."""

    @abstractmethod
    def remove(self, e: int) -> None:
        """Take expert `e` away."""


def with_one_more(bank: Tensor, expert: Tensor) -> nn.Parameter:
    """The stacked tensors of a bank and behind them one expert's, on the bank's device."""
    longer = torch.cat([bank.detach(), expert.detach()[None].to(bank)])
    return nn.Parameter(longer, bank.requires_grad)


def without(bank: Tensor, e: int) -> nn.Parameter:
    """The stacked tensors of a bank but expert `e`'s."""
    shorter = torch.cat([bank.detach()[:e], bank.detach()[e + 1 :]])
    return nn.Parameter(shorter, bank.requires_grad)


def copies(tensor: Tensor, count: int) -> nn.Parameter:
    """`count` views of one tensor, or a copy if one: writes to a single view would go through."""
    # In one layout from the start: a GEMM on GPT-2's transposed weights rounds differently.
    tensor = tensor.detach().contiguous()
    return nn.Parameter(tensor.clone()[None] if count == 1 else tensor.expand(count, *tensor.shape))


def everyone(x_TI: Tensor) -> Routing:
    """The routing of a bank without router: its only expert sees every token, with weight one."""
    ones_T1 = x_TI.new_ones(x_TI.shape[0], 1, dtype=torch.float32)
    return Routing(ones_T1, torch.zeros_like(ones_T1, dtype=torch.long), torch.zeros_like(ones_T1))


def all_in_order(x_TI: Tensor, num_experts: int) -> Routing:
    """The routing of a split network that runs whole: every expert, with weight one."""
    ones_TE = x_TI.new_ones(x_TI.shape[0], num_experts, dtype=torch.float32)
    experts_E = torch.arange(num_experts, device=x_TI.device)
    indices_TE = experts_E.expand_as(ones_TE)
    return Routing(ones_TE, indices_TE, torch.zeros_like(ones_TE), in_order=True)


def loop(bank: Experts, x_TI: Tensor, routing: Routing, sums_to_one: bool = False) -> Tensor:
    """The specification: one expert at a time, on the tokens that chose it.

    Where the weights are known to sum to one, sum_k w_k (x + A_k) is computed as
    x + sum_k w_k ((x + A_k) - x), so that x passes through without rounding.
    """
    passes = bank.residual and sums_to_one
    y_TO = x_TI if passes else x_TI.new_zeros(x_TI.shape[0], bank.out_features)
    for e in range(bank.num_experts):
        tokens, slots = torch.where(routing.indices_TK == e)
        if tokens.numel() == 0:
            continue
        weight = routing.weights_TK[tokens, slots, None].to(x_TI.dtype)
        x = x_TI[tokens]
        y = bank.expert(e, x) - x if passes else bank.expert(e, x)
        y_TO = y_TO.index_add(0, tokens, (y * weight).to(y_TO.dtype))
    return y_TO
