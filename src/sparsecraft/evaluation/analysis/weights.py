"""How alike the experts of a layer are in their weights. E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecraft.evaluation.analysis.watching import Watched


@torch.no_grad()
def similarities(layer: Watched, experts: int) -> Tensor | None:
    """Cosine of the angle between two experts' weights, all of each as one vector, (E, E) float32
    on the CPU; None where the bank holds nothing of each expert's own, or one of them holds zeros.
    """
    products_EE: Tensor | None = None
    for parameter in layer.experts.parameters():
        if not layer.stacked or len(parameter) != experts or not parameter.is_floating_point():
            continue  # what all experts share
        rows_EP = parameter.detach().reshape(experts, -1).float()
        own_EE = (rows_EP @ rows_EP.t()).cpu()
        products_EE = own_EE if products_EE is None else products_EE + own_EE
    if products_EE is None or not (products_EE.diagonal() > 0).all():
        return None
    length_E = products_EE.diagonal().sqrt()
    return products_EE / length_E[:, None] / length_E
