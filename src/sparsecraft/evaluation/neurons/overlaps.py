"""What the neurons of two domains have in common, and whether those of a domain lie in clusters.

N neurons, F of a layer, E clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional

from sparsecraft.dense.donors import FFN
from sparsecraft.evaluation.analysis.chance import FALSE_DISCOVERIES
from sparsecraft.moe.init.balanced import balanced_kmeans
from sparsecraft.moe.init.partition import labels_of, random_partition


def overlap(first_N: Tensor, second_N: Tensor) -> float:
    """|A and B| / |A|; by chance the share of B."""
    return (first_N & second_N).sum().item() / max(1, first_N.sum().item())


def clusters_of(network: FFN, clusters: int, seed: int = 0) -> Tensor:
    """Equally large clusters of neurons by their rows of the first matrix (that of the gate and of
    up, side by side), as MoEfication (Zhang et al. 2022) makes them; labels (F,)."""
    rows_MD = network.first_weight().detach().float()
    rows_FD = torch.cat(rows_MD.chunk(2), 1) if network.gated else rows_MD
    return labels_of(balanced_kmeans(functional.normalize(rows_FD, dim=1), clusters, seed=seed))


def enriched(labels_F: Tensor, chosen_F: Tensor) -> dict[str, Any]:
    """Clusters that hold more of the chosen neurons than chance gives: the hypergeometric test of
    Zhang et al. (2023), false discoveries at 5 % over the layer's clusters.

    Returns:
        `clusters`, `found` (their numbers), and `inside`: the share of the chosen neurons that lie
        in these.
    """
    E, F, chosen = int(labels_F.max()) + 1, len(labels_F), int(chosen_F.sum())
    inside_E = torch.bincount(labels_F[chosen_F], minlength=E).numpy()
    size_E = torch.bincount(labels_F, minlength=E).numpy()
    p_E = stats.hypergeom.sf(inside_E - 1, F, size_E, chosen)
    found = np.flatnonzero(stats.false_discovery_control(p_E) <= FALSE_DISCOVERIES)
    share = inside_E[found].sum() / max(1, chosen)
    return {"clusters": E, "found": found.tolist(), "inside": float(share)}


def by_random_clusters(labels_F: Tensor, chosen_F: Tensor, seed: int = 0) -> dict[str, Any]:
    """The same of clusters of these sizes that are drawn."""
    E = int(labels_F.max()) + 1
    return enriched(labels_of(random_partition(len(labels_F), E, seed)), chosen_F)
