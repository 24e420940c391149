"""Every faster way through a layer equals its place's own function, forward and backward."""

from __future__ import annotations

import pytest
import torch

import sparsecraft as sc
from sparsecraft.moe import fusions, places
from sparsecraft.moe import layer as layer_module
from sparsecraft.moe.experts.base import set_dispatch
from sparsecraft.moe.layer import MoELayer
from tests.cases import RECIPES, RUNNING, batch, dense, randomize_new

ALL = RECIPES | RUNNING
# A Linear of its own for each projection; GPT-2's Conv1D, whose projections are one; an encoder.
FAMILIES = ("llama", "gpt2", "bert")
ONE = torch.zeros(1, 1, 8)  # a token
FUSIONS = {
    fusions.lora_beside: places.beside,
    fusions.vector_after: places.after,
    fusions.parts_in_use: places.replace,
}
# Recipes of which a fusion runs at some layer of Llama.
FUSED = {
    "lora_beside": "molora_raw lora camelidae hydralora smola_modalities cmoe_tuned_sparse".split(),
    "vector_after": "mov mov_top2 mov_released ia3".split(),
    "parts_in_use": "moefication_sparse d2dmoe_sparse lte_sparse cmoe_sparse".split(),
}


def converted(family: str, recipe: str) -> torch.nn.Module:
    model = dense(family)
    sc.convert(model, ALL[recipe].make(), certify=False)
    randomize_new(model)
    ALL[recipe].ready(model)
    return model.requires_grad_(True)


def layers(model: torch.nn.Module) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def results(model: torch.nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """Logits, loss and every gradient."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), "loss": output.loss.detach(), **found}


def assert_close(left: dict, right: dict, tolerance: float = 2e-5) -> None:
    assert left.keys() == right.keys()
    for name in left:
        scale = max(1.0, left[name].abs().max().item())
        assert (left[name] - right[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ALL)
def test_fusions_equal_the_places_forward_and_backward(family, recipe, monkeypatch):
    if family not in ALL[recipe].families:
        pytest.skip(f"{recipe} is not for {family}")
    model, inputs = converted(family, recipe), batch(family, labels=True)
    fused = results(model, inputs)
    set_dispatch(model, "loop")
    assert not any(fusions.faster(layer, ONE) for layer in layers(model))
    by_loop = results(model, inputs)
    set_dispatch(model, "auto")
    monkeypatch.setattr(layer_module, "faster", lambda layer, x: None)
    by_place = results(model, inputs)
    assert_close(by_place, fused)
    assert_close(by_place, by_loop)


@pytest.mark.parametrize(("name", "recipe"), [(n, r) for n in FUSED for r in FUSED[n]])
def test_a_fusion_is_a_free_function_that_equals_its_place(name, recipe):
    model = converted("llama", recipe)
    fusion = getattr(fusions, name)
    place = FUSIONS[fusion]
    found = [layer for layer in layers(model) if fusions.faster(layer, ONE) is fusion]
    assert found, f"no layer of {recipe} goes by {name}"
    inputs = {}

    def keep(layer, args, kwargs):
        inputs[layer] = args, kwargs

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in found]
    model(**batch("llama"))
    for hook in hooks:
        hook.remove()
    for layer in found:
        (x, *args), kwargs = inputs[layer]
        outputs = []
        for way in (place, fusion):
            x = x.detach().clone().requires_grad_()
            layer.zero_grad()
            y = way(layer, x, *args, **kwargs)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y).sin()).sum().backward()
            own = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
            outputs.append({"y": y.detach(), "x": x.grad, **own})
        assert_close(*outputs)


def test_every_fusion_is_named_here():
    assert {fusion.__name__ for fusion in FUSIONS} == set(FUSED)


def test_what_a_fusion_changes_is_seen(monkeypatch):
    model, inputs = converted("llama", "molora_raw"), batch("llama", labels=True)
    right = results(model, inputs)
    true = fusions.lora_beside
    monkeypatch.setattr(fusions, "lora_beside", lambda *a, **k: true(*a, **k) * 1.001)
    with pytest.raises(AssertionError):
        assert_close(right, results(model, inputs))
