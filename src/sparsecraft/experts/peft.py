"""Parameter-efficient experts: bottleneck adapters, low-rank updates and scaling vectors.

Shapes: T tokens, K slots per token, E experts, D width, H bottleneck width, I input features,
O output features, R rank, V features of one head.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from sparsecraft.errors import RecipeError, did_you_mean
from sparsecraft.experts.base import Experts
from sparsecraft.kernels.mixtures import mix_lora, mix_vectors
from sparsecraft.kernels.two_layer import TwoLayer
from sparsecraft.recipe import AdapterSpec, LoRASpec, VectorSpec
from sparsecraft.routing import Routing


class AdapterExperts(Experts):
    """PESC's adapters (Wu et al. 2024, Eq. 8): x + s * up(GELU(down(dropout(x)))), no biases.

    `up` starts at zero, so that every expert starts as the identity.
    """

    residual = True
    # The largest count at which all experts at once lose nowhere on an H200, with a CUDA graph or
    # without (benchmarks/pesc_layer.md).
    dense_tokens = 128

    def __init__(self, spec: AdapterSpec, width: int, *, device=None, dtype=None):
        super().__init__()
        self.num_experts, self.out_features = spec.num_experts, width
        self.dropout, self.scale = spec.dropout, spec.scale
        if spec.activation not in ACT2FN:
            raise RecipeError(
                f"Unknown activation {spec.activation!r}." + did_you_mean(spec.activation, ACT2FN)
            )
        self.activation = ACT2FN[spec.activation]
        self.down = nn.Parameter(
            torch.empty(spec.num_experts, spec.dim, width, device=device, dtype=dtype)
        )
        self.up = nn.Parameter(
            torch.zeros(spec.num_experts, width, spec.dim, device=device, dtype=dtype)
        )
        for down_HD in self.down:  # one at a time: the fan-in is D, not E * D
            nn.init.kaiming_uniform_(down_HD, a=math.sqrt(5))

    def expert(self, e: int, x: Tensor) -> Tensor:
        hidden = F.linear(F.dropout(x, self.dropout, self.training), self.down[e].to(x.dtype))
        return x + self.scale * F.linear(self.activation(hidden), self.up[e].to(x.dtype))

    def two_layer(self, dtype: torch.dtype) -> TwoLayer:
        return TwoLayer(
            first_EMI=self.down.to(dtype),
            second_EOH=self.up.to(dtype),
            activate=self.activation,
            scale=self.scale,
            input_dropout=self.dropout if self.training else 0.0,
            residual=True,
        )


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
        return mix_lora(
            x_TI, weights_TE, self.lora_A, self.lora_B, self.scale, onto=y_TO, in_place=in_place,
            input_dropout=self.dropout if self.training else 0.0, z_TN=z_TN,
        )  # fmt: skip


class VectorExperts(Experts):
    """Vectors that scale features, x * l_e, as (IA)3's do (Liu et al. 2022); ones at the start.

    A mixture of them is one vector for each token (MoV, Zadouri et al. 2023). A router that
    decides by head gives each head of a token its own mixture.
    """

    residual = True  # l x = x + (l - 1) x
    merges = True

    def __init__(self, spec: VectorSpec, width: int, *, device=None, dtype=None):
        super().__init__()
        self.num_experts, self.out_features = spec.num_experts, width
        ones = torch.ones(spec.num_experts, width, device=device, dtype=dtype)
        if spec.init_std:
            ones += spec.init_std * torch.randn_like(ones)
        self.vectors = nn.Parameter(ones)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return x * self.vectors[e].to(x.dtype)

    def forward(self, x_TO: Tensor, routing: Routing | None = None) -> Tensor:
        heads = 1 if routing is None else len(routing.indices_TK) // len(x_TO)
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
