"""One token on a CPU: each expert that it goes to reads its own matrices, and nothing is sorted,
copied or computed for others; equals `experts.base.loop`.

Shapes: I input features, O output features, M first-layer features, H hidden features, K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecraft.kernels.device import compute_dtype, is_followed
from sparsecraft.kernels.two_layer import TwoLayer

SLOTS = 4  # beyond these, products of several experts at once cost less than each by itself


def is_alone(x_1I: Tensor, slots: int) -> bool:
    """Whether `one_token` is the fastest way for this token and this number of slots."""
    return (
        len(x_1I) == 1
        and slots <= SLOTS
        and x_1I.device.type == "cpu"
        and not torch.is_grad_enabled()
        and compute_dtype(x_1I) == x_1I.dtype
        and not is_followed(x_1I)
        and not torch._C._len_torch_dispatch_stack()  # of modes, such as make_fx's
    )


def one_token(
    net: TwoLayer, x_1I: Tensor, weights_1K: Tensor, indices_1K: Tensor, sums_to_one: bool
) -> Tensor:
    """sum_k w_k expert_k(x) without dropout, (1, O)."""
    (x_I,), (weights,), (indices,) = x_1I, weights_1K.tolist(), indices_1K.tolist()
    chosen = [(w, e) for w, e in zip(weights, indices, strict=True) if e < net.E]
    y_O = x_I.new_zeros(net.O)
    if net.residual:
        y_O = x_I if sums_to_one else x_I * sum(weight for weight, _ in chosen)
    for weight, e in chosen:
        hidden_M = F.linear(x_I, net.first_EMI[e], _of(net.first_bias_EM, e))
        hidden_H = net.activate(hidden_M, e) if net.by_expert else net.activate(hidden_M)
        weight *= net.scale
        y_O = torch.addmv(y_O, net.second_EOH[e], hidden_H, alpha=weight)
        if net.second_bias_EO is not None:
            y_O = y_O + weight * net.second_bias_EO[e]
    return y_O[None]


def _of(bias_EN: Tensor | None, e: int) -> Tensor | None:
    return None if bias_EN is None else bias_EN[e]
