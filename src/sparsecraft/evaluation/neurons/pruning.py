"""What a model loses without some neurons.

N neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsecraft.evaluation.neurons.statistics import Neurons

KEPT, PRECISION = 0.8, 0.02  # of the domain's own accuracy, and how near to it is near enough
STEPS = 12  # halvings of the share of neurons


@contextmanager
def without(neurons: Neurons, gone_N: Tensor) -> Iterator[None]:
    """These neurons (N,) bool give nothing while the block runs."""
    handles = []

    def silenced(gone_F: Tensor) -> Callable:
        def hook(module: nn.Module, args: tuple) -> tuple:
            return args[0].masked_fill(gone_F.to(args[0].device), 0), *args[1:]

        return hook

    parts = gone_N.split(neurons.widths)
    for network, gone_F in zip(neurons.networks.values(), parts, strict=True):
        if gone_F.any():
            handles.append(network.down.module.register_forward_pre_hook(silenced(gone_F)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def share_to_prune(
    accuracy: Callable[[float], float], whole: float, kept: float = KEPT
) -> tuple[float, float]:
    """The least share of neurons, by bisection, without which accuracy falls to `kept` of what it
    was, within two hundredths of it; and the accuracy there. Accuracy need not fall evenly, so that
    there may be a lower one.

    Args:
        accuracy: of the model without this share.
        whole: of the whole model.
    """
    low, high, best = 0.0, 1.0, (1.0, accuracy(1.0))
    if best[1] > kept * whole:
        return best  # it does not fall so far
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = accuracy(middle)
        if found <= kept * whole:
            high, best = middle, (middle, found)
        else:
            low = middle
        if abs(found - kept * whole) <= PRECISION * whole and found <= kept * whole:
            break
    return best


def random_like(gone_N: Tensor, seed: int = 0) -> Tensor:
    """As many neurons, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(gone_N), generator=generator)
    drawn_N = torch.zeros_like(gone_N)
    drawn_N[order[: int(gone_N.sum())]] = True
    return drawn_N
