"""The table of recipes that the suite multiplies with the families.

A new recipe is one row of RECIPES: a small instance of it, the number of new parameters by hand
(`formulas.py`), and whether it starts as the dense model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

import sparsecraft as sc
from sparsecraft.surgery.budget import set_budget, split_layers
from tests.cases.families import FAMILIES, D, Family
from tests.cases.formulas import (
    EMBEDDING,
    E,
    G,
    H,
    K,
    R,
    attention_lora,
    attentions,
    attentive,
    cmoe_router,
    grouped,
    hydralora,
    lora,
    mixlora,
    moepp,
    moepp_released,
    molora,
    molora_released,
    mov,
    mov_released,
    mpoe,
    mpoe_cut,
    nexus,
    pesc,
    six_loras,
    split,
    upcycled,
    vectors,
)
from tests.reference import splitting


@dataclass(frozen=True)
class RecipeCase:
    """A small instance of a recipe.

    Attributes:
        make: builds the recipe.
        new: the number of new parameters in a family, by hand.
        families: those that it works on.
        exact: whether it starts as the dense model.
        routed: whether it has routers.
        trains_base: whether the dense parameters train too.
        paths: the fast paths that its experts have.
        dropout: whether it has some in training.
        rate: a learning rate that it takes on these models; vectors need a large one.
        learns_router: whether the outputs have a gradient to the routers.
        ready: applied to the converted model before it is used, such as a budget.
    """

    make: Callable[[], sc.Recipe]
    new: Callable[[Family], int]
    families: tuple[str, ...] = tuple(FAMILIES)
    exact: bool = True
    routed: bool = True
    trains_base: bool = False
    paths: tuple[str, ...] = ("grouped", "dense", "auto")
    dropout: bool = True
    rate: float = 5e-3
    learns_router: bool = True
    ready: Callable[[torch.nn.Module], None] = lambda model: None


MERGED = {"paths": ("merged", "auto"), "dropout": False, "rate": 5e-2}
COPIES = {"trains_base": True, "dropout": False}
LORAS = {"paths": ("merged", "grouped", "dense", "auto")}
ATTENTION = {
    "families": ("llama", "mistral", "qwen2", "qwen3", "gemma"),
    "exact": False,
    "trains_base": True,
    "dropout": False,
}
SMALL = {"num_experts": E, "top_k": K, "adapter_dim": H}
# Converted, a split network runs whole: only `RUNNING` asks its router, which chooses and does not
# weigh.
SPLIT = {"paths": (), "dropout": False, "learns_router": False}
MLP_ROUTER = splitting.mlp_router(D, E)
NORM_ROUTER = splitting.norm_router(D, H, E)

RECIPES = {
    "camelidae": RecipeCase(
        lambda: sc.recipes.camelidae(**SMALL, lora_rank=R), lambda m: pesc(m) + lora(m)
    ),
    "camelidae_no_lora": RecipeCase(lambda: sc.recipes.camelidae(**SMALL, lora_rank=0), pesc),
    "camelidae_released": RecipeCase(
        lambda: sc.recipes.camelidae(
            **SMALL, variant="released", adapter_scale=0.25, lora_rank=R, balance="pesc_released"
        ),
        lambda m: pesc(m) + lora(m),
    ),
    "camel": RecipeCase(lambda: sc.recipes.camel(lora_rank=R), lora, routed=False),
    "adapter": RecipeCase(
        lambda: sc.recipes.adapter(adapter_dim=H, lora_rank=R),
        lambda m: m.ffns * 2 * D * H + lora(m),
        routed=False,
    ),
    "upcycling_bias": RecipeCase(
        lambda: sc.override(sc.recipes.upcycling(E, K), {"router.select.balance": "bias"}),
        upcycled,
        **COPIES,
    ),
    "upcycling_relu": RecipeCase(
        lambda: sc.override(
            sc.recipes.upcycling(E, K),
            {
                "router.select": "relu",
                "coefficient.start": 0.1,
                "exact_at_start": False,
                "losses": {"remoe": 1.0},
            },
        ),
        upcycled,
        exact=False,
        **COPIES,
    ),
    "upcycling_layers": RecipeCase(
        lambda: sc.recipes.upcycling(num_experts=[2, E], top_k=[1, K]),
        lambda m: upcycled(m) // E * (2 + E) // 2,  # two blocks
        families=tuple(name for name, family in FAMILIES.items() if family.ffns == 2),
        **COPIES,
    ),
    "upcycling_router": RecipeCase(
        lambda: sc.override(
            sc.recipes.upcycling(num_experts=E, top_k=K),
            {"router.standardize": 1.0, "router.select.through": True},
        ),
        upcycled,
        trains_base=True,
        dropout=False,
    ),
    "upcycling": RecipeCase(
        lambda: sc.recipes.upcycling(num_experts=E, top_k=K),
        upcycled,
        trains_base=True,
        dropout=False,
    ),
    "upcycling_raw": RecipeCase(
        lambda: sc.recipes.upcycling(num_experts=E, top_k=K, renormalize=False),
        upcycled,
        exact=False,
        trains_base=True,
        dropout=False,
    ),
    "upcycling_all": RecipeCase(
        lambda: sc.recipes.upcycling(num_experts=E, top_k=E, renormalize=False),
        upcycled,
        trains_base=True,
        dropout=False,
    ),
    "bam": RecipeCase(
        lambda: sc.recipes.bam(E), lambda m: attentions(m) + upcycled(m), **ATTENTION
    ),
    "upcycling_noise": RecipeCase(
        lambda: sc.recipes.upcycling(num_experts=E, top_k=K, noise_std=0.1, noise_share=0.5),
        upcycled,
        exact=False,
        **COPIES,
    ),
    "drop_upcycling": RecipeCase(
        lambda: sc.recipes.drop_upcycling(E, K), upcycled, exact=False, **COPIES
    ),
    "drop_upcycling_released": RecipeCase(
        lambda: sc.recipes.drop_upcycling(E, K, variant="released"),
        upcycled,
        exact=False,
        **COPIES,
    ),
    "drop_upcycling_none": RecipeCase(
        lambda: sc.recipes.drop_upcycling(E, K, ratio=0.0, variant="released"), upcycled, **COPIES
    ),
    "virtual_groups": RecipeCase(
        lambda: sc.recipes.virtual_groups(E, granularity=G, top_k=2 * G), grouped, **COPIES
    ),
    "virtual_groups_raw": RecipeCase(
        lambda: sc.recipes.virtual_groups(
            E, granularity=G, top_k=G, renormalize=False, scaling="none"
        ),
        grouped,
        exact=False,
        **COPIES,
    ),
    "btx": RecipeCase(
        lambda: sc.recipes.btx(num_experts=E), upcycled, trains_base=True, dropout=False
    ),
    "btx_switch": RecipeCase(
        lambda: sc.recipes.btx(num_experts=E, routing="switch"),
        upcycled,
        exact=False,
        trains_base=True,
        dropout=False,
    ),
    "btx_sample": RecipeCase(
        lambda: sc.recipes.btx(num_experts=E, routing="sample"),
        upcycled,
        trains_base=True,
    ),
    "btx_soft": RecipeCase(
        lambda: sc.recipes.btx(num_experts=E, routing="soft"),
        upcycled,
        trains_base=True,
        dropout=False,
    ),
    "attentive": RecipeCase(lambda: sc.recipes.attentive(E, K, dim=8), attentive, **COPIES),
    "attentive_samples": RecipeCase(
        lambda: sc.recipes.attentive(E, K, dim=8, similarity_coef=0.1, dissimilarity_coef=0.1),
        attentive,
        **COPIES,
    ),
    "mpoe": RecipeCase(lambda: sc.recipes.mpoe(E, K), mpoe, paths=(), **COPIES),
    "mpoe_cut": RecipeCase(
        lambda: sc.recipes.mpoe(E, K, bond=4),
        mpoe_cut,
        exact=False,
        paths=(),
        **COPIES,
    ),
    "moepp": RecipeCase(
        lambda: sc.recipes.moepp(2, K, constant=1, copy=0, zero=1, hold_steps=0, capacity=0),
        moepp,
        exact=False,
        paths=(),
        **COPIES,
    ),
    "moepp_released": RecipeCase(
        lambda: sc.recipes.moepp(
            2, K, variant="released", constant=0, hold_steps=0, capacity=0, renormalize=False
        ),
        moepp_released,
        exact=False,
        paths=(),
        **COPIES,
    ),
    "upit": RecipeCase(lambda: sc.recipes.upit(E, K), upcycled, dropout=False),
    "nexus": RecipeCase(
        lambda: sc.recipes.nexus(num_experts=E, embedding_dim=EMBEDDING),
        nexus,
        exact=False,
        trains_base=True,
        dropout=False,
    ),
    "nexus_linear": RecipeCase(
        lambda: sc.recipes.nexus(num_experts=E, variant="linear"),
        upcycled,
        exact=False,
        trains_base=True,
        dropout=False,
    ),
    "ia3": RecipeCase(sc.recipes.ia3, vectors, routed=False, **MERGED),
    "mov": RecipeCase(lambda: sc.recipes.mov(E), mov, **MERGED),
    "mov_top2": RecipeCase(lambda: sc.recipes.mov(E, top_k=K), mov, **MERGED),
    "mov_raw": RecipeCase(
        lambda: sc.recipes.mov(E, top_k=K, renormalize=False), mov, exact=False, **MERGED
    ),
    "mov_noise": RecipeCase(lambda: sc.recipes.mov(E, noise=0.1), mov, exact=False, **MERGED),
    "mov_released": RecipeCase(
        lambda: sc.recipes.mov(E, variant="released"), mov_released, **MERGED
    ),
    "lora": RecipeCase(lambda: sc.recipes.lora(R, dropout=0.1), lora, routed=False),
    "lora_released": RecipeCase(
        lambda: sc.recipes.lora(R, variant="released", dropout=0.1), six_loras, routed=False
    ),
    "molora": RecipeCase(lambda: sc.recipes.molora(E, R, dropout=0.1), molora, **LORAS),
    "molora_raw": RecipeCase(
        lambda: sc.recipes.molora(E, R, top_k=K, renormalize=False, dropout=0.1), molora, **LORAS
    ),
    "molora_released": RecipeCase(
        lambda: sc.recipes.molora(E, R, variant="released", dropout=0.1), molora_released, **LORAS
    ),
    "mixlora": RecipeCase(lambda: sc.recipes.mixlora(E, K, rank=R), mixlora, **LORAS),
    "hydralora": RecipeCase(lambda: sc.recipes.hydralora(E, R), hydralora, **LORAS),
    "smola": RecipeCase(lambda: sc.recipes.smola(E, R, dropout=0.1), molora, **LORAS),
    "smola_slots": RecipeCase(
        lambda: sc.recipes.smola(E, R, mixing="slots", dropout=0.1), molora, **LORAS
    ),
    "smola_modalities": RecipeCase(
        lambda: sc.recipes.smola(E, R, modalities=True, dropout=0.1),
        lambda m: 3 * molora(m),
        **LORAS,
    ),
    "moefication": RecipeCase(
        lambda: sc.recipes.moefication(E, K), split(MLP_ROUTER), trains_base=True, **SPLIT
    ),
    "moefication_random": RecipeCase(
        lambda: sc.recipes.moefication(E, K, partition="random", router="similarity", relu=False),
        split(0),
        **SPLIT,
    ),
    "gmoefication": RecipeCase(lambda: sc.recipes.gmoefication(E, K), split(MLP_ROUTER), **SPLIT),
    "dsti": RecipeCase(
        lambda: sc.recipes.dsti(E, router_dim=H), split(NORM_ROUTER), trains_base=True, **SPLIT
    ),
    "d2dmoe": RecipeCase(
        # The tiny random routers' norms are alike: at the paper's 0.1 nearly all experts would run.
        lambda: sc.recipes.d2dmoe(E, 0.7, router_dim=H),
        split(NORM_ROUTER),
        trains_base=True,
        **SPLIT,
    ),
    "lte": RecipeCase(
        lambda: sc.recipes.lte(E),
        split(splitting.sigmoid_router(D, E)),
        trains_base=True,
        **SPLIT,
    ),
    "cmoe": RecipeCase(
        lambda: sc.recipes.cmoe(E, K, shared=1),
        split(cmoe_router),
        **SPLIT,
    ),
    "cmoe_tuned": RecipeCase(
        lambda: sc.recipes.cmoe(E, K, shared=1, variant="finetuned"),
        lambda m: split(lambda f: cmoe_router(f) + E - 1)(m) + attention_lora(m, 8),
        **SPLIT | {"learns_router": True},
    ),
}

SPLITS = tuple(
    name for name, case in RECIPES.items() if case.make().edits[0].experts.kind == "split"
)


def choosy(model: torch.nn.Module) -> None:
    """The recipe's own rule, routers near their threshold, and means that are not zero."""
    generator = torch.Generator().manual_seed(4)
    set_budget(model, None)
    with torch.no_grad():
        for layer in split_layers(model).values():
            if layer.router.spec.select.kind == "threshold":  # LTE starts nearly dense
                layer.router.scorer.bias.fill_(0.05)
            if layer.experts.mean is not None:
                noise = torch.randn(layer.experts.mean.shape, generator=generator)
                layer.experts.mean.copy_(0.3 * noise)


# The same split networks as their routers run them.
RUNNING = {
    f"{name}_sparse": dataclasses.replace(RECIPES[name], paths=("dense",), ready=choosy)
    for name in SPLITS
}
