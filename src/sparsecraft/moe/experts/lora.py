"""Experts that are LoRAs beside a Linear (LoRA, Hu et al. 2022; MoLORA, Zadouri et al. 2023).

    expert e      x (T, I) ── A_e (r, I) ── z_e (T, r) ── B_e (O, r) ── alpha / r ── (T, O)

    a mixture     x ─┬─ A_1 ── z_1 ── w_1 ─┐
    is one LoRA      ├─ A_2 ── z_2 ── w_2 ─┼─ [B_1 B_2 ... B_E] ── alpha / r ── y (T, O)
    of rank E r      └─ A_E ── z_E ── w_E ─┘

A shared A is made once, and z with it (HydraLoRA, Tian et al. 2024).

Shapes: T tokens, E experts, I input features, O output features, r rank.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.dense.donors import FFN, Linear
from sparsecraft.dense.sites import Site
from sparsecraft.kernels.lora import LoRAs, mix_lora
from sparsecraft.kernels.two_layer import TwoLayer
from sparsecraft.moe.experts.base import Experts, Rate
from sparsecraft.moe.experts.folded import Update
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.edits import Edit, Place
from sparsecraft.recipe.experts import LoRASpec


class LoRAExperts(Experts):
    """Low-rank updates (Hu et al. 2022): (alpha / r) * B A dropout(x), B zero at the start.

    A mixture of them is one LoRA of rank E r whose bottleneck is gated (MoLORA, Zadouri et al.
    2023): two matrix products, whatever E. With a shared A it is HydraLoRA (Tian et al. 2024).
    """

    dropout = Rate()
    merges = True
    folds = Update

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
        for a_RI in self.lora_A if not self.lora_A.is_meta else ():
            # One at a time: the fan-in is I, not E * I.
            if spec.init == "normal":
                nn.init.normal_(a_RI, std=spec.init_std)
            else:
                nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5))

    @classmethod
    def build(
        cls,
        spec: LoRASpec,
        donor: FFN | Linear,
        site: Site,
        place: Place,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        return cls(spec, donor.in_features, donor.out_features, device=device, dtype=dtype)

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
            in_place: nothing else holds y_TO, and it may be written to.
        """
        dropout = self.dropout if self.training else 0.0
        loras = LoRAs(self.lora_A, self.lora_B, self.scale, dropout)
        return mix_lora(x_TI, weights_TE, loras, onto=y_TO, in_place=in_place, z_TN=z_TN)

    @torch.no_grad()
    def put(self, e: int, pair: tuple[Tensor, Tensor] | None, scale: float) -> None:
        """Let expert `e` be a LoRA of this rank or less, scale * B A.

        What its scale differs by from the bank's goes into B; a smaller rank, or no LoRA at all,
        leaves zeros in B beside the A that was drawn, which can learn.

        Args:
            pair: A (r, I) and B (O, r); None for an update of zero.
        """
        self.lora_B[e].zero_()
        if pair is None:
            return
        down_RI, up_OR = pair
        rank = len(down_RI)
        self.lora_A[e, :rank] = down_RI.to(self.lora_A)
        self.lora_B[e, :, :rank] = (up_OR.float() * (scale / self.scale)).to(self.lora_B)

    def why_no_fold(self, edit: Edit, site: Site, single: bool) -> str | None:
        if site.kind == "ffn" or site.activated:
            return "a LoRA beside a network with an activation has no Linear to be added to"
        return None

    def fold(self, weights_E: Tensor) -> Update:
        return Update({"": self.delta(weights_E)})

    def delta(self, weights_E: Tensor, first: int = 0) -> Tensor:
        """(alpha / r) sum_e w_e B_e A_e of the experts from `first` on, (O, I), float64."""
        a_ERI, b_EOR, total_OI = self.lora_A.detach(), self.lora_B.detach(), 0
        for e, weight in enumerate(weights_E.tolist(), first):
            delta_OI = b_EOR[e].double() @ a_ERI[e % len(a_ERI)].double()
            total_OI = total_OI + self.scale * weight * delta_OI
        return total_OI
