"""A split model before, in and after a stage: its activation, and how many of its experts run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.experts.split import is_relu
from sparsecraft.recipe.stages import Fit, Stage
from sparsecraft.surgery.budget import (
    imitate,
    is_untrained,
    rectify,
    run,
    set_budget,
    split_layers,
    unmade,
    untrained,
)
from sparsecraft.surgery.exchange import exchange_routers
from sparsecraft.surgery.record import conversion_of


def begin_stage(model: nn.Module, stage: Stage | Fit) -> None:
    """Let split networks run as a stage of training needs them.

    Raises:
        SparsecraftError: the stage is to train by routers that have not been made.
    """
    if not split_layers(model):
        return
    if isinstance(stage, Fit):
        _check_rectified(model, stage)
        return  # it looks at the whole networks itself
    if stage.activation == "relu":
        rectify(model)
    if stage.runs == "sparse":
        if untrained(model):
            record = conversion_of(model)
            missing = " ".join(unmade(record.recipe, record.running))
            raise SparsecraftError(
                f"Stage {stage.name!r} trains by routers that are made before it; run that first "
                f"(--stages {missing} {stage.name})."
            )
        set_budget(model, None)  # not that of an earlier budget
    run(model, stage.runs)


def _check_rectified(model: nn.Module, stage: Fit) -> None:
    """Refuse to fit routers to a network that still lacks the ReLU of an earlier stage."""
    record = conversion_of(model)
    names = [other.name for other in record.recipe.stages]
    earlier = record.recipe.stages[: names.index(stage.name)]
    missing = [s.name for s in earlier if isinstance(s, Stage) and s.activation == "relu"]
    layers = split_layers(model).values()
    banks = [layer.experts for layer in layers if not layer.is_imitation]
    if missing and stage.what == "routers" and not all(is_relu(b.activation) for b in banks):
        raise SparsecraftError(
            f"Stage {stage.name!r} fits routers for networks with ReLU, and stage {missing[0]!r}, "
            f"which puts it in, has not run; run both (--stages {missing[0]} {stage.name}), or "
            "convert by a recipe that keeps the activation, such as gmoefication."
        )


def end_stage(model: nn.Module, stage: Stage | Fit) -> None:
    """Record that a stage is done; once routers are made, the recipe's rule is in force."""
    if not split_layers(model):
        return
    record = conversion_of(model)
    if isinstance(stage, Fit) and stage.what == "imitations":
        imitate(model)
    names = [other.name for other in record.recipe.stages]
    # What came after it was made from what it has changed.
    before = names[: names.index(stage.name)]
    record.running.stages = [n for n in record.running.stages if n in before] + [stage.name]
    record.running.calibration.clear()  # thresholds of other weights
    set_budget(model, 1.0 if is_untrained(record.recipe, record.running) else None)


@contextmanager
def staged(model: nn.Module, stage: Stage | Fit, seed: int = 0) -> Iterator[None]:
    """One stage of training; if it fails, the model runs as it did before.

    Args:
        seed: of routers that it puts in.
    """
    gates = [layer.router for layer in split_layers(model).values()]
    before = [(gate, gate.runs, gate.k, gate.share, gate.threshold) for gate in gates]
    record = conversion_of(model)
    training, running = model.training, record.running
    rectified, budget = running.rectified, running.budget
    recipe, plan, routers = record.recipe, record.plan, [layer.router for layer in record.layers]
    try:
        if stage.router is not None:
            exchange_routers(model, stage, seed)
        begin_stage(model, stage)
        yield
    except BaseException:
        if running.rectified and not rectified:
            rectify(model, undo=True)
        running.budget = budget
        for gate, *state in before:
            gate.runs, gate.k, gate.share, gate.threshold = state
        record.recipe, record.plan = recipe, plan
        for layer, router in zip(record.layers, routers, strict=True):
            layer.router = router
        record.own_loss.meet_routers(model)
        model.train(training)
        raise
    end_stage(model, stage)
