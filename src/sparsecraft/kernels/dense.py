"""All experts on all tokens, mixed by a mostly zero weight; equals `experts.base.loop`.

For a handful of tokens, or when every expert is chosen anyway, this costs fewer launches and no
more bytes than sorting. It is not sparse, and nothing here is counted as a saving.
Shapes: T tokens, E experts, I input features, O output features, M and H as in experts.base.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecraft.kernels.grouped import add_residual
from sparsecraft.kernels.two_layer import TwoLayer


def dense(net: TwoLayer, x_TI: Tensor, weights_TE: Tensor, sums_to_one: bool) -> Tensor:
    """Two batched GEMMs over all E experts."""
    x_ETI = x_TI.expand(net.E, *x_TI.shape)
    if net.input_dropout:
        x_ETI = F.dropout(x_ETI, net.input_dropout)
    hidden_ETM = torch.bmm(x_ETI, net.first_EMI.transpose(-2, -1))
    if net.first_bias_EM is not None:
        hidden_ETM = hidden_ETM + net.first_bias_EM[:, None]
    hidden_ETH = (
        torch.stack(net.activated(hidden_ETM)) if net.by_expert else net.activate(hidden_ETM)
    )
    y_ETO = torch.bmm(hidden_ETH, net.second_EOH.transpose(-2, -1))
    if net.second_bias_EO is not None:
        y_ETO = y_ETO + net.second_bias_EO[:, None]
    if net.output_dropout:
        y_ETO = F.dropout(y_ETO, net.output_dropout)
    weights_ET1 = weights_TE.t().mul(net.scale).to(x_TI.dtype)[..., None]
    y_TO = (y_ETO * weights_ET1).sum(0)
    return add_residual(y_TO, x_TI, weights_TE, sums_to_one) if net.residual else y_TO
