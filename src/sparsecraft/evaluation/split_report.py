"""What a model with split networks runs, in words: partition, rule, budget and what it saves."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsecraft.moe.cost import active_share, split_flops
from sparsecraft.moe.experts.split import is_relu
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.gate import Gate
from sparsecraft.moe.routers.running import Running
from sparsecraft.recipe.stages import Fit, Stage
from sparsecraft.surgery.budget import split_layers
from sparsecraft.surgery.record import conversion_of


def split_lines(model: nn.Module) -> list[str]:
    """Lines about the split networks of a converted model; none without them."""
    found = split_layers(model).values()
    layers = [layer for layer in found if not layer.is_imitation]
    imitations = [layer for layer in found if layer.is_imitation]
    if not layers:
        return []
    record = conversion_of(model)
    running: Running = record.running
    kinds = dict.fromkeys(_parts(layer) for layer in layers)
    return [
        *(f"  {kind}" for kind in kinds),
        *_imitations(imitations),
        f"Stages: {_stages(record.recipe.stages, running)}.",
        f"Budget: {_budget(layers, running)}.",
        f"Calibration: {_calibration(layers[0].router, running)}.",
        f"FFN FLOPs per token: {_flops(layers)}.",
    ]


def _parts(layer: MoELayer) -> str:
    bank, gate = layer.experts, layer.router
    idle = "give their mean" if bank.compensates else "give nothing"
    activation = "ReLU" if is_relu(bank.activation) else type(bank.activation).__name__
    return (
        f"{bank.num_experts} x {bank.neurons_per_expert} neurons by {bank.spec.partition} "
        f"({activation}), weighted by {gate.spec.weighting}; those that do not run {idle}"
    )


def _imitations(layers: list[MoELayer]) -> list[str]:
    if not layers:
        return []
    fitted = sum(layer.imitates for layer in layers)
    return [f"  {len(layers)} networks that imitate Linears, {fitted} of them fitted and running"]


def _stages(stages: tuple[Stage | Fit, ...], running: Running) -> str:
    return ", ".join(
        f"{stage.name} {'done' if stage.name in running.stages else 'to do'}" for stage in stages
    )


def _budget(layers: list[MoELayer], running: Running) -> str:
    gate = layers[0].router
    if running.budget == 1:
        return "1.0, every expert runs, which is the dense function"
    words = "the recipe's own rule" if running.budget is None else f"{running.budget:g}"
    if gate.spec.k is not None:
        return f"{words}, {' or '.join(dict.fromkeys(_chosen(layer.router) for layer in layers))}"
    return f"{words}, {gate.spec.select.kind} at threshold {gate.threshold:.4g}"


def _chosen(gate: Gate) -> str:
    beside = f" beside {gate.spec.shared} shared" if gate.spec.shared else ""
    return f"{gate.k} of {gate.num_experts} experts{beside}"


def _calibration(gate: Gate, running: Running) -> str:
    if gate.spec.k is not None:
        return "not needed, top-k follows from the budget"
    if not running.calibration:
        return "none"
    (low, first), *_, (high, last) = [*running.calibration, running.calibration[-1]]
    return (
        f"{len(running.calibration)} points, shares {low:.3f} to {high:.3f} at thresholds "
        f"{first:.4g} to {last:.4g}"
    )


def _flops(layers: list[MoELayer]) -> str:
    unknown = any(layer.router.runs == "sparse" and layer.router.share is None for layer in layers)
    if unknown:
        return "not known; `sparsecraft calibrate` measures how many experts the rule runs"
    dense = sum(split_flops(layer, 1.0) for layer in layers)
    found = sum(split_flops(layer, active_share(layer)) for layer in layers)
    return f"{found:,} of {dense:,} ({found / dense:.1%}), routers included"


def fit_line(run: dict[str, Any]) -> str:
    """One line about a stage that fitted routers, or networks that imitate others."""
    return f"Fitted ({run['stage']}): {run['fit']['steps']} steps, {summary(run['fit'])}."


def summary(found: dict[str, Any]) -> str:
    """What `fit` found, in one line."""
    layers = found["layers"].values()
    if not all("mass_router" in layer for layer in layers):
        loss = sum(layer["loss"] for layer in layers) / len(layers)
        return f"{found['tokens']} tokens; held-out loss {loss:.4f}"
    masses = ("router", "oracle", "similarity", "chance")
    means = {name: sum(layer[f"mass_{name}"] for layer in layers) / len(layers) for name in masses}
    shown = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
    return f"{found['tokens']} tokens; mass captured by 20% of the experts: {shown}"
