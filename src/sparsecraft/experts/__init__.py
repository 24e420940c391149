"""Expert kinds by name."""

from __future__ import annotations

import torch

from sparsecraft.donor import FFN, Linear
from sparsecraft.errors import RecipeError
from sparsecraft.experts.base import Experts, TwoLayer, loop
from sparsecraft.experts.ffn import FFNExperts
from sparsecraft.experts.peft import AdapterExperts, LoRAExperts
from sparsecraft.recipe import AdapterSpec, ExpertsSpec, FFNSpec, LoRASpec


def build_experts(
    spec: ExpertsSpec, donor: FFN | Linear, *, device: torch.device, dtype: torch.dtype
) -> Experts:
    """The bank that `spec` describes, for the place where `donor` stands.

    Raises:
        RecipeError: the kind needs another donor, such as full experts at a Linear.
    """
    match spec:
        case FFNSpec() if isinstance(donor, FFN):
            return FFNExperts(spec, donor)
        case FFNSpec():
            raise RecipeError(
                f"{spec.kind!r} experts copy a whole feed-forward network and cannot stand at "
                f"{donor.path!r}, a single linear layer; use site='ffn'."
            )
        case AdapterSpec():
            return AdapterExperts(spec, donor.out_features, device=device, dtype=dtype)
        case LoRASpec():
            return LoRAExperts(
                spec, donor.in_features, donor.out_features, device=device, dtype=dtype
            )


__all__ = [
    "AdapterExperts",
    "Experts",
    "FFNExperts",
    "LoRAExperts",
    "TwoLayer",
    "build_experts",
    "loop",
]
