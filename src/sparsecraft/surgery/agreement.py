"""Whether a model runs what the one record of it says, which is what a checkpoint holds."""

from __future__ import annotations

import math

from torch import nn

from sparsecraft.errors import CheckpointError
from sparsecraft.moe.experts.split import SplitExperts, is_relu
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.running import Running
from sparsecraft.surgery.budget import setting, split_layers
from sparsecraft.surgery.record import conversion_of


def check_agrees(model: nn.Module) -> None:
    """Refuse to save split networks that were set one by one, which would come back otherwise.

    Raises:
        CheckpointError: a gate or a bank is not as the model's `running` says.
    """
    running, layers = conversion_of(model).running, split_layers(model)
    for name, layer in layers.items():
        if found := _bank_differs(layer, running) or _gate_differs(layer, running):
            raise CheckpointError(
                f"{name} was set by hand: {found}. A checkpoint holds one record of what all split "
                "networks run; undo that, or set all of them by sc.set_budget(model, share). A "
                "state_dict() holds each as it is."
            )
    ways = sorted({layer.router.runs for layer in layers.values()})
    if len(ways) > 1:
        raise CheckpointError(
            f"Some of the split networks run {ways[0]!r} and some {ways[1]!r}. A checkpoint holds "
            "one record of what all of them run; set all by sc.set_budget(model, share)."
        )


def _bank_differs(layer: MoELayer, running: Running) -> str | None:
    bank: SplitExperts = layer.experts
    fits = is_relu(bank.activation) if running.rectified else bank.has_own_activation
    if not fits:
        wanted = "ReLU" if running.rectified else "the dense network's own"
        return f"its activation is {bank.activation!r}, and the model's record says {wanted}"
    wanted = running.imitates and layer.is_imitation
    if bank.imitates != wanted:
        return f"its bank has imitates={bank.imitates}, and the model's record says {wanted}"
    return None


def _gate_differs(layer: MoELayer, running: Running) -> str | None:
    """Of a gate that runs by its rule; while a stage trains, all run as that asks."""
    gate = layer.router
    if gate.runs != "sparse":
        return None
    if running.budget == 1:
        return "it runs by its rule, and the model's record says that every expert runs"
    k, threshold = setting(gate, running.budget, running.calibration)
    budget = "recipe's own rule" if running.budget is None else f"budget of {running.budget:g}"
    if k is not None and gate.k != k:
        return f"its gate has k={gate.k}, and the {budget} that the model's record names {k}"
    near = threshold is None or math.isclose(gate.threshold, threshold, rel_tol=1e-5, abs_tol=1e-9)
    if not near:
        return (
            f"its gate has threshold={gate.threshold:.6g}, and the {budget} that the model's "
            f"record names {threshold:.6g}"
        )
    return None
