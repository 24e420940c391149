"""apply(): put the planned layers into a model."""

from __future__ import annotations

import dataclasses
import functools

from torch import nn

from sparsecraft.dense.quantization import keep_layout, packing_of
from sparsecraft.dense.sites import FFNSpan, silence
from sparsecraft.errors import RecipeError
from sparsecraft.moe.batches import Batches, attach
from sparsecraft.moe.context import asks_for_batch
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import other_names, unique_tensors
from sparsecraft.recipe.recipe import Quantize, Recipe
from sparsecraft.surgery.budget import run, split_layers
from sparsecraft.surgery.build import build_layer
from sparsecraft.surgery.identity import base_in
from sparsecraft.surgery.left_out import left_out
from sparsecraft.surgery.plan import PlannedEdit
from sparsecraft.surgery.record import Conversion
from sparsecraft.surgery.state import load_state_dict
from sparsecraft.surgery.trainable import set_trainable


def apply(
    model: nn.Module, recipe: Recipe, edits: list[PlannedEdit], *, on_meta: bool = False
) -> Conversion:
    """Install the planned layers in place and freeze what the first stage does not train.

    Args:
        on_meta: leave the new tensors without memory, for a loader that brings their values.
    """
    recipe = on_packed(model, recipe)
    trainable = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
    record = Conversion(
        recipe,
        edits,
        trainable=trainable,
        named=base_in(model.name_or_path),  # of a configuration that a converted one has
        aliases=other_names(model),
        shapes={name: tensor.shape for name, tensor in unique_tensors(model).items()},
        vocabulary=_vocabulary(model),
        left_out=left_out(model, recipe, edits),
    )
    # All layers are built before the first change, so that a failure leaves the model whole.
    device = "meta" if on_meta else None
    record.layers = [
        build_layer(model, item, number=number, device=device) for number, item in enumerate(edits)
    ]
    record.devices = [item.donor.reference.device for item in edits]
    model.sparsecraft = record
    model.load_state_dict = functools.partial(load_state_dict, model)
    for item, layer in zip(edits, record.layers, strict=True):
        _install(model, item, layer, record.dense)
    run(model, "every")  # until a stage has made their routers
    for layer in split_layers(model).values():
        layer.router.running = record.running
    if _asks_for_batch(recipe):
        batches = Batches()
        record.hooks = attach(model, batches)
        for layer in record.layers:
            layer.batches = batches
    record.own_loss.attach(model)
    set_trainable(model, recipe.stages[0].trains)
    return record


def _asks_for_batch(recipe: Recipe) -> bool:
    """Whether any edit asks what a batch says of its tokens, now or with the router of a stage."""
    later = [recipe.with_router_of(stage) for stage in recipe.stages if stage.router]
    return any(asks_for_batch(edit) for each in (recipe, *later) for edit in each.edits)


def _vocabulary(model: nn.Module) -> int | None:
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # what reads images or sound
        return None
    weight = getattr(embedding, "weight", None)
    return None if weight is None else len(weight)


def on_packed(model: nn.Module, recipe: Recipe) -> Recipe:
    """The recipe, which says how the weights of `model` are packed.

    A recipe that says nothing of it takes what bitsandbytes packed into int8 or fp4 as it is; nf4,
    which is a part of methods, is to be said.

    Raises:
        RecipeError: they are packed in another way than the recipe says.
        SurgeryError: they are packed in a way that does not come back as it was.
    """
    found = packing_of(model)
    keep_layout(model)
    if recipe.quantization is None and found not in (None, "nf4"):
        return dataclasses.replace(recipe, backbone=Quantize(found))
    if recipe.quantization != found:
        raise RecipeError(
            f"Recipe {recipe.name!r} asks for backbone={recipe.quantization!r} and "
            f"the model was loaded with {found!r}; load it with "
            f"sparsecraft.hub.load_dense(name, quantize={recipe.quantization!r}), or say "
            f"sc.override(recipe, {{'backbone': {found!r}}})."
        )
    return recipe


def _install(
    model: nn.Module, item: PlannedEdit, layer: MoELayer, dense: dict[str, nn.Module]
) -> None:
    site = item.site
    training = model.get_submodule(site.path).training
    base = FFNSpan(model, site) if site.spans_siblings else model.get_submodule(site.path)
    if not item.edit.replaces:
        layer.base = base
    layer.train(training)
    if site.spans_siblings:
        for path in base.paths.values():
            dense[path] = dense.get(path, model.get_submodule(path))
            model.set_submodule(path, nn.Identity())
        base.train(training)
        silence(model, site)
    else:
        dense[site.path] = dense.get(site.path, base)
    model.set_submodule(site.path, layer)
