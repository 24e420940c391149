"""Full feed-forward experts (sparse upcycling, Komatsuzaki et al. 2023).

Shapes: E experts, D width, F hidden width. Gated networks store gate and up fused, gate rows
first, as transformers v5 does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.donor import FFN
from sparsecraft.experts.base import Experts, TwoLayer
from sparsecraft.recipe import FFNSpec


class FFNExperts(Experts):
    """E feed-forward networks of the donor's own form (gated or not, with or without biases).

    Copies start as expanded views of one tensor: they cost no memory until `materialize`, which
    `train()` calls because an optimizer cannot step a view.
    """

    def __init__(self, spec: FFNSpec, donor: FFN):
        super().__init__()
        self.num_experts = spec.num_experts
        self.out_features = donor.width
        self.gated = donor.gated
        self.activation = donor.activation
        self.hidden_dropout = donor.hidden_dropout
        self.output_dropout = donor.output_dropout
        for name, tensor in _tensors(donor).items():
            self.register_parameter(
                name, None if tensor is None else _copies(tensor, self.num_experts)
            )

    def expert(self, e: int, x: Tensor) -> Tensor:
        first, first_bias = self._first()
        hidden = F.linear(x, first[e].to(x.dtype), _row(first_bias, e, x.dtype))
        y = F.linear(
            self._activate(hidden), self.down[e].to(x.dtype), _row(self.down_bias, e, x.dtype)
        )
        return F.dropout(y, self.output_dropout, self.training)

    def two_layer(self, dtype: torch.dtype) -> TwoLayer:
        first, first_bias = self._first()
        return TwoLayer(
            first_EMI=first.to(dtype),
            second_EOH=self.down.to(dtype),
            activate=self._activate,
            first_bias_EM=None if first_bias is None else first_bias.to(dtype),
            second_bias_EO=None if self.down_bias is None else self.down_bias.to(dtype),
            output_dropout=self.output_dropout if self.training else 0.0,
        )

    @torch.no_grad()
    def put(self, e: int, donor: FFN) -> None:
        """Let expert `e` be the network of `donor`. The bank must be materialized."""
        for name, tensor in _tensors(donor).items():
            if tensor is not None:
                getattr(self, name)[e].copy_(tensor)

    def materialize(self) -> None:
        """Give every copy memory of its own."""
        for parameter in self.parameters():
            if parameter.stride(0) == 0:
                parameter.data = parameter.data.contiguous()

    def train(self, mode: bool = True) -> FFNExperts:
        if mode:
            self.materialize()
        return super().train(mode)

    def _first(self) -> tuple[Tensor, Tensor | None]:
        return (self.gate_up, self.gate_up_bias) if self.gated else (self.up, self.up_bias)

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate) * up
        else:
            hidden = self.activation(hidden)
        return F.dropout(hidden, self.hidden_dropout, self.training)


def _tensors(donor: FFN) -> dict[str, Tensor | None]:
    """A bank's name of each of the donor's tensors."""
    first = "gate_up" if donor.gated else "up"
    return {
        first: donor.first_weight(),
        f"{first}_bias": donor.first_bias(),
        "down": donor.down_weight(),
        "down_bias": donor.down_bias(),
    }


def _copies(tensor: Tensor, count: int) -> nn.Parameter:
    """`count` views of one tensor, or a copy if one: writes to a single view would go through."""
    # In one layout from the start: a GEMM on GPT-2's transposed weights rounds differently.
    tensor = tensor.detach().contiguous()
    return nn.Parameter(tensor.clone()[None] if count == 1 else tensor.expand(count, *tensor.shape))


def _row(bias: Tensor | None, e: int, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[e].to(dtype)
