"""Clusters of exactly m neurons each, by their weights: balanced k-means on normalized rows.

Shapes: F neurons, D features, E experts, m neurons per expert (F = E * m).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsecraft.errors import RecipeError
from sparsecraft.moe.init.auction import priced_assignment
from sparsecraft.moe.init.partition import expert_size, labels_of, neurons_of

PRECISION = 1e-2  # a finer assignment to means that still move gave no lower inertia


def balanced_kmeans(
    rows_FD: Tensor,
    num_experts: int,
    *,
    seed: int = 0,
    iterations: int = 20,
    start: Tensor | None = None,
    restarts: int = 1,
    plain: bool = False,
) -> Tensor:
    """neurons_EM of the lowest inertia seen, the parameter clustering of MoEfication.

    The rows are scaled to unit length. Turns between a balanced assignment and the means of the
    clusters, as "faster MoEfication" does, but a neuron's own pull on its mean, 1/m of its row,
    is first taken out of its score and comes back linearly. With it, 32 neurons in 4096
    dimensions stay where the first assignment put them.

    seed: of the rows that the first means are drawn from.
    iterations: assignments at most; fewer where one changes nothing.
    start: labels_F or neurons_EM to begin from; the result is never worse.
    restarts: runs, of which the best counts; only the first begins from `start`.
    plain: leave the own pull in throughout (Lloyd's iterations).
    """
    F = len(rows_FD)
    expert_size(F, num_experts)
    if iterations < 1 or restarts < 1:
        raise RecipeError(
            f"iterations is {iterations} and restarts is {restarts}; both must be from 1."
        )
    rows_FD = functional.normalize(rows_FD.detach().float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[float, Tensor]] = []
    for run in range(restarts):
        if run == 0 and start is not None:
            neurons_EM = _as_neurons(start.to(rows_FD.device), F, num_experts)
            found.append((inertia(rows_FD, neurons_EM), neurons_EM))
            means_ED, labels_F = rows_FD[neurons_EM].mean(1), labels_of(neurons_EM)
        else:
            drawn_E = torch.randperm(F, generator=generator)[:num_experts]
            means_ED, labels_F = rows_FD[drawn_E.to(rows_FD.device)], None
        found.append(_run(rows_FD, means_ED, labels_F, iterations, plain))
    return min(found, key=lambda pair: pair[0])[1]


def inertia(rows_FD: Tensor, neurons_EM: Tensor) -> float:
    """Sum of squared distances to the mean of the own expert; of the rows as they are."""
    means_ED = rows_FD[neurons_EM].mean(1)
    return (_energy(rows_FD) - neurons_EM.shape[1] * _energy(means_ED)).item()


def _run(rows_FD, means_ED, labels_F, iterations: int, plain: bool) -> tuple[float, Tensor]:
    """The lowest inertia of one run, and its neurons_EM."""
    E, F = len(means_ED), len(rows_FD)
    square_F = rows_FD.square().sum(1)
    best, price_E = (torch.inf, torch.empty(0)), None
    for i in range(iterations):
        # The squared norms of rows and means are the same in total whatever the assignment.
        cost_FE = rows_FD @ -means_ED.mT
        if labels_F is not None and not plain:
            # The gain of an exchange of two neurons, to first order, counts neither's own pull.
            pull_F = square_F * ((1 - i / iterations) * E / F)
            cost_FE[torch.arange(F, device=labels_F.device), labels_F] += pull_F
        before_F = labels_F
        labels_F, price_E = priced_assignment(cost_FE, PRECISION, price_E=price_E)
        # What stays put now also does when more of the own pull is back.
        if before_F is not None and torch.equal(before_F, labels_F):
            break
        neurons_EM = neurons_of(labels_F, E)
        means_ED = rows_FD[neurons_EM].mean(1)
        spread = (_energy(rows_FD) - (F // E) * _energy(means_ED)).item()
        best = min(best, (spread, neurons_EM), key=lambda pair: pair[0])
    return best


def _energy(x: Tensor) -> Tensor:
    """Sum of squares, added up in float64 without a float64 copy of a large matrix."""
    return x.square().sum(-1).sum(dtype=torch.float64)


def _as_neurons(start: Tensor, num_neurons: int, num_experts: int) -> Tensor:
    size = num_neurons // num_experts
    if start.shape == (num_neurons,):
        return neurons_of(start, num_experts)
    if start.shape == (num_experts, size):
        return neurons_of(labels_of(start), num_experts)
    raise RecipeError(
        f"start has the shape {tuple(start.shape)}; give labels_F ({num_neurons},) or neurons_EM "
        f"({num_experts}, {size})."
    )
