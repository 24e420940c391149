"""Experts that are LoRAs beside a Linear.

Shapes: T tokens, E experts, I input features, O output features, r rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.kernels.lora import LoRAs, mix_lora
from sparsecraft.kernels.two_layer import TwoLayer
from sparsecraft.moe.experts.base import Experts
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.experts import LoRASpec


class LoRAExperts(Experts):
    """Low-rank updates (Hu et al. 2022): (alpha / r) * B A dropout(x), B zero at the start.

    A mixture of them is one LoRA of rank E r whose bottleneck is gated (MoLORA, Zadouri et al.
    2023): two matrix products, whatever E. With a shared A it is HydraLoRA (Tian et al. 2024).
    """

    merges = True

    def __init__(
        self, spec: LoRASpec, in_features: int, out_features: int, *, device=None, dtype=None
    ):
        super().__init__()
        self.num_experts, self.out_features = spec.num_experts, out_features
        self.dropout, self.scale = spec.dropout, spec.alpha / spec.rank
        num_a = 1 if spec.shared_a else spec.num_experts
        self.lora_A = nn.Parameter(
            torch.empty(num_a, spec.rank, in_features, device=device, dtype=dtype)
        )
        self.lora_B = nn.Parameter(
            torch.zeros(spec.num_experts, out_features, spec.rank, device=device, dtype=dtype)
        )
        for a_RI in self.lora_A:  # one at a time: the fan-in is I, not E * I
            if spec.init == "normal":
                nn.init.normal_(a_RI, std=spec.init_std)
            else:
                nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5))

    def expert(self, e: int, x: Tensor) -> Tensor:
        a_RI = self.lora_A[e % len(self.lora_A)].to(x.dtype)
        low = F.linear(F.dropout(x, self.dropout, self.training), a_RI)
        return F.linear(low * self.scale, self.lora_B[e].to(x.dtype))

    def two_layer(self, dtype: torch.dtype) -> TwoLayer:
        return TwoLayer(
            first_EMI=self.lora_A.to(dtype).expand(self.num_experts, -1, -1).contiguous(),
            second_EOH=self.lora_B.to(dtype),
            activate=nn.Identity(),
            scale=self.scale,
            input_dropout=self.dropout if self.training else 0.0,
        )

    def merged(self, x_TI: Tensor, routing: Routing) -> Tensor:
        return self.added(None, x_TI, routing.weights_TE())

    def added(
        self,
        y_TO: Tensor | None,
        x_TI: Tensor,
        weights_TE: Tensor | None,
        z_TN: Tensor | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """y_TO plus the mixture on x_TI.

        Args:
            weights_TE: None for a single expert with weight one.
            z_TN: all A's rows times x_TI, where they are known.
            in_place: y_TO belongs to nobody else, and may be written to.
        """
        dropout = self.dropout if self.training else 0.0
        loras = LoRAs(self.lora_A, self.lora_B, self.scale, dropout)
        return mix_lora(x_TI, weights_TE, loras, onto=y_TO, in_place=in_place, z_TN=z_TN)
