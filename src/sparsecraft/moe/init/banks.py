"""The partition that a recipe asks for, of one bank of split experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.moe.init.activation import activation_clusters
from sparsecraft.moe.init.balanced import balanced_kmeans
from sparsecraft.moe.init.graph import co_activation
from sparsecraft.moe.init.partition import random_partition


def partition_of_weights(bank: SplitExperts, seed: int = 0) -> Tensor:
    """The partition of a bank that needs no data: neurons_EM. Those that need some leave the
    neurons where they are, until the stage that fits the routers.

    Rows are those of the first matrix, the gate's where there is one (D2DMoE: "because they are
    actually sparse").
    """
    spec = bank.spec
    width = bank.neurons.numel()
    match spec.partition:
        case "random":
            return random_partition(width, spec.num_experts, seed=seed)
        case "kmeans":
            rows_FD = first_rows(bank)
            # Not where it stands now, unless it has been clustered before.
            before = bank.neurons if _is_partitioned(bank) else None
            return balanced_kmeans(rows_FD, spec.num_experts, seed=seed, start=before)
    return bank.neurons


def first_rows(bank: SplitExperts) -> Tensor:
    """Rows of the first matrix in the dense order, of the gate where there is one, (F, D)."""
    return bank.dense()["first"][: bank.neurons.numel()].float()


def _is_partitioned(bank: SplitExperts) -> bool:
    order_F = bank.neurons.flatten()
    return not torch.equal(order_F, torch.arange(len(order_F), device=order_F.device))


def partition_of_activations(
    bank: SplitExperts, chunks: Callable[[], Iterator[Tensor]], shared: int, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """The partition of a bank from what its neurons do, and the neuron that stands for each expert.

    Args:
        chunks: gives the activations (T, F), neurons in the dense order, a chunk at a time.
        shared: experts that run for every token; they come first.

    Returns:
        neurons_EM, and for `activation` (CMoE) the place of the representative in each routed
        expert; None for others.
    """
    spec = bank.spec
    if spec.partition.startswith("activation"):
        neurons_EM, representatives_R = activation_clusters(
            chunks(),
            spec.num_experts,
            shared,
            active=spec.markers,
            released=spec.partition == "activation_released",
        )
        return neurons_EM, _places(neurons_EM[shared:], representatives_R)
    positive = (chunk_TF.clamp_min(0) for chunk_TF in chunks())
    released = spec.partition == "coactivation_released"
    return co_activation(positive, spec.num_experts, released=released, seed=seed), None


def _places(neurons_RM: Tensor, neurons_R: Tensor) -> Tensor:
    """Where in its expert each neuron stands."""
    return (neurons_RM == neurons_R.to(neurons_RM.device)[:, None]).int().argmax(1)
