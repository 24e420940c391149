"""What a partition is: E experts of m neurons each, every neuron in exactly one of them.

Shapes: F neurons, E experts, m neurons per expert (F = E * m).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecraft.errors import RecipeError


def contiguous(num_neurons: int, num_experts: int) -> Tensor:
    """neurons_EM in the order of the weights: what MoEfication's code calls a random split."""
    size = expert_size(num_neurons, num_experts)
    return torch.arange(num_neurons).view(num_experts, size)


def random_partition(num_neurons: int, num_experts: int, seed: int = 0) -> Tensor:
    """neurons_EM drawn uniformly; ascending within each expert."""
    size = expert_size(num_neurons, num_experts)
    order_F = torch.randperm(num_neurons, generator=torch.Generator().manual_seed(seed))
    return order_F.view(num_experts, size).sort(dim=1).values


def labels_of(neurons_EM: Tensor) -> Tensor:
    """labels_F, the expert of each neuron."""
    E, size = neurons_EM.shape
    F = E * size
    flat_F = neurons_EM.flatten()
    if not torch.equal(flat_F.sort().values, torch.arange(F, device=flat_F.device)):
        raise RecipeError(
            f"These {E} experts of {size} neurons are no partition: each of the neurons 0 to "
            f"{F - 1} must stand in exactly one place, and {len(flat_F.unique())} different "
            "ones were found."
        )
    labels_F = torch.empty_like(flat_F)
    labels_F[flat_F] = torch.arange(E, device=flat_F.device).repeat_interleave(size)
    return labels_F


def neurons_of(labels_F: Tensor, num_experts: int) -> Tensor:
    """neurons_EM, the neurons of each expert in ascending order."""
    size = expert_size(len(labels_F), num_experts)
    if labels_F.dtype.is_floating_point or labels_F.dtype == torch.bool:
        raise RecipeError(f"Labels are {labels_F.dtype}; they must be whole numbers.")
    order_F = labels_F.argsort(stable=True)
    wanted_F = torch.arange(num_experts, device=labels_F.device).repeat_interleave(size)
    if not torch.equal(labels_F[order_F].long(), wanted_F):
        found, counts = labels_F.unique(return_counts=True)
        raise RecipeError(
            f"These labels are no equal split into {num_experts} experts of {size} neurons: "
            f"{len(found)} experts of {counts.min()} to {counts.max()} neurons were found, "
            f"numbered {found.min()} to {found.max()}."
        )
    return order_F.view(num_experts, size)


def expert_size(num_neurons: int, num_experts: int) -> int:
    """m, or an error that lists the nearest numbers of experts that divide the neurons."""
    possible = isinstance(num_experts, int) and 1 <= num_experts <= num_neurons
    if possible and num_neurons % num_experts == 0:
        return num_neurons // num_experts
    advice = "A partition needs at least one neuron and a whole number of experts from 1."
    if num_neurons and isinstance(num_experts, int):
        divisors = [e for e in range(1, num_neurons + 1) if num_neurons % e == 0]
        near = sorted(sorted(divisors, key=lambda e: abs(e - num_experts))[:4])
        advice = f"The nearest numbers that divide {num_neurons}: {', '.join(map(str, near))}."
    raise RecipeError(
        f"{num_neurons} neurons cannot be split evenly into {num_experts!r} experts. {advice}"
    )
