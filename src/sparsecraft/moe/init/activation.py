"""Experts by what activates neurons: CMoE's shared and routed experts.

Shapes: T tokens, F neurons, E experts, m neurons per expert (F = E * m), R routed experts,
N neurons of the routed experts (N = R * m).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sparsecraft.errors import DataError, RecipeError
from sparsecraft.moe.init.auction import balanced_assignment
from sparsecraft.moe.init.partition import expert_size, neurons_of

BLOCK = 4096  # tokens of markers that are float32 at one time


def activation_clusters(
    hidden_chunks: Iterable[Tensor],
    num_experts: int,
    shared: int,
    *,
    active: int = 10,
    iterations: int = 20,
    released: bool = False,
) -> tuple[Tensor, Tensor]:
    """neurons_EM, the `shared` experts first, and representatives_R of the routed ones.

    CMoE (Pei et al. 2025) marks the `active` neurons of largest |h| of each token. The neurons
    that are marked most often are shared, by descending rate. The others are clustered by their
    columns of markers, from the columns of the R most often marked ones: a balanced assignment
    of least total L2 distance (not squared), then means, until nothing changes. An expert's
    representative is its neuron nearest to the mean; its weights score the expert.

    released: the paper's code, which takes the L1 distance and stops after one assignment.
    Equal rates are settled by the lower index, which both leave open.
    """
    markers_TF = activation_markers(hidden_chunks, active)
    size = expert_size(markers_TF.shape[1], num_experts)
    routed = num_experts - shared
    if shared < 0 or routed < 1:
        raise RecipeError(
            f"{shared} of {num_experts} experts are to be shared; use 0 to {num_experts - 1}, "
            "so that at least one is routed."
        )
    order_F = markers_TF.sum(0).argsort(descending=True, stable=True)
    shared_EM = order_F[: shared * size].view(shared, size).sort(dim=1).values
    centers_R = order_F[shared * size :][:routed]
    rest_N = order_F[shared * size :].sort().values
    markers_TN = markers_TF[:, rest_N]
    neurons_RM, means_TR = _clusters(
        markers_TN, markers_TF[:, centers_R].float(), 1 if released else iterations, released
    )
    # One distance is as good as the other: within a cluster they differ by a constant.
    nearest_R = _distances(markers_TN, means_TR, l1=released).mT.gather(1, neurons_RM).argmin(1)
    representatives_R = rest_N[neurons_RM.gather(1, nearest_R[:, None])[:, 0]]
    return torch.cat([shared_EM, rest_N[neurons_RM]]), representatives_R


def activation_markers(hidden_chunks: Iterable[Tensor], active: int = 10) -> Tensor:
    """markers_TF (bool): whether a neuron is among the `active` largest |h| of a token."""
    markers = []
    for hidden_TF in hidden_chunks:
        size_TF = hidden_TF.detach().abs()
        if not 1 <= active <= size_TF.shape[1]:
            raise RecipeError(
                f"{active} active neurons per token were asked for; there are "
                f"{size_TF.shape[1]}. Use 1 to {size_TF.shape[1]}."
            )
        top_TA = size_TF.topk(active, dim=1).indices
        markers.append(torch.zeros_like(size_TF, dtype=torch.bool).scatter_(1, top_TA, True))
    if not markers:
        raise DataError("Clusters of activations need at least one chunk of tokens; none came.")
    return torch.cat(markers)


def _clusters(markers_TN, means_TR, iterations: int, l1: bool) -> tuple[Tensor, Tensor]:
    """neurons_RM, as places among the N, and the means_TR of their columns."""
    R = means_TR.shape[1]
    labels_N = None
    for _ in range(iterations):
        before_N = labels_N
        labels_N = balanced_assignment(
            _distances(markers_TN, means_TR, l1), markers_TN.shape[1] // R
        )
        if before_N is not None and torch.equal(before_N, labels_N):
            break
        neurons_RM = neurons_of(labels_N, R)
        means_TR = torch.stack(
            [markers_TN[:, neurons].float().mean(1) for neurons in neurons_RM], 1
        )
    return neurons_RM, means_TR


def _distances(markers_TN: Tensor, means_TR: Tensor, l1: bool) -> Tensor:
    """distances_NR of 0/1 columns x to means c in [0, 1].

    |x - c| is x + c - 2xc and (x - c)^2 is x + c^2 - 2xc, so both are one matrix product.
    """
    product_NR = sum(
        block_TN.float().mT @ block_TR
        for block_TN, block_TR in zip(markers_TN.split(BLOCK), means_TR.split(BLOCK), strict=True)
    )
    own_R = means_TR.sum(0) if l1 else means_TR.square().sum(0)
    distance_NR = markers_TN.sum(0)[:, None] + own_R - 2 * product_NR
    return distance_NR if l1 else distance_NR.clamp_(min=0).sqrt_()
