"""PEFT LoRAs as the LoRA experts of banks: expert e alone computes what PEFT adds for adapter e.

Shapes: E experts, R rank of an adapter, I input features, O output features.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.conversion.sources.lora_folder import CONFIG, LORA_A, LORA_B, WEIGHTS, LoraFolder
from sparsecraft.conversion.sources.source import Source, is_base
from sparsecraft.dense.donors import Linear
from sparsecraft.dense.origin import Origin
from sparsecraft.dense.safefile import SafeFile
from sparsecraft.errors import RecipeError, SourceError
from sparsecraft.moe.experts.lora import LoRAExperts
from sparsecraft.moe.names import unique_tensors
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.plan import PlannedEdit
from sparsecraft.surgery.record import origin_of

log = logging.getLogger("sparsecraft")


def keeps_loras(recipe: Recipe) -> bool:
    """Whether sources of this recipe are LoRAs that stay apart."""
    return recipe.expansion is None and all(e.experts.comes_from == "lora" for e in recipe.edits)


def largest_rank(folders: Sequence[str | Path]) -> int | None:
    """The largest rank of the LoRAs among `folders`; None if there is none."""
    ranks = []
    for folder in map(Path, folders):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            held = SafeFile.open(folder / WEIGHTS, SourceError).entries.items()
            ranks += [
                entry.shape[0] for name, entry in held if name.endswith(LORA_A) and entry.shape
            ]
    return max(ranks, default=None)


def open_loras(
    model: nn.Module,
    recipe: Recipe,
    plan: Sequence[PlannedEdit],
    given: Sequence[Any],
    *,
    unrelated: bool = False,
) -> list[Source]:
    """The adapters that the experts of `recipe` will be, all of whose tensors have their place.

    Args:
        model: the dense model, or its skeleton without memory.
        unrelated: let adapters pass that were trained on other weights than the model's.

    Raises:
        RecipeError: their number or rank is not the recipe's, or its experts are not PEFT's
            function one by one.
        SourceError: no LoRA, or tensors without a place.
    """
    _check_recipe(recipe, len(given))
    places, held = _places(plan), unique_tensors(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    sources = []
    for folder in given:
        if not (isinstance(folder, (str, Path)) and (Path(folder) / CONFIG).is_file()):
            name = folder if isinstance(folder, (str, Path)) else type(folder).__name__
            raise SourceError(
                f"{str(name)!r} is no folder with {CONFIG}; the experts of recipe {recipe.name!r} "
                "are LoRAs, which come from folders of PEFT LoRAs. Whole models are for btx."
            )
        lora = LoraFolder(Path(folder))
        lora.check_kind()
        _check_places(lora, places, recipe)
        if not unrelated:
            _check_base(model, held, lora)
        sources.append(
            Source(
                str(folder),
                model.config,
                held.get,
                shapes.get,
                folder=lora.folder,
                lora=lora,
                changes=lora.changes(),
            )
        )
    _check_ranks(recipe, sources)
    return sources


@torch.no_grad()
def fill(bank: LoRAExperts, item: PlannedEdit, sources: Sequence[Source]) -> None:
    """Make the experts of a bank the updates of the adapters, expert e that of e N // E of N."""
    donor = item.donor
    for e in range(bank.num_experts):
        source = sources[e * len(sources) // bank.num_experts]
        lora = source.lora
        pair, scale = lora.pair(donor.path), 1.0
        if pair is not None:
            source.used.add(f"{donor.path}.weight")
            down_RI, up_OR = pair
            if donor.rows:
                up_OR = up_OR.narrow(0, *donor.rows)
            pair, scale = (down_RI, up_OR), lora.scale(donor.path, len(down_RI))
        bank.put(e, pair, scale)


def _check_recipe(recipe: Recipe, count: int) -> None:
    if recipe.others != "base":
        raise RecipeError(
            f"others={recipe.others!r} with LoRAs as experts, which change nothing else; "
            "use others='base'."
        )
    for edit in recipe.layers:
        experts, router = edit.experts, edit.router
        if experts.num_experts % count:
            raise RecipeError(
                f"{experts.num_experts} experts of recipe {recipe.name!r} cannot come from {count} "
                f"LoRAs alike; set num_experts={count}, or a multiple of it."
            )
        if experts.shared_a and experts.num_experts > 1:
            raise RecipeError(
                f"The experts of recipe {recipe.name!r} share one A, and LoRAs that were trained "
                "apart have each their own; use molora or smola."
            )
        if router and router.mixes_tokens:
            raise RecipeError(
                "Experts of slots read means of tokens, which is not what the LoRAs were trained "
                "for; use mixing='token'."
            )
        if edit.modality:
            raise RecipeError(
                "Sets of experts by modality add up, and each LoRA would count twice; use "
                "modalities=False."
            )


def _places(plan: Sequence[PlannedEdit]) -> dict[str, list[Linear]]:
    """Path of a Linear -> the views of it, or of some of its rows, that get experts."""
    places = defaultdict(list)
    for item in plan:
        if item.site.activated or not isinstance(item.donor, Linear):
            raise RecipeError(
                f"LoRA experts beside the {item.site.kind} at {item.site.path!r}, which is no "
                "single Linear; PEFT's LoRAs are updates of one."
            )
        places[item.donor.path].append(item.donor)
    return places


def _check_places(lora: LoraFolder, places: dict[str, list[Linear]], recipe: Recipe) -> None:
    """Refuse an adapter of which something would be lost, naming the first."""
    if not lora.tensors:
        raise SourceError(f"{lora.folder / WEIGHTS} holds no LoRA.")
    for name, tensor in lora.tensors.items():
        part = next((part for part in (LORA_A, LORA_B) if name.endswith(part)), "")
        linears = places.get(name.removesuffix(part)) if part else None
        if linears is None:
            raise SourceError(
                f"{lora.folder} holds {name!r}, for which the experts of recipe {recipe.name!r} "
                "have no place: they are LoRAs of Linears "
                f"such as {', '.join(list(places)[:2])}. Merge what else was trained (DoRA, "
                "biases, embeddings, modules_to_save) into the base first, or leave it out."
            )
        whole = Linear(linears[0].module, linears[0].path)
        width = whole.in_features if part == LORA_A else whole.out_features
        if tensor.ndim != 2 or tensor.shape[1 if part == LORA_A else 0] != width:
            raise SourceError(
                f"{name!r} of {lora.folder} is {list(tensor.shape)} and the Linear of the model "
                f"has {whole.in_features} input and {whole.out_features} output features."
            )
        if part == LORA_B and all(linear.rows for linear in linears):
            _check_rows(lora, name, tensor, linears)


def _check_rows(lora: LoraFolder, name: str, up_OR: Tensor, linears: list[Linear]) -> None:
    """Refuse an update of output features that no expert has, where several are fused."""
    free_O = torch.ones(len(up_OR), dtype=torch.bool)
    for start, length in (linear.rows for linear in linears):
        free_O[start : start + length] = False
    lost = (free_O & (up_OR != 0).any(1)).nonzero()
    if len(lost):
        raise SourceError(
            f"{name!r} of {lora.folder} changes output feature {lost[0].item()} of a projection of "
            "which the recipe's experts have other rows only; use variant='paper'."
        )


def _check_ranks(recipe: Recipe, sources: Sequence[Source]) -> None:
    rank = min(edit.experts.rank for edit in recipe.layers)
    largest = {
        source.name: max((len(t) for n, t in source.lora.tensors.items() if n.endswith(LORA_A)))
        for source in sources
    }
    name = max(largest, key=largest.get)
    if largest[name] > rank:
        raise RecipeError(
            f"{name} has rank {largest[name]} and the experts of recipe {recipe.name!r} {rank}; "
            f"set its rank to {largest[name]} (--set experts.rank={largest[name]}, or --rank)."
        )


def _check_base(model: nn.Module, held: Mapping[str, Tensor], lora: LoraFolder) -> None:
    """Refuse an adapter of other weights, where its base is at hand; say so where it is not."""
    named, revision = lora.config.get("base_model_name_or_path"), lora.config.get("revision")
    if not named or is_base(model, named, revision):
        return
    own, theirs = origin_of(model), Origin.find(named, revision)
    if theirs is None:
        log.warning(
            "%s was trained on %r, which is not on this disk; whether %r has the same weights was "
            "not checked.", lora.folder, named, getattr(model, "name_or_path", ""),
        )  # fmt: skip
        return
    for path in (n.removesuffix(LORA_A) for n in lora.tensors if n.endswith(LORA_A)):
        name = f"{path}.weight"
        ours = own.tensor(model, name) if held[name].is_meta else held[name].detach().cpu()
        if not ours.is_floating_point():  # quantized: the values are not the file's
            return
        other = theirs.tensor(model, name)
        same = other is not None and other.shape == ours.shape
        if not (same and (torch.equal(other.to(ours), ours) or torch.equal(ours.to(other), other))):
            raise SourceError(
                f"{lora.folder} was trained on {named!r}, whose {name!r} is not the model's; "
                "convert that model, or pass unrelated=True (--unrelated) to use the LoRA all the "
                "same."
            )
