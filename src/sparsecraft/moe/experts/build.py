"""The bank of experts that a recipe's experts describe, for the place where it stands."""

from __future__ import annotations

import torch

from sparsecraft.dense.donors import FFN, Donor, Linear
from sparsecraft.dense.sites import Site
from sparsecraft.errors import RecipeError
from sparsecraft.moe.experts.adapter import AdapterExperts
from sparsecraft.moe.experts.attention import AttentionExperts
from sparsecraft.moe.experts.base import Experts
from sparsecraft.moe.experts.ffn import FFNExperts
from sparsecraft.moe.experts.ffn_lora import FFNLoRAExperts
from sparsecraft.moe.experts.lora import LoRAExperts
from sparsecraft.moe.experts.split import SplitExperts, imitation
from sparsecraft.moe.experts.vector import VectorExperts
from sparsecraft.recipe.edits import Place
from sparsecraft.recipe.experts import (
    AdapterSpec,
    AttentionSpec,
    ExpertsSpec,
    FFNLoRASpec,
    FFNSpec,
    LoRASpec,
    SplitSpec,
    VectorSpec,
)


def build_experts(
    spec: ExpertsSpec,
    donor: Donor,
    site: Site,
    place: Place,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Experts:
    """The bank that `spec` describes, for the place where `donor` stands.

    Raises:
        RecipeError: the kind needs another donor, such as full experts at a Linear.
    """
    where = {"device": device, "dtype": dtype}
    if isinstance(spec, SplitSpec):
        wanted = Linear if place == "imitate" else FFN
    else:
        wanted = {FFNSpec: FFN, FFNLoRASpec: FFN, LoRASpec: (FFN, Linear)}.get(type(spec))
    if wanted and not isinstance(donor, wanted):
        advice = "site='ffn'" if wanted is FFN else "site='linear'"
        raise RecipeError(
            f"{spec.kind!r} experts cannot stand at {donor.path!r}, the {site.kind} of a network; "
            f"use {advice}."
        )
    match spec:
        case FFNSpec():
            return FFNExperts(spec, donor, device=device)
        case AttentionSpec():
            return AttentionExperts(spec, donor)
        case SplitSpec() if place == "imitate":
            return SplitExperts(spec, imitation(spec, donor, **where), device=device)
        case SplitSpec():
            return SplitExperts(spec, donor, device=device)
        case FFNLoRASpec():
            return FFNLoRAExperts(spec, donor, site, **where)
        case AdapterSpec():
            return AdapterExperts(spec, donor.out_features, **where)
        case LoRASpec():
            return LoRAExperts(spec, donor.in_features, donor.out_features, **where)
        case VectorSpec():
            width = donor.in_features if place == "before" else donor.out_features
            return VectorExperts(spec, width, **where)
