"""How much of its split networks a converted model runs: all, a share, or what its recipe says."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch import nn

from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.gate import Gate, Runs
from sparsecraft.moe.routers.running import Running
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.record import check_stands, conversion_of, is_converted
from sparsecraft.surgery.rollback import atomic

log = logging.getLogger("sparsecraft")


def split_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Name -> layer of every split network that has a router."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MoELayer) and isinstance(module.router, Gate)
    }


def run(model: nn.Module, runs: Runs) -> None:
    """Let every split network run its selected experts, all, or all by their scores."""
    for layer in split_layers(model).values():
        layer.router.runs = runs


@atomic
def set_budget(model: nn.Module, share: float | None) -> None:
    """Choose how many experts of its split networks a converted model runs, in place.

    The choice is saved with the model. No decision waits for the device; a CUDA graph that was
    captured before follows a new threshold, not a new number of top-k experts.

    Args:
        share: of the experts of each network. At 1.0 every expert runs with weight one: the
            function of the dense network. Below it rules by top-k take ceil(share E) experts, the
            shared ones among them, and rules by threshold what `calibrate` found for this mean
            share. None is the recipe's own rule.

    Raises:
        SparsecraftError: no split networks, a share outside (0, 1], or one outside of what was
            calibrated.
    """
    if is_converted(model):
        check_stands(model)
    layers = split_layers(model)
    if not layers:
        raise SparsecraftError(
            f"This {type(model).__name__} has no split networks, so that there is no budget to "
            "set; convert it by a recipe such as moefication, d2dmoe, lte or cmoe."
        )
    is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if share is not None and not (is_number and 0 < share <= 1):
        raise SparsecraftError(
            f"The budget is {share!r}; it is the share of experts that run, above 0 and at most 1, "
            "or None for the recipe's own rule."
        )
    running: Running = conversion_of(model).running
    found = [setting(layer.router, share, running.calibration) for layer in layers.values()]
    for layer, (k, threshold) in zip(layers.values(), found, strict=True):
        gate: Gate = layer.router
        gate.runs = "every" if share == 1 else "sparse"
        if k is not None:
            gate.k = k
            gate.share = 1.0 if share == 1 else (gate.spec.shared + k) / gate.num_experts
        if threshold is not None:
            gate.threshold = threshold
            gate.share = share_of(threshold, running.calibration) if share is None else share
    running.budget = None if share is None else float(share)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give a model's budget and calibration back as they were, whatever the block does."""
    running: Running = conversion_of(model).running
    before = running.budget, list(running.calibration)
    gates = [layer.router for layer in split_layers(model).values()]
    states = [(gate.runs, gate.k, gate.share, gate.threshold) for gate in gates]
    try:
        yield
    finally:
        running.budget, running.calibration = before
        for gate, state in zip(gates, states, strict=True):
            gate.runs, gate.k, gate.share, gate.threshold = state


def setting(
    gate: Gate, share: float | None, calibration: list[tuple[float, float]]
) -> tuple[int | None, float | None]:
    """The k or the threshold of one router for a share, of which the other is None.

    Raises:
        SparsecraftError: a share that leaves no expert, or that was not calibrated.
    """
    spec = gate.spec
    if spec.k is not None:
        if share is None:
            return spec.k, None
        wanted = math.ceil(share * gate.num_experts - 1e-9) - spec.shared
        if wanted < 1:
            least = (spec.shared + 1) / gate.num_experts
            raise SparsecraftError(
                f"A budget of {share} leaves no expert beside the {spec.shared} shared ones of "
                f"{gate.num_experts}; the least is {least:.3f}."
            )
        return wanted, None
    if share in (None, 1):
        return None, spec.threshold
    return None, threshold_of(share, calibration)


def threshold_of(share: float, calibration: list[tuple[float, float]]) -> float:
    """The threshold for a mean share, between those that were measured.

    Raises:
        SparsecraftError: nothing was measured, or nothing near enough.
    """
    if not calibration:
        raise SparsecraftError(
            f"A budget of {share} needs thresholds that were measured on data, and this model has "
            "none; run `sparsecraft calibrate DIR --data ...` (sc.calibrate) first."
        )
    shares = [known for known, _ in calibration]
    # A share that was printed with three digits is the one that was measured.
    if shares[0] - 5e-3 < share < shares[-1] + 5e-3:
        share = min(max(share, shares[0]), shares[-1])
    if not shares[0] <= share <= shares[-1]:
        raise SparsecraftError(
            f"A budget of {share} lies outside of what was calibrated, {shares[0]:.3f} to "
            f"{shares[-1]:.3f}. It is a share of the experts, and `calibrate` takes shares of the "
            "FLOPs; run `sparsecraft calibrate` (sc.calibrate) with targets on both sides of it."
        )
    right = bisect_left(shares, share)
    if shares[right] == share:
        return calibration[right][1]
    (low, below), (high, above) = calibration[right - 1 : right + 1]
    return below + (above - below) * (share - low) / (high - low)


def share_of(threshold: float, calibration: list[tuple[float, float]]) -> float | None:
    """The mean share that a threshold gives, between those that were measured; else None."""
    points = sorted((known, share) for share, known in calibration)
    for (low, first), (high, second) in pairwise(points):
        if low <= threshold <= high:
            return first + (second - first) * (threshold - low) / (high - low)
    return None


def state_of(model: nn.Module) -> dict[str, Any] | None:
    """What a checkpoint records of how the model runs; None without split networks."""
    if not split_layers(model):
        return None
    return conversion_of(model).running.to_dict()


def restore(model: nn.Module, state: dict[str, Any] | None, changed: bool = False) -> None:
    """Let a model that was just loaded run as it did when it was saved.

    Args:
        changed: its recipe is another now, so that budget and thresholds may be of another rule.
    """
    if state is None:
        return
    running: Running = conversion_of(model).running
    running.read(state)
    if running.rectified:
        rectify(model)
    if running.imitates:
        imitate(model)
    budget = running.budget
    if changed and (running.calibration or budget != 1.0):
        running.calibration, budget = [], 1.0 if budget == 1.0 else None
        in_force = "every expert runs" if budget else "the changed recipe's rule is in force"
        log.warning(
            "The recipe was changed at loading: the budget and the calibration that were saved are "
            f"dropped, and {in_force}."
        )
    set_budget(model, budget)


def rectify(model: nn.Module, undo: bool = False) -> None:
    """ReLUfication: let ReLU be the activation of every split network, or no longer."""
    for layer in split_layers(model).values():
        layer.experts.rectify(undo)
    conversion_of(model).running.rectified = not undo


def imitate(model: nn.Module) -> None:
    """Let the networks that imitate Linears, which have been fitted, run instead of them."""
    for layer in split_layers(model).values():
        layer.experts.imitates = layer.is_imitation
    conversion_of(model).running.imitates = True


def unmade(recipe: Recipe, running: Running) -> list[str]:
    """The stages that make routers, or networks that imitate Linears, and have yet to run."""
    makers = [stage.name for stage in recipe.stages if stage.makes_routers]
    return [name for name in makers if name not in running.stages]


def is_untrained(recipe: Recipe, running: Running) -> bool:
    """Whether a stage that makes the routers has yet to run."""
    return bool(unmade(recipe, running))


def warn_untrained(model: nn.Module) -> None:
    """Say before a save that a split is to run by routers that nothing has made yet."""
    record = conversion_of(model)
    gates = [layer.router for layer in split_layers(model).values()]
    if not (any(gate.runs == "sparse" for gate in gates) and untrained(model)):
        return
    budget = record.running.budget
    asked = "by its recipe's rule" if budget is None else f"at a budget of {budget:.3g}"
    log.warning(
        f"This split model is to run {asked}, and its routers have not been trained: networks with "
        "a gate, those of Llama and its like, seldom survive that (a user of LLaMA-MoE reported a "
        "perplexity of 3e5 instead of 5 for an untrained even split). Save it, train its routers "
        "by `sparsecraft train DIR --data ...` (sc.train), or set the budget back to 1.0."
    )


def untrained(model: nn.Module) -> bool:
    """Whether a converted model has split networks whose routers are yet to be made."""
    record = conversion_of(model)
    return bool(split_layers(model)) and is_untrained(record.recipe, record.running)
