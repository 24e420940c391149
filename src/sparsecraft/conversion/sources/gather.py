"""Experts from several dense models of one ancestor (BTX, Sukhbaatar et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsecraft.conversion.sources.checks import check_sources
from sparsecraft.conversion.sources.lora_experts import fill, keeps_loras, open_loras
from sparsecraft.conversion.sources.source import Source, mean, open_source
from sparsecraft.dense.donors import FFN, Attention
from sparsecraft.errors import RecipeError
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import dense_tensors
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.plan import PlannedEdit


def opened(
    model: nn.Module,
    recipe: Recipe,
    plan: Sequence[PlannedEdit],
    given: Sequence,
    *,
    unrelated: bool,
) -> list[Source]:
    """The sources that a user gave, checked against the dense model and the recipe.

    Raises:
        RecipeError: the recipe has other experts than full networks or LoRAs, or not a multiple of
            them.
        SourceError, HubError: a source does not fit, or is not there.
    """
    if not given:
        return []
    if keeps_loras(recipe):
        return open_loras(model, recipe, plan, given, unrelated=unrelated)
    _check_counts(recipe, len(given))
    sources = [open_source(model, source) for source in given]
    check_sources(model, sources, donor_tensors(plan), unrelated=unrelated)
    return sources


def _check_counts(recipe: Recipe, count: int) -> None:
    for edit in recipe.layers:
        if edit.experts.comes_from != "network":
            raise RecipeError(
                f"Recipe {recipe.name!r} has {edit.experts.kind} experts, which come from one "
                "model; sources are for full feed-forward experts and attentions (btx, bam), and "
                "PEFT LoRAs for recipes of LoRAs alone (molora, smola, lora)."
            )
        blend, networks = edit.experts.blends, edit.experts.networks
        if recipe.expansion is not None and not blend:  # makes what is missing, and checks it
            continue
        if networks % count or (blend and networks != count):
            whole = networks == edit.experts.num_experts
            of = "" if whole else f" ({networks} networks in shards)"
            raise RecipeError(
                f"{edit.experts.num_experts} experts{of} cannot come from {count} sources "
                f"alike; set num_experts={count}"
                + (" for blending." if blend else ", or a multiple of it.")
            )


def donor_tensors(plan: Sequence[PlannedEdit]) -> dict[str, Tensor]:
    """The tensors of the dense networks that experts are like, by their dense names."""
    donors = [item.donor for item in plan if isinstance(item.donor, (FFN, Attention))]
    return {name: tensor for donor in donors for name, tensor in donor.tensors().items()}


@torch.no_grad()
def gather(
    model: nn.Module,
    recipe: Recipe,
    plan: Sequence[PlannedEdit],
    layers: Sequence[MoELayer],
    sources: Sequence[Source],
    networks: Sequence[Source],
) -> None:
    """Fill the experts of a converted model from `networks` (the sources, and what an expansion
    made of them), and its other tensors from `sources` as the recipe says. Then, with sources or
    without, whatever of the experts the recipe draws at random."""
    means = bool(sources) and recipe.others == "mean"
    for item, layer in zip(plan, layers, strict=True):
        bank, comes_from = layer.experts, item.edit.experts.comes_from
        if sources and comes_from == "network":
            bank.take((item.donor.of(source.tensor) for source in networks), len(networks))
        if sources and comes_from == "lora":
            fill(bank, item, sources)
        bank.diversify()
        for name, parameter in bank.shared_parts().items() if means else ():
            parameter.data = like(parameter, mean(sources, f"{item.donor.path}.{name}"))
    if not means:
        return
    own = donor_tensors(plan)
    for name, tensor in dense_tensors(model).items():
        if name not in own and tensor.is_floating_point():
            tensor.data = like(tensor, mean(sources, name))


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """The value in memory of its own, in the form, type and place of a tensor."""
    return torch.empty_like(tensor.detach()).copy_(value.view_as(tensor))
