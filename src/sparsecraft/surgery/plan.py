"""plan(): every edit on the untouched model, and what cannot be."""

from __future__ import annotations

import fnmatch
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from sparsecraft.dense.donors import Attention, Donor, view
from sparsecraft.dense.layers import layers_at
from sparsecraft.dense.mixtures import inside, mixtures
from sparsecraft.dense.once import looked_at_once
from sparsecraft.dense.sites import Site, find_sites
from sparsecraft.dense.tokens import Reads, is_causal, is_sequence_first, reads
from sparsecraft.errors import RecipeError, SparsecraftError, SurgeryError
from sparsecraft.moe.context import looks_at_sequences
from sparsecraft.recipe.by_layer import has_number, together
from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.attention_proof import prove


@dataclass(frozen=True, slots=True)
class PlannedEdit:
    """One edit at one site, with the view of the dense module taken before any change, and whose
    tokens arrive there.

    Attributes:
        edit: with the numbers of the layer.
        source: the edit as the recipe has it, for all layers.
        layer: the number of the layer, see `sparsecraft.dense.layers`.
        previous: claim of the layer before it in its stack, and the number of its experts, where
            the router goes on from its logits; None in the first one.
    """

    site: Site
    edit: Edit
    source: Edit
    layer: int
    donor: Donor
    reads: Reads
    previous: tuple[Hashable, int] | None = None

    @property
    def claim(self) -> tuple:
        """What no two edits of a recipe may share: edits can share a module where each has rows
        or tokens of its own."""
        return self.site.members, self.site.rows, self.edit.modality


@looked_at_once()
def plan(model: nn.Module, recipe: Recipe) -> list[PlannedEdit]:
    """Every edit of `recipe` at every site of the untouched `model`, inner sites first.

    Raises:
        DonorError: the model's family has no feed-forward network that we can read.
        SurgeryError: no site matches an edit, two edits claim one site, or an edit lies inside a
            module that another edit replaces.
        RecipeError: an unknown component, a model that is quantized differently, or numbers by
            layer for a model that has fewer or more.
    """
    planned = [
        PlannedEdit(site, layer, edit, number, view(model, site), reads(model, site.path))
        for edit in recipe.edits
        for site, layer, number in _by_layer(model, edit, _sites(model, edit))
    ]
    for item in planned:
        if isinstance(item.donor, Attention):
            prove(item.donor, item.edit.experts)
    claims: dict[tuple, PlannedEdit] = {}
    for item in planned:
        other = claims.setdefault(item.claim, item)
        if other is not item:
            raise SurgeryError(
                f"Two edits of recipe {recipe.name!r} claim {item.site.path!r}: "
                f"{other.edit.experts.kind} experts {other.edit.place} it and "
                f"{item.edit.experts.kind} experts {item.edit.place} it."
            )
    for outer in planned:
        for inner in planned:
            if outer.site.contains(inner.site):
                _check_nesting(outer, inner)
    for item in planned:
        if item.site.rows and item.edit.changes_input:
            raise SurgeryError(
                f"{item.site.path!r} is one projection for several, and experts before it would "
                f"change what all of them read, not the {item.site.kind} alone; use place='after'."
            )
        _check_tokens(model, item)
    # A site inside another one has the deeper path, except where the outer one spans siblings.
    depth = {id(p): sum(other.site.contains(p.site) for other in planned) for p in planned}
    return _linked(model, sorted(planned, key=lambda p: depth[id(p)], reverse=True))


def _linked(model: nn.Module, planned: list[PlannedEdit]) -> list[PlannedEdit]:
    """With the layer before each whose router goes on from one: of the same edit, in the same list
    of blocks."""
    layers, numbers = layers_at(model, [item.site.path for item in planned])
    last: dict[tuple[int, str], tuple[Hashable, int]] = {}
    linked = []
    for item, number in zip(planned, numbers, strict=True):
        if item.edit.router is not None and item.edit.router.reads_previous:
            key = id(item.source), layers[number].rpartition(".")[0]
            item = replace(item, previous=last.get(key))
            last[key] = item.claim, item.edit.experts.num_experts
        linked.append(item)
    return linked


def _sites(model: nn.Module, edit: Edit) -> list[Site]:
    """Where an edit stands. At site `ffn` what can stand around a mixture of the model's own takes
    it as one network, and not the shared expert in it."""
    around = edit.site == "ffn" and "block" in edit.experts.places[edit.place]
    owners = [m.owner for m in mixtures(model) if m.is_network] if around else []
    owners = list(dict.fromkeys(owners))  # JetMoE has its experts' two matrices apart
    blocks = [
        Site("ffn", owner, (owner,), owner=owner)
        for owner in owners
        if fnmatch.fnmatch(owner, edit.paths)
    ]
    try:
        found = find_sites(model, edit.site, edit.paths)
    except SparsecraftError:
        if not blocks:
            raise
        found = []
    return [site for site in found if not inside(site.path, owners)] + blocks


def _by_layer(model: nn.Module, edit: Edit, sites: list[Site]) -> Iterator[tuple[Site, Edit, int]]:
    """Each site, the edit with the numbers of its layer, and the number of that."""
    paths, numbers = layers_at(model, [site.path for site in sites])
    layers = edit.layers
    if edit.by_layer and len(layers) != len(paths):
        around = " to ".join(dict.fromkeys((paths[0], paths[-1])))
        raise RecipeError(
            f"{edit.by_layer[0].field} has {len(layers)} numbers, and {type(model).__name__} has "
            f"{len(paths)} layers at {edit.site!r} sites ({around}); give one number for each."
        )
    for site, number in zip(sites, numbers, strict=True):
        yield site, layers[number if edit.by_layer else 0], number


def rewritten(recipe: Recipe, parts: Iterable[tuple[PlannedEdit, Edit]]) -> dict[Edit, Edit]:
    """What edits of a recipe become when the layers that they are planned for get others.

    Args:
        parts: planned edits, and what each shall be.

    Returns:
        old -> new, for those edits of the recipe that are planned at all.
    """
    found: dict[Edit, dict[int, Edit]] = {}
    for item, edit in parts:
        found.setdefault(item.source, {})[item.layer] = edit
    new = {}
    for old in (edit for edit in recipe.edits if edit in found):
        layers = found[old]
        first = next(iter(layers.values()))  # also of layers where it has no site
        if not old.by_layer:
            new[old] = first
            continue
        edits = [layers.get(number, first) for number in range(len(old.layers))]
        also = [by.field for by in old.by_layer if has_number(first, by.field)]
        new[old] = together(edits, also)
    return new


def _check_nesting(outer: PlannedEdit, inner: PlannedEdit) -> None:
    """Refuse an edit inside a module that goes away, or whose parts another edit needs apart."""
    at = f"The edit at {inner.site.path!r} ({inner.edit.experts.kind} experts) lies inside"
    if outer.edit.replaces:
        raise SurgeryError(
            f"{at} {outer.site.path!r}, which another edit replaces by "
            f"{outer.edit.experts.kind} experts."
        )
    if outer.edit.opens and inner.site.activated:
        raise SurgeryError(
            f"{at} {outer.site.path!r}, whose first Linear and activation the "
            f"{outer.edit.experts.kind} experts need apart; use site='activation'."
        )


def _check_tokens(model: nn.Module, item: PlannedEdit) -> None:
    """Refuse a router that would show a token of a decoder what comes after it, to choose between
    text and images where a tower reads images, or sound, alone, and to look for sequences where
    tokens come in another order."""
    router = item.edit.router
    if router and router.by_sequence and not router.sentences and is_causal(model, item.site.path):
        raise SurgeryError(
            f"A router that decides for the sequence reads the mean of its tokens, and at "
            f"{item.site.path!r} of {type(model).__name__} that would show a token what comes "
            "after it; use decides='token' or 'sentence', or paths='encoder.*'."
        )
    if item.edit.modality and item.reads == "tower":
        raise SurgeryError(
            f"An edit for {item.edit.modality} tokens reaches {item.site.path!r} of "
            f"{type(model).__name__}, which reads images or sound alone, and mm_token_type_ids "
            "covers the text model's tokens; give paths without it, such as "
            "'*language_model*', or leave out the modality there."
        )
    if looks_at_sequences(item.edit) and is_sequence_first(model, item.site.path):
        raise SurgeryError(
            f"The edit looks at sequences or modalities, and at {item.site.path!r} of "
            f"{type(model).__name__} tokens come as (positions, batch, width); use a router by "
            "token, for all modalities."
        )
