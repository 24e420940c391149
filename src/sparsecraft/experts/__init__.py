"""Expert kinds by name."""

from __future__ import annotations

import torch

from sparsecraft.donor import FFN, Donor, Linear, Site
from sparsecraft.errors import RecipeError
from sparsecraft.experts.attention import AttentionExperts
from sparsecraft.experts.base import Experts
from sparsecraft.experts.dispatch import loop
from sparsecraft.experts.ffn import FFNExperts
from sparsecraft.experts.ffn_lora import FFNLoRAExperts
from sparsecraft.experts.peft import AdapterExperts, LoRAExperts, VectorExperts
from sparsecraft.experts.split import SplitExperts, imitation
from sparsecraft.recipe import (
    AdapterSpec,
    AttentionSpec,
    FFNLoRASpec,
    FFNSpec,
    LoRASpec,
    Place,
    SplitSpec,
    VectorSpec,
)
from sparsecraft.specs import ExpertsSpec


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


__all__ = [
    "AdapterExperts",
    "AttentionExperts",
    "Experts",
    "FFNExperts",
    "FFNLoRAExperts",
    "LoRAExperts",
    "VectorExperts",
    "build_experts",
    "loop",
]
