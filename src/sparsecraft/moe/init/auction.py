"""Equal-size assignment of least cost, by an auction in which all neurons bid at once.

Shapes: F neurons, E experts, m neurons per expert (F = E * m), B neurons that still bid. An extra
expert E, whose places cannot be won, takes the updates of neurons that do not bid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsecraft.errors import RecipeError
from sparsecraft.moe.init.partition import expert_size

# A launch costs more than a wasted bid on a GPU, and a wait for the device costs more than both.
ROUNDS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 32}
SHRINK = 5.0  # the step of bids over that of the next auction


def balanced_assignment(cost_FE: Tensor, size: int, *, epsilon: float | None = None) -> Tensor:
    """labels_F with `size` neurons per expert, of a total cost within F * epsilon of the least.

    The auction of Bertsekas (1988) with epsilon scaling, as BASE layers (Lewis et al. 2021) use
    it. In float64 throughout, because the bound needs bids that differ by less than epsilon to
    stay apart. Costs that are whole numbers give an exact optimum when epsilon < 1 / F.

    epsilon: 1e-3 of the standard deviation of a neuron's costs, averaged, unless given.
    """
    F, E = cost_FE.shape
    if size != expert_size(F, E):
        raise RecipeError(
            f"An assignment of {F} neurons to {E} experts of {size} was asked for, which have "
            f"{size * E} places. Use size={F // E}."
        )
    return priced_assignment(cost_FE, 1e-3 if epsilon is None else None, epsilon)[0]


def priced_assignment(
    cost_FE: Tensor,
    precision: float | None,
    epsilon: float | None = None,
    price_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`balanced_assignment` with the experts' prices, from those of a similar problem if given.

    precision: epsilon over the standard deviation of a neuron's costs; instead of epsilon.
    """
    F, E = cost_FE.shape
    if not torch.isfinite(cost_FE).all():
        raise RecipeError(
            "The costs of an assignment hold infinite or undefined numbers. Look for them in the "
            "weights or activations that the costs were computed from."
        )
    # What a neuron pays everywhere decides nothing, but would eat the digits that do.
    cost_FE = cost_FE.double()
    cost_FE = cost_FE - cost_FE.amin(1, keepdim=True)
    spread, deviation = cost_FE.amax().item(), cost_FE.std(1, correction=0).mean().item()
    if spread == 0:  # one expert, or any assignment is the best
        labels_F = torch.arange(F, device=cost_FE.device) // (F // E)
        return labels_F, cost_FE.new_zeros(E)
    # A finer step would be lost in the rounding of prices.
    epsilon = max(precision * deviation if epsilon is None else epsilon, 1e-12 * spread)
    step = spread / 4 if price_E is None else SHRINK**2 * epsilon
    price_E = cost_FE.new_zeros(E) if price_E is None else price_E
    with _one_thread():
        while True:
            step = max(step / SHRINK, epsilon)
            labels_F, price_E = _auction(cost_FE, F // E, price_E, step)
            if step == epsilon:
                return labels_F, price_E


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small operations gain nothing from threads on idle cores, and on busy ones
    each would wait for the slowest: ten times as long in all, as measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _auction(cost_FE: Tensor, size: int, price_E: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """One auction from empty places at `price_E`: labels, and the prices at the end.

    Each place keeps its highest bid, an expert's price is that of its cheapest place.
    """
    F, E = cost_FE.shape
    device = cost_FE.device
    bid_EM = torch.cat([price_E, price_E.new_full((1,), torch.inf)])[:, None].repeat(1, size)
    holder_EM = torch.full((E + 1, size), -1, device=device)
    price_E = price_E.clone()
    bidder_B = torch.arange(F, device=device)
    between = ROUNDS_BETWEEN_LOOKS.get(device.type, 1)
    while bidder_B.numel():
        for _ in range(between):
            bidder_B = _round(cost_FE, price_E, bid_EM, holder_EM, bidder_B, step)
        bidder_B = bidder_B[bidder_B >= 0]
    labels_F = torch.empty(F, dtype=torch.long, device=device)
    labels_F[holder_EM[:E].flatten()] = torch.arange(E, device=device).repeat_interleave(size)
    return labels_F, price_E


def _round(cost_FE, price_E, bid_EM, holder_EM, bidder_B, step: float) -> Tensor:
    """All of `bidder_B` (-1: none) bid for their best expert; returns who bids next.

    Of an expert's places and its new bids the best m stay: the bid of rank r takes the r-th
    cheapest place if it is higher, and whom it displaces bids next in its stead. So nothing here
    depends on a count that the host would have to wait for.
    """
    E, size = price_E.shape[0], bid_EM.shape[1]
    value_BE = cost_FE[bidder_B.clamp(min=0)] + price_E
    best_B, expert_B = value_BE.min(1)
    value_BE.scatter_(1, expert_B[:, None], torch.inf)
    offer_B = price_E[expert_B] + (value_BE.amin(1) - best_B) + step
    expert_B = torch.where(bidder_B >= 0, expert_B, E)

    order_B = offer_B.argsort(descending=True, stable=True)
    order_B = order_B[expert_B[order_B].argsort(stable=True)]
    bidder_B, expert_B, offer_B = bidder_B[order_B], expert_B[order_B], offer_B[order_B]
    rank_B = torch.arange(len(order_B), device=order_B.device)
    rank_B = rank_B - torch.searchsorted(expert_B, expert_B)
    inside_B = rank_B < size
    rank_B = rank_B.clamp(max=size - 1)

    # The experts whose places are sorted: those bid for, or all where that is less work.
    all_experts = len(expert_B) > E
    rows = torch.arange(E + 1, device=expert_B.device) if all_experts else expert_B
    row_B = expert_B if all_experts else torch.arange(len(expert_B), device=expert_B.device)
    held, place = bid_EM[rows].sort(dim=1, stable=True)
    held_B, place_B = held[row_B, rank_B], place[row_B, rank_B]
    wins_B = inside_B & (offer_B > held_B)
    displaced_B = holder_EM[expert_B, place_B]
    # Who loses writes what stands in the extra expert anyway, so that every index is distinct.
    at_B = torch.where(wins_B, expert_B, E), torch.where(wins_B, place_B, 0)
    bid_EM.index_put_(at_B, torch.where(wins_B, offer_B, torch.inf))
    holder_EM.index_put_(at_B, torch.where(wins_B, bidder_B, -1))
    touched = torch.arange(E, device=rows.device) if all_experts else expert_B.clamp(max=E - 1)
    price_E.index_copy_(0, touched, bid_EM[touched].amin(1))
    return torch.where(wins_B, displaced_B, bidder_B)
