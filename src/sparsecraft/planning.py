"""Every edit of a recipe on the untouched model: where it goes, and the layer it will install."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsecraft.donor import FFN, Attention, Donor, Site, view
from sparsecraft.errors import SurgeryError
from sparsecraft.experts import Experts, build_experts
from sparsecraft.experts.split import SplitExperts
from sparsecraft.init.banks import partition_of_weights
from sparsecraft.layer import MoELayer, Reads
from sparsecraft.recipe import Edit, Recipe
from sparsecraft.routers import Gate, build_router
from sparsecraft.sites import find_sites

# Inside a decoder, what reads the encoder's tokens: in these modules (T5, BART, BERT) these parts.
CROSS_ATTENTIONS = {"EncDecAttention", "encoder_attn", "crossattention"}
CROSS_PROJECTIONS = {"k", "v", "k_proj", "v_proj", "key", "value"}


@dataclass(frozen=True, slots=True)
class PlannedEdit:
    """One edit at one site, with the view of the dense module taken before any change."""

    site: Site
    edit: Edit
    donor: Donor

    @property
    def claim(self) -> tuple:
        """What no two edits of a recipe may share: edits can share a module where each has rows
        or tokens of its own."""
        return self.site.members, self.site.rows, self.edit.modality


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
        if item.site.rows and item.edit.place == "before":
            raise SurgeryError(
                f"{item.site.path!r} is one projection for several, and experts before it would "
                f"change what all of them read, not the {item.site.kind} alone; use place='after'."
            )
        _check_causality(model, item)
        _check_modality(model, item)
    # A site inside another one has the deeper path, except where the outer one spans siblings.
    return sorted(
        planned, key=lambda p: sum(other.site.contains(p.site) for other in planned), reverse=True
    )


def _check_nesting(outer: PlannedEdit, inner: PlannedEdit) -> None:
    """Refuse an edit inside a module that goes away, or whose parts another edit needs apart."""
    at = f"The edit at {inner.site.path!r} ({inner.edit.experts.kind} experts) lies inside"
    if outer.edit.place == "replace":
        raise SurgeryError(
            f"{at} {outer.site.path!r}, which another edit replaces by "
            f"{outer.edit.experts.kind} experts."
        )
    if outer.edit.place == "inside" and inner.site.chain:
        raise SurgeryError(
            f"{at} {outer.site.path!r}, whose first Linear and activation the "
            f"{outer.edit.experts.kind} experts need apart; use site='activation'."
        )


def _check_causality(model: nn.Module, item: PlannedEdit) -> None:
    """Refuse a router that would show a token of a decoder what comes after it."""
    router = item.edit.router
    if router and router.decides == "sequence" and is_causal(model, item.site.path):
        raise SurgeryError(
            f"A router that decides for the sequence reads the mean of its tokens, and at "
            f"{item.site.path!r} of {type(model).__name__} that would show a token what comes "
            "after it; use decides='token' or 'sentence', or paths='encoder.*'."
        )


def _check_modality(model: nn.Module, item: PlannedEdit) -> None:
    """Refuse to tell text from images where a tower reads images, or sound, alone."""
    if item.edit.modality and reads(model, item.site.path) == "tower":
        raise SurgeryError(
            f"An edit for {item.edit.modality} tokens reaches {item.site.path!r} of "
            f"{type(model).__name__}, which reads images or sound alone, and mm_token_type_ids "
            "tells of the text model's tokens; give paths without it, such as "
            "'*language_model*', or leave out the modality there."
        )


def reads(model: nn.Module, path: str) -> Reads:
    """Whose tokens arrive at `path`."""
    # The tower of an image or of sound; a model without one returns itself.
    towers = (
        [model.get_encoder(modality=m) for m in ("image", "audio")]
        if hasattr(model, "get_encoder")
        else []
    )
    module = model.get_submodule(path)
    if any(t is not model and module in set(t.modules()) for t in towers):
        return "tower"
    parts = path.split(".")
    if not model.config.is_encoder_decoder or "decoder" not in parts:
        return "input"
    crosses = CROSS_ATTENTIONS.intersection(parts) and parts[-1] in CROSS_PROJECTIONS
    return "input" if crosses else "decoder"


def is_causal(model: nn.Module, path: str) -> bool:
    """Whether tokens at `path` must not see later ones."""
    if model.config.is_encoder_decoder:
        # What a decoder's attention reads of the encoder is not causal, but its length varies.
        return "decoder" in path.split(".")
    if getattr(model.config, "is_decoder", False):
        return True
    return model.can_generate() if hasattr(model, "can_generate") else True


def build_layer(
    model: nn.Module,
    item: PlannedEdit,
    *,
    number: int = 0,
    device: torch.device | str | None = None,
) -> MoELayer:
    """The layer for one planned edit, without its base, on the donor's device unless told.

    Args:
        number: of the layer, so that random partitions differ, and the first may be soft.
    """
    edit, site = item.edit, item.site
    experts, router = build_parts(model, item, number=number, device=device)
    layer = MoELayer(edit.place, experts, router, rows=site.rows, modality=edit.modality)
    layer.causal = is_causal(model, site.path)
    layer.reads = reads(model, site.path)
    return layer


def build_parts(
    model: nn.Module,
    item: PlannedEdit,
    *,
    number: int = 0,
    device: torch.device | str | None = None,
) -> tuple[Experts, nn.Module | None]:
    """The experts and the router of one planned edit; see `build_layer`."""
    edit, donor, site = item.edit, item.donor, item.site
    reference = reference_tensor(donor)
    device = reference.device if device is None else device
    # Quantized donors hold integers; their tokens arrive in the model's floating dtype.
    dtype = reference.dtype if reference.is_floating_point() else model.dtype
    experts = build_experts(edit.experts, donor, site, edit.place, device=device, dtype=dtype)
    router = None
    if isinstance(experts, SplitExperts):
        if not experts.down.is_meta:
            experts.arrange(partition_of_weights(experts, number))
        router = edit.router and Gate(edit.router, experts)
    elif edit.router is not None:
        width, count, spec = router_width(model, item), edit.experts.num_experts, edit.router
        if spec.soft_first and number == 0:
            spec = replace(spec, select="soft", top_k=None)
        router = build_router(spec, width, count, device=device, dtype=dtype)
    return experts, router


def router_width(model: nn.Module, item: PlannedEdit) -> int:
    """Features of what the router scores."""
    router, donor = item.edit.router, item.donor
    if router.decides == "sentence":
        return router.sentence_dim
    if router.decides == "head":
        if not item.site.head_dim:
            raise SurgeryError(
                f"The attention at {item.site.owner!r} does not say how wide its heads are; use "
                "decides='token'."
            )
        return item.site.head_dim
    return donor.out_features if router.reads == "output" else donor.in_features


def reference_tensor(donor: Donor) -> Tensor:
    if isinstance(donor, Attention):
        return donor.query.weight
    return (donor.down if isinstance(donor, FFN) else donor).module.weight
