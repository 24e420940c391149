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
from sparsecraft.moe.experts.attention import AttentionExperts
from sparsecraft.moe.experts.base import CopiedExperts
from sparsecraft.moe.experts.ffn import FFNExperts
from sparsecraft.moe.experts.lora import LoRAExperts
from sparsecraft.moe.init.neurons import diversify
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import dense_tensors
from sparsecraft.recipe.experts import AttentionSpec, FFNSpec
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
    for edit in recipe.edits:
        if edit.experts.kind not in ("ffn", "attention"):
            raise RecipeError(
                f"Recipe {recipe.name!r} has {edit.experts.kind} experts, which come from one "
                "model; sources are for full feed-forward experts and attentions (btx, bam), and "
                "PEFT LoRAs for recipes of LoRAs alone (molora, smola, lora)."
            )
        blend = edit.experts.kind == "ffn" and edit.experts.blend
        networks = networks_of(edit.experts)
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


def networks_of(spec: FFNSpec | AttentionSpec) -> int:
    """How many networks the experts are, or are shards of."""
    return spec.num_experts // (1 if spec.kind == "attention" else spec.granularity)


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
    givers: Sequence[Source],
) -> None:
    """Fill the experts of a converted model from `givers` (the sources, and what an expansion made
    of them), and its other tensors from `sources` as the recipe says. Expert e of E comes from
    giver e N // E of N. Then, with sources or without, whatever of the experts the recipe draws at
    random."""
    for item, layer in zip(plan, layers, strict=True):
        bank = layer.experts
        if sources and isinstance(bank, CopiedExperts):
            _fill(bank, item.donor, givers)
        if sources and isinstance(bank, LoRAExperts):
            fill(bank, item, sources)
        if isinstance(bank, FFNExperts):
            diversify(bank, item.edit.experts)
        if sources and isinstance(bank, AttentionExperts) and recipe.others == "mean":
            for name, parameter in bank.shared_parts().items():
                parameter.copy_(mean(sources, f"{item.donor.path}.{name}").view_as(parameter))
    if recipe.others == "base" or not sources:
        return
    own = donor_tensors(plan)
    for name, tensor in dense_tensors(model).items():
        if name not in own and tensor.is_floating_point():
            tensor.copy_(mean(sources, name))


def _fill(bank: CopiedExperts, donor: FFN | Attention, sources: Sequence[Source]) -> None:
    if isinstance(bank, FFNExperts) and bank.spec.blend:
        donors = [donor.of(source.tensor) for source in sources]
        for e in range(bank.num_experts):
            bank.put(e, *donors)
        return
    each = bank.num_experts // len(sources)
    for number, source in enumerate(sources):
        of_source = donor.of(source.tensor)
        for e in range(number * each, (number + 1) * each):
            bank.put(e, of_source)
