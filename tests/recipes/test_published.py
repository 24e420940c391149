"""Every recipe's published values, asserted one by one.

The table is written from the papers, their appendices and released scripts, not from the recipes.
A value that a paper does not give is not here, even where the recipe has to choose one.
"""

from __future__ import annotations

from typing import Any

import pytest

import sparsecraft as sc
from sparsecraft.recipe.balancing import Capacity
from sparsecraft.recipe.selections import Share, Soft, TopK

r = sc.recipes

ADAPTERS, LORA, ROUTER = "edits.0.experts", "edits.1.experts", "edits.0.router"

# The training of MoV, MoLORA and their dense baselines: Zadouri et al., released scripts.
COHERE = {
    "stages.0.optimizer": "adafactor",
    "stages.0.learning_rate": 3e-4,
    "stages.0.schedule": "constant",
    "stages.0.warmup_ratio": 0.0,
    "stages.0.warmup_steps": 0,
    "stages.0.batch_size": 32,
    "stages.0.max_length": 1024,
    "stages.0.weight_decay": 0.0,
    "stages.0.losses": {},  # the balance and z-losses of the scripts are never called
}

# Wu et al., table of hyperparameters; what the paper does not say is the released script's.
PESC = {
    "stages.0.optimizer": "adamw",
    "stages.0.learning_rate": 2e-4,
    "stages.0.schedule": "constant",
    "stages.0.warmup_ratio": 0.03,
    "stages.0.warmup_steps": 0,
    "stages.0.weight_decay": 0.0,
    "stages.0.max_grad_norm": 0.3,
    "stages.0.batch_size": 128,
    "stages.0.max_length": 2048,
    "stages.0.epochs": None,  # one
}


def lora(at: str, rank: int, alpha: float, dropout: float) -> dict[str, Any]:
    return {f"{at}.rank": rank, f"{at}.alpha": alpha, f"{at}.dropout": dropout}


PUBLISHED: dict[str, tuple[sc.Recipe, dict[str, Any]]] = {
    "attentive": (
        r.attentive(),
        {
            f"{ADAPTERS}.num_experts": 5,  # and 10, 20
            f"{ROUTER}.reads": "experts",
            f"{ROUTER}.select": Soft(),
            "stages.0.losses": {"importance": 0.2},
            "stages.1.trains": ("router",),
            "stages.1.losses": {},
            "stages.1.router.scorer.kind": "linear",
            "stages.1.learning_rate": 1e-3,
        },
    ),
    "mpoe": (
        r.mpoe(),
        {
            "edits.0.site": "ffn",
            "edits.0.place": "replace",
            f"{ADAPTERS}.num_experts": 8,  # 8, 12 and 16
            f"{ADAPTERS}.bond": None,  # the released linear_trunc of 30000 cuts nothing
            f"{ROUTER}.select": TopK(2),
            "stages.0.losses": {"switch": 1e-2},
            "stages.0.learning_rate": 2e-6,
            "stages.0.batch_size": 32,
            "stages.0.warmup_steps": 320,
            "stages.0.max_length": 128,
        },
    ),
    "mpoe, released": (
        r.mpoe(variant="released"),
        {f"{ADAPTERS}.mask": 0.0},  # its code has none
    ),
    "moepp": (
        r.moepp(renormalize=False, hold_steps=0),
        {
            "edits.0.site": "ffn",
            "edits.0.place": "replace",
            f"{ADAPTERS}.num_experts": 12,
            f"{ADAPTERS}.networks": 8,
            f"{ADAPTERS}.constant": 2,
            f"{ADAPTERS}.copy": 1,
            f"{ADAPTERS}.zero": 1,
            f"{ADAPTERS}.tau": 0.75,
            f"{ADAPTERS}.zero_weight": "lost",
            f"{ROUTER}.scorer.hidden": None,
            f"{ROUTER}.select": TopK(2, renormalize=False, capacity=Capacity(factor=1.1)),
            "stages.0.losses": {"heterogeneous": 0.01},
            "stages.0.learning_rate": 5e-4,
            "stages.0.schedule": "cosine",
            "stages.0.ends_at": 0.1,
            "stages.0.warmup_steps": 2000,
            "stages.0.weight_decay": 0.1,
            "stages.0.max_grad_norm": 1.0,
            "stages.0.max_length": 2048,
        },
    ),
    "moepp 16+4": (
        r.moepp(preset="16+4"),
        {f"{ADAPTERS}.networks": 16, f"{ADAPTERS}.constant": 2, f"{ADAPTERS}.num_experts": 20},
    ),
    "moepp 32+8": (
        r.moepp(preset="32+8"),
        {f"{ADAPTERS}.networks": 32, f"{ADAPTERS}.constant": 6, f"{ADAPTERS}.num_experts": 40},
    ),
    "moepp, released": (
        r.moepp(variant="released"),
        {f"{ROUTER}.scorer.hidden": 8, f"{ADAPTERS}.zero_weight": "shared"},
    ),
    "camelidae": (
        r.camelidae(),
        PESC
        | lora(LORA, 64, 16.0, 0.1)
        | {
            "edits.0.site": "ffn",
            "edits.0.place": "after",  # Eq. 7, A(E(x))
            f"{ADAPTERS}.num_experts": 8,
            f"{ADAPTERS}.dim": 512,
            f"{ADAPTERS}.dropout": 0.1,
            f"{ADAPTERS}.scale": 1.0,
            f"{ROUTER}.select": TopK(2, renormalize=True),  # Eq. 9
            f"{ROUTER}.reads": "input",
            "edits.1.site": "linear",
            "edits.1.place": "beside",
            "stages.0.losses": {"switch": 0.01},  # Eq. 10
        },
    ),
    "camelidae, released": (
        r.camelidae(variant="released"),
        PESC
        | lora(LORA, 64, 16.0, 0.1)
        | {
            f"{ADAPTERS}.dim": 64,
            f"{ADAPTERS}.scale": 1.0,
            "stages.0.losses": {},  # output_router_logits is never set
            "stages.0.warmup_ratio": 0.0,
            "stages.0.warmup_steps": 200,
            "stages.0.max_length": 512,
        },
    ),
    "camel": (r.camel(), PESC | lora(ADAPTERS, 64, 16.0, 0.1) | {"edits.0.site": "linear"}),
    "mov": (
        r.mov(),
        COHERE
        | {
            "edits.0.site": "key",
            "edits.1.site": "value",
            "edits.2.site": "intermediate",
            f"{ADAPTERS}.num_experts": 10,
            f"{ADAPTERS}.init_std": 0.0,  # ones
            f"{ROUTER}.select": Soft(),
            f"{ROUTER}.scorer.start.std": 0.02,
        },
    ),
    "mov, released": (
        r.mov(variant="released"),
        COHERE
        | {
            f"{ROUTER}.reads": "output",  # the scaled activation itself
            f"{ROUTER}.decides.kind": "head",
            "edits.2.site": "activation",
            "edits.2.router.decides.kind": "token",
        },
    ),
    "mov, released, top-2": (
        r.mov(variant="released", top_k=2),
        {f"{ROUTER}.select": TopK(2, renormalize=False)},
    ),
    "molora": (
        r.molora(),
        COHERE
        | {
            "edits.0.site": "linear",
            f"{ADAPTERS}.num_experts": 10,
            f"{ADAPTERS}.rank": 4,
            f"{ADAPTERS}.alpha": 16.0,
            f"{ADAPTERS}.init": "normal",
            f"{ADAPTERS}.init_std": 0.02,
            f"{ADAPTERS}.shared_a": False,
            f"{ROUTER}.select": Soft(),
            f"{ROUTER}.scorer.start.std": 0.02,
        },
    ),
    "molora, released": (
        r.molora(variant="released"),
        {  # W_i0 is the gate; W_i1 has no LoRA
            f"edits.{n}.site": site
            for n, site in enumerate(("query", "key", "value", "output", "gate", "down"))
        },
    ),
    "ia3": (r.ia3(), COHERE | {"edits.0.site": "key", "edits.1.site": "value"}),
    "lora": (r.lora(), COHERE | {f"{ADAPTERS}.rank": 4}),
    "upcycling": (
        r.upcycling(),
        {
            f"{ROUTER}.scorer.start.std": 0.02,
            f"{ROUTER}.select": TopK(2, renormalize=True),
            f"{ADAPTERS}.differ.noise_std": 0.0,
            "stages.0.losses": {"switch": 0.01},
            "stages.0.trains": ("all",),
        },
    ),
    "nexus": (
        r.nexus(),
        {
            "edits.0.place": "beside",  # the seed's network, always on and ungated
            f"{ROUTER}.select": TopK(1, renormalize=False),
            f"{ROUTER}.scorer.kind": "domain",
            "others": "mean",  # of all that is no network, over the experts
            "stages.0.losses": {"switch": 0.05},
            "stages.0.learning_rate": 1e-3,
            "stages.0.schedule": "cosine",
            "stages.0.ends_at": 0.3,  # 1e-3 to 3e-4
            "stages.0.warmup_ratio": 0.1,
            "stages.0.warmup_steps": 0,
            "stages.0.trains": ("all",),
        },
    ),
    "bam": (
        r.bam(),
        {
            "others": "mean",
            "edits.0.site": "attention",
            f"{ADAPTERS}.kv": "expert",
            f"{ROUTER}.select": Soft(),  # soft routing is essential, table of routings
            f"{ROUTER}.balanced": False,
            "edits.1.site": "ffn",
            "edits.1.router.select": TopK(1, renormalize=False),
            "stages.0.learning_rate": 1e-4,
            "stages.0.schedule": "cosine",
            "stages.0.ends_at": 0.1,
            "stages.0.warmup_steps": 1000,
            "stages.0.weight_decay": 0.1,
        },
    ),
    "btx": (
        r.btx(),
        {
            "others": "mean",
            f"{ROUTER}.select": TopK(2, renormalize=True),
            "stages.0.losses": {"btx": 0.01},
            "stages.0.learning_rate": 1e-4,
            "stages.0.schedule": "cosine",
            "stages.0.ends_at": 0.1,
            "stages.0.warmup_steps": 100,
            "stages.0.weight_decay": 0.1,
            "stages.0.max_length": 4096,
            "stages.0.batch_size": 1024,  # 4 M tokens
            "stages.0.trains": ("all",),
        },
    ),
    "btx, switch": (
        r.btx(routing="switch"),
        {f"{ROUTER}.select": TopK(1, renormalize=False)},
    ),
    "btx, sample": (r.btx(routing="sample"), {f"{ROUTER}.select.first_soft": True}),
    "btx, frozen experts": (
        r.btx(freeze_experts=True),
        {"stages.0.trains": ("router", "others")},
    ),
    "upit": (
        r.upit(),
        {
            f"{ROUTER}.select": TopK(2, renormalize=True),
            "expansion.parents": "least_similar",
            "stages.0.deal.sample": 0.01,
            "stages.0.losses": {"own_expert": 1.0},  # (1 - alpha) / alpha, alpha = 0.5
            "stages.0.epochs": 4.0,
            "stages.0.learning_rate": 2e-5,
            "stages.1.epochs": 2.0,
            "stages.1.learning_rate": 2e-5,
            "stages.1.losses": {"switch": 0.01},
        },
    ),
    "drop_upcycling": (
        r.drop_upcycling(),
        {
            f"{ADAPTERS}.num_experts": 8,
            f"{ADAPTERS}.differ.redraw": 0.5,
            f"{ADAPTERS}.differ.redraw_apart": False,
            f"{ROUTER}.select": TopK(2, renormalize=True),
            "stages.0.losses": {"switch_unnormalized": 0.02},  # transformers' convention
            "stages.0.learning_rate": 2e-4,
            "stages.0.schedule": "cosine",
            "stages.0.ends_at": 0.1,
            "stages.0.warmup_steps": 2000,
            "stages.0.weight_decay": 0.1,
            "stages.0.max_grad_norm": 1.0,
            "stages.0.max_length": 4096,
            "stages.0.batch_size": 1024,
        },
    ),
    "drop_upcycling, released": (
        r.drop_upcycling(variant="released"),
        {
            f"{ADAPTERS}.differ.redraw_apart": True,
            f"{ADAPTERS}.differ.permute": True,
            f"{ROUTER}.scorer.start.kind": "uniform",
            f"{ROUTER}.scorer.start.std": 0.02,
        },
    ),
    "virtual_groups": (
        r.virtual_groups(scaling="paper"),
        {
            f"{ADAPTERS}.num_experts": 64,  # E8 G8 T8
            f"{ADAPTERS}.granularity": 8,
            f"{ROUTER}.scorer.repeat": 8,
            f"{ROUTER}.select.k": 8,
            "stages.0.losses": {"switch": 0.01},
            "stages.0.learning_rate": 2e-4,
            "stages.0.schedule": "cosine",
            "stages.0.ends_at": 0.1,
            "stages.0.batch_size": 1024,  # 4 M tokens
            "stages.0.max_length": 4096,
        },
    ),
    "mixlora": (
        r.mixlora(),
        lora(ADAPTERS, 16, 32.0, 0.05)
        | {
            f"{ADAPTERS}.num_experts": 8,
            f"{ROUTER}.select": TopK(2, renormalize=True),
            f"{ROUTER}.scorer.start.std": 0.02,
            "edits.1.site": "attention_linear",
            "stages.0.losses": {"switch_unnormalized": 0.01},
            "stages.0.learning_rate": 2e-4,
            "stages.0.schedule": "constant",
            "stages.0.batch_size": 16,
            "stages.0.max_length": 512,
            "stages.0.epochs": 2.0,
        },
    ),
    "mixlora, released": (
        r.mixlora(variant="released"),
        {"stages.0.losses": {"switch_unnormalized": 0.001}},
    ),
    "hydralora": (
        r.hydralora(),
        {
            f"{ADAPTERS}.num_experts": 4,
            f"{ADAPTERS}.rank": 4,
            f"{ADAPTERS}.alpha": 32.0,
            f"{ADAPTERS}.shared_a": True,
            f"{ROUTER}.select": Soft(),
            "stages.0.losses": {},  # blcls = 0
        },
    ),
    "moefication": (
        r.moefication(),
        {
            f"{ADAPTERS}.partition": "kmeans",
            f"{ADAPTERS}.num_experts": 64,  # T5-small's 2048 neurons, 32 in each
            f"{ROUTER}.scorer.kind": "mlp",
            f"{ROUTER}.select.k": 13,  # 20 % of 64
            f"{ROUTER}.weighting": "one",
            f"{ROUTER}.target": "mass",
            "stages.0.activation": "relu",
            "stages.0.learning_rate": 2e-5,
            "stages.0.batch_size": 32,
            "stages.0.warmup_ratio": 0.1,
            "stages.0.schedule": "constant",
            "stages.0.max_length": 128,
            "stages.0.epochs": 3.0,
            "stages.1.loss": "bce",
            "stages.1.epochs": 30,
            "stages.1.batch_tokens": 512,
            "stages.1.learning_rate": 0.01,
            "stages.1.holdout": 0.1,
        },
    ),
    "gmoefication": (
        r.gmoefication(),
        {
            f"{ADAPTERS}.num_experts": 64,
            f"{ADAPTERS}.partition": "kmeans",
            f"{ADAPTERS}.compensate": True,
            f"{ROUTER}.target": "deviation",
            "stages.0.loss": "bce",
            "stages.0.epochs": 30,
            "stages.0.learning_rate": 0.01,
        },
    ),
    "dsti": (
        r.dsti(),
        {
            f"{ROUTER}.select": Share(0.9),
            f"{ROUTER}.scorer.hidden": 128,
            f"{ROUTER}.target": "output_norm",
        },
    ),
    "d2dmoe": (
        r.d2dmoe(),
        {  # Gemma-2B on C4
            f"{ADAPTERS}.partition": "kmeans",
            f"{ROUTER}.scorer.kind": "norm",
            f"{ROUTER}.scorer.hidden": 128,
            f"{ROUTER}.select.threshold": 0.1,
            f"{ROUTER}.weighting": "one",
            f"{ROUTER}.target": "output_norm",
            "stages.0.losses": {"relu_hoyer": 1e-4},
            "stages.0.activation": "relu",
            "stages.0.learning_rate": 1e-4,
            "stages.0.weight_decay": 0.01,
            "stages.0.warmup_ratio": 0.05,
            "stages.0.batch_size": 1024,
            "stages.0.max_length": 1024,
            "stages.1.loss": "mse",
            "stages.1.learning_rate": 1e-3,
            "stages.1.epochs": 10,
        },
    ),
    "d2dmoe, bert": (
        r.d2dmoe(variant="bert"),
        {
            f"{ADAPTERS}.num_experts": 128,
            "stages.0.losses": {"relu_l1": 1e-4},
            "stages.0.learning_rate": 2e-5,
            "stages.0.batch_size": 64,
        },
    ),
    "d2dmoe, released": (
        r.d2dmoe(variant="released"),
        {
            "stages.0.losses": {"relu_l1": 1e-3},
            f"{ROUTER}.scorer.hidden": 128,  # as wide as there are experts, with biases
            f"{ROUTER}.scorer.bias": 0.0,
        },
    ),
    "d2dmoe, attention": (
        r.d2dmoe(attention_experts=8),
        {
            "edits.1.site": "attention_linear",
            "edits.1.place": "imitate",
            "edits.1.experts.flops_factor": 1.0,
            "stages.0.what": "imitations",
            "stages.0.sparsity": 1e-3,
            "stages.0.dropout": 0.05,
            "stages.0.epochs": 3,
        },
    ),
    "lte": (
        r.lte(),
        {
            f"{ADAPTERS}.partition": "kmeans",
            f"{ROUTER}.squash": "sigmoid",
            f"{ROUTER}.select.threshold": 0.5,
            f"{ROUTER}.weighting": "one",
            "stages.0.runs": "soft",
            "stages.0.losses": {"lte_efficiency": 0.5, "lte_separability": 0.5},
            "stages.0.trains": ("all",),
            "stages.1.losses": {},
            "stages.1.trains": ("model",),
            "stages.1.runs": "sparse",
        }
        | {
            f"stages.{n}.{field}": value
            for n in (0, 1)
            for field, value in (
                ("learning_rate", 5e-5),
                ("warmup_ratio", 0.06),
                ("weight_decay", 0.0),
                ("batch_size", 16),
            )
        },
    ),
    "cmoe": (
        r.cmoe(),
        {  # S3A3E8
            f"{ADAPTERS}.num_experts": 8,
            f"{ADAPTERS}.markers": 10,
            f"{ROUTER}.shared": 3,
            f"{ROUTER}.select.k": 3,
            f"{ROUTER}.weighting": "one",
            "stages.0.tokens": 8 * 2048,
            "stages.0.loss": "none",
        },
    ),
    "cmoe, finetuned": (
        r.cmoe(variant="finetuned"),
        {
            "edits.1.experts.rank": 8,
            "edits.1.experts.alpha": 32.0,
            "stages.1.learning_rate": 5.95e-5,
            "stages.1.router_learning_rate": 1e-3,
        },
    ),
}


def at(recipe: sc.Recipe, path: str) -> Any:
    value: Any = recipe
    for step in path.split("."):
        value = value[int(step)] if step.isdecimal() else getattr(value, step)
    return value


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name):
    recipe, values = PUBLISHED[name]
    assert {path: at(recipe, path) for path in values} == values


@pytest.mark.parametrize(
    "recipe", [r.bam(), r.bam(balance_coef=0.5, z_coef=0.25)], ids=["default", "given"]
)
def test_bam_has_both_losses_of_its_equation(recipe):
    """L_NLL + alpha L_LB + beta L_z; the paper gives neither alpha nor beta."""
    losses = recipe.stages[0].losses
    assert losses.keys() == {"switch", "z"} and all(losses.values())


def test_every_recipe_has_published_values():
    named = {name.split(",")[0] for name in PUBLISHED}
    # Dense baselines of ours, and a paper whose text gives no value.
    assert {*dir(r)} - named == {"adapter", "smola"}
