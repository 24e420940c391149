"""The bank of experts that a recipe's experts describe, for the place where it stands."""

from __future__ import annotations

import torch

from sparsecraft.dense.donors import FFN, Activation, Attention, Block, Donor, Linear
from sparsecraft.dense.sites import Site
from sparsecraft.errors import RecipeError
from sparsecraft.moe.experts.adapter import AdapterExperts
from sparsecraft.moe.experts.attention import AttentionExperts
from sparsecraft.moe.experts.base import Experts
from sparsecraft.moe.experts.ffn import FFNExperts
from sparsecraft.moe.experts.ffn_lora import FFNLoRAExperts
from sparsecraft.moe.experts.heterogeneous import HeterogeneousExperts
from sparsecraft.moe.experts.lora import LoRAExperts
from sparsecraft.moe.experts.mpo import MPOExperts
from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.moe.experts.vector import VectorExperts
from sparsecraft.recipe.edits import Place
from sparsecraft.recipe.experts import (
    AdapterSpec,
    AttentionSpec,
    ExpertsSpec,
    FFNLoRASpec,
    FFNSpec,
    LoRASpec,
    MPOSpec,
    SplitSpec,
    VectorSpec,
)
from sparsecraft.recipe.heterogeneous import HeterogeneousSpec
from sparsecraft.recipe.kinds import called, enter, families_of, named

BANKS: dict[type[ExpertsSpec], type[Experts]] = {
    FFNSpec: FFNExperts,
    AttentionSpec: AttentionExperts,
    AdapterSpec: AdapterExperts,
    LoRASpec: LoRAExperts,
    VectorSpec: VectorExperts,
    FFNLoRASpec: FFNLoRAExperts,
    MPOSpec: MPOExperts,
    HeterogeneousSpec: HeterogeneousExperts,
    SplitSpec: SplitExperts,
}

# What a recipe calls the dense modules that experts stand at.
DONORS = {
    "block": Block,
    "ffn": FFN,
    "attention": Attention,
    "linear": Linear,
    "activation": Activation,
}


def register(spec: type[ExpertsSpec], bank: type[Experts]) -> None:
    """Let recipes name a further kind of experts, and models have it.

    Raises:
        RecipeError: it is no dataclass below `ExpertsSpec` with a `kind` of its own, its kind or
            its bank is there already, or the bank is no class below `Experts`.
    """
    if ExpertsSpec not in families_of(spec):
        raise RecipeError(
            f"{called(spec)} names no experts: it must be a dataclass below ExpertsSpec."
        )
    if not (isinstance(bank, type) and issubclass(bank, Experts)):
        raise RecipeError(
            f"{called(bank)} is no bank for {spec.__name__}: it must be a class below "
            "sparsecraft.moe.experts.base.Experts."
        )
    enter(BANKS, spec, bank)


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
        RecipeError: the kind needs another donor, such as full experts at a Linear; or nothing says
            what its bank is.
    """
    bank = named(BANKS, spec, "bank", "sparsecraft.moe.experts.build.register(spec, bank)")
    wanted = spec.places[place]
    if not isinstance(donor, tuple(DONORS[word] for word in wanted)):
        raise RecipeError(
            f"{spec.kind!r} experts cannot stand at {donor.path!r}, the {site.kind} of a network; "
            f"use site={wanted[-1]!r}."
        )
    return bank.build(spec, donor, site, place, device=device, dtype=dtype)
