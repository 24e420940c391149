"""Every edit of a recipe on the untouched model: where it goes, and the layer it will install."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsecraft.donor import FFN, Linear, Site, find_sites, view
from sparsecraft.errors import SurgeryError
from sparsecraft.experts import build_experts
from sparsecraft.layer import MoELayer
from sparsecraft.recipe import Edit, Recipe
from sparsecraft.routers import build_router


@dataclass(frozen=True, slots=True)
class PlannedEdit:
    """One edit at one site, with the view of the dense module taken before any change."""

    site: Site
    edit: Edit
    donor: FFN | Linear


def plan(model: nn.Module, recipe: Recipe) -> list[PlannedEdit]:
    """Every edit of `recipe` at every site of the untouched `model`, inner sites first.

    Raises:
        DonorError: the model's family has no feed-forward network that we can read.
        SurgeryError: no site matches an edit, two edits claim one site, or an edit lies inside a
            module that another edit replaces.
        RecipeError: an unknown component, or a model that is quantized differently.
    """
    planned = [
        PlannedEdit(site, edit, view(model, site))
        for edit in recipe.edits
        for site in find_sites(model, edit.site, edit.paths)
    ]
    claims: dict[tuple[str, ...], PlannedEdit] = {}
    for item in planned:
        other = claims.setdefault(item.site.members, item)
        if other is not item:
            raise SurgeryError(
                f"Two edits of recipe {recipe.name!r} claim {item.site.path!r}: "
                f"{other.edit.experts.kind} experts {other.edit.place} it and "
                f"{item.edit.experts.kind} experts {item.edit.place} it."
            )
    for outer in planned:
        if outer.edit.place != "replace":
            continue
        for inner in planned:
            if outer.site.contains(inner.site):
                raise SurgeryError(
                    f"The edit at {inner.site.path!r} ({inner.edit.experts.kind} experts) lies "
                    f"inside {outer.site.path!r}, which another edit replaces by "
                    f"{outer.edit.experts.kind} experts."
                )
    # A site inside another one has the deeper path, except where the outer one spans siblings.
    return sorted(
        planned, key=lambda p: sum(other.site.contains(p.site) for other in planned), reverse=True
    )


def build_layer(
    model: nn.Module, item: PlannedEdit, *, device: torch.device | str | None = None
) -> MoELayer:
    """The layer for one planned edit, without its base, on the donor's device unless told."""
    edit, donor = item.edit, item.donor
    reference = reference_tensor(donor)
    device = reference.device if device is None else device
    # Quantized donors hold integers; their tokens arrive in the model's floating dtype.
    dtype = reference.dtype if reference.is_floating_point() else model.dtype
    experts = build_experts(edit.experts, donor, device=device, dtype=dtype)
    router = None
    if edit.router is not None:
        reads_output = edit.router.reads == "output"
        width = donor.out_features if reads_output else donor.in_features
        num_experts = edit.experts.num_experts
        router = build_router(edit.router, width, num_experts, device=device, dtype=dtype)
    return MoELayer(edit.place, experts, router)


def reference_tensor(donor: FFN | Linear) -> Tensor:
    return (donor.down if isinstance(donor, FFN) else donor).module.weight
