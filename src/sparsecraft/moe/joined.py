"""What a layer computes in a model's form for inference, `sc.fast`: matrices that will not change
are stacked once, and a token goes through them in a few operations, however few its work.

Each equals its place's own function in `sparsecraft.moe.places`, without gradients.
Shapes: T tokens, I input features, O output features, E experts, R ranks of an expert, N rows of
all A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.kernels.device import version
from sparsecraft.kernels.projections import float32_product
from sparsecraft.moe.places import flat

if TYPE_CHECKING:
    from sparsecraft.moe.layer import MoELayer


class Joined(nn.Module):
    """Stacked tensors of a layer.

    Attributes:
        reads: names of the experts' tensors that are stacked, with the rows of the router.
        made_of: what `stands_for` gave when they were.
    """

    reads: ClassVar[tuple[str, ...]]
    made_of: list[tuple[int, int]]

    def stands_for(self, layer: MoELayer) -> list[tuple[int, int]]:
        """What differs once one of the tensors has other values, or other memory."""
        # At every call: a look-up by attribute costs ten times this.
        held = layer.experts._parameters
        found = [held[name] for name in self.reads]
        found.append(layer.router.scorer._parameters["weight"])
        return [(t.data_ptr(), version(t)) for t in found]


class JoinedLoRAs(Joined):
    """y = F(x) + s [B_1 ... B_E] (w * [A_1; ...; A_E] x), w = softmax(W_r x).

    Attributes:
        rows: A of all experts and, where they have one type, the router's rows behind them.
        router: these where the types differ: logits are in float32.
        second_NO: B of all experts, transposed.

    Args:
        b_EOR: times s.
    """

    reads = ("lora_A", "lora_B")

    def __init__(self, a_ERI: Tensor, b_EOR: Tensor, router_EI: Tensor):
        super().__init__()
        a_NI = a_ERI.detach().flatten(0, 1)
        self.split = len(a_NI), len(router_EI)
        self.rank = b_EOR.shape[2]
        together = a_NI.dtype == router_EI.dtype == torch.float32
        rows = torch.cat([a_NI, router_EI.detach()]) if together else a_NI.clone()
        b_NO = b_EOR.detach().transpose(1, 2).flatten(0, 1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("router", None if together else router_EI.detach().clone(), False)
        self.register_buffer("second_NO", b_NO.clone(), persistent=False)

    def forward(self, layer: MoELayer, x: Tensor, *args, **kwargs) -> Tensor:
        y, x_TI = layer.base(x, *args, **kwargs), flat(x)
        held = self._buffers
        z_TN, router = F.linear(x_TI, held["rows"].to(x_TI.dtype)), held["router"]
        if router is None:
            z_TN, scores_TE = z_TN.split(self.split, dim=-1)
        else:
            scores_TE = float32_product(x_TI, router)
        weights_TE1 = scores_TE.softmax(-1).to(z_TN.dtype).unsqueeze(-1)
        low_TER = z_TN.reshape(len(x_TI), z_TN.shape[1] // self.rank, self.rank)
        gated_TN = (low_TER * weights_TE1).flatten(1)
        y_TO = torch.addmm(flat(y), gated_TN.to(y.dtype), held["second_NO"].to(y.dtype))
        return y_TO.reshape(y.shape)


class JoinedVectors(Joined):
    """y = F(x) * (1 + sum_e w_e (L_e - 1)), w = softmax(W_r x)."""

    reads = ("vectors",)

    def __init__(self, vectors_EO: Tensor, router_EI: Tensor):
        super().__init__()
        vectors_EO = vectors_EO.detach()
        wide = torch.promote_types(vectors_EO.dtype, torch.float32)
        self.register_buffer("router", router_EI.detach().clone(), persistent=False)
        self.register_buffer("offsets_EO", vectors_EO.to(wide) - 1, persistent=False)
        self.register_buffer("one", torch.ones((), dtype=wide, device=vectors_EO.device), False)

    def forward(self, layer: MoELayer, x: Tensor, *args, **kwargs) -> Tensor:
        y = layer.base(x, *args, **kwargs)
        weights_TE = float32_product(flat(x), self.router).softmax(-1).to(self.offsets_EO.dtype)
        scale_TO = torch.addmm(self.one, weights_TE, self.offsets_EO)
        return (y * scale_TO.reshape(y.shape)).to(y.dtype)
