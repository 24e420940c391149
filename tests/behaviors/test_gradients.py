"""What DDP asks of gradients: every trained parameter has one, whatever the batch, and it lies in
memory as its parameter does, so that nobody copies it."""

from __future__ import annotations

import pytest
import torch

from sparsecraft.recipe.stages import Fit
from sparsecraft.surgery.trainable import set_trainable
from sparsecraft.training.staging import begin_stage
from tests.behaviors.test_recipes import ALL, converted, losses_of
from tests.cases import batch

# As they train: of split networks those whose routers have been made.
TRAINED = [
    name
    for name, case in ALL.items()
    if any(not isinstance(stage, Fit) for stage in case.make().stages)
    and (name.endswith("_sparse") or f"{name}_sparse" not in ALL)
]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("recipe", TRAINED)
def test_every_trained_parameter_has_a_gradient_with_its_own_strides(recipe):
    model = converted("llama", recipe, certify=False)
    inputs = batch("llama", labels=True)
    for stage in model.sparsecraft.recipe.stages:
        if isinstance(stage, Fit):
            continue
        set_trainable(model.train(), stage.trains)
        if stage.runs != "sparse":  # which it does, by routers that no test has fitted
            begin_stage(model, stage)
        # One token: nearly all experts get none.
        one = {name: tensor[:1, :2] for name, tensor in inputs.items()}
        for given, halved in ((inputs, False), (one, True)):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=halved):
                losses_of(model.sparsecraft.recipe, model, given).backward()
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            assert trained
            assert [n for n, p in trained.items() if p.grad is None] == []
            lie = {n: (p.stride(), p.grad.stride()) for n, p in trained.items()}
            assert {n: pair for n, pair in lie.items() if pair[0] != pair[1]} == {}
