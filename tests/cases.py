"""The two tables that the suite multiplies: tiny dense models by family, and recipes.

A new recipe is one row of RECIPES: a small instance of it, the number of new parameters written
out by hand, and whether it starts as the dense model.

Shapes: L feed-forward networks, d width, f hidden width, E experts, h adapter width, r LoRA rank,
G shards of a network.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers

import sparsecraft as sc
from sparsecraft.surgery.budget import set_budget, split_layers
from tests.reference import splitting
from tests.reference.papers import camelidae_parameters, lora_parameters

VOCAB, D, F, HEADS, KV_HEADS, LAYERS, POSITIONS = 96, 32, 48, 4, 2, 2, 64
E, K, H, R, G = 4, 2, 16, 4, 2
EMBEDDING = 24


@dataclass(frozen=True)
class Family:
    """A tiny random model of one family.

    Attributes:
        config: builds the configuration.
        model: name of the transformers class.
        auto: name of the Auto class of its task.
        linears: (in, out) of every linear layer of attention and feed-forward, in one block
            (for T5 in one encoder and one decoder block together).
        gated: whether the feed-forward network has a gate.
        biased: whether its linear layers have biases.
        ffns: number of feed-forward networks.
        seven: (d_q, d_kv) where q, k, v, o, gate, up, down are separate.
        q: width of the queries.
        kv: width of the keys, and of the values.
        head: width of one head.
        attentions: number of attentions.
        decodes: whether `generate` works on it.
    """

    config: Callable
    model: str
    auto: str
    linears: tuple[tuple[int, int], ...]
    gated: bool = True
    biased: bool = False
    ffns: int = LAYERS
    seven: tuple[int, int] | None = None
    q: int = D
    kv: int = D
    head: int = D // HEADS
    attentions: int = LAYERS
    decodes: bool = True


def attention(d_q: int = D, d_kv: int = D) -> tuple[tuple[int, int], ...]:
    return ((D, d_q), (D, d_kv), (D, d_kv), (d_q, D))


GATED = ((D, F), (D, F), (F, D))
PLAIN = ((D, F), (F, D))

LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BERT_LIKE = {
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
CAUSAL = "AutoModelForCausalLM"


def t5(**changes) -> transformers.T5Config:
    return transformers.T5Config(
        vocab_size=VOCAB,
        d_model=D,
        d_kv=D // HEADS,
        d_ff=F,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
        **changes,
    )


FAMILIES = {
    "llama": Family(
        lambda: transformers.LlamaConfig(**LLAMA_LIKE, attention_bias=True, mlp_bias=True),
        "LlamaForCausalLM",
        CAUSAL,
        (*attention(D, D // 2), *GATED),
        biased=True,
        seven=(D, D // 2),
        kv=D // 2,
    ),
    "mistral": Family(
        lambda: transformers.MistralConfig(**LLAMA_LIKE, sliding_window=8),
        "MistralForCausalLM",
        CAUSAL,
        (*attention(D, D // 2), *GATED),
        seven=(D, D // 2),
        kv=D // 2,
    ),
    "qwen2": Family(
        lambda: transformers.Qwen2Config(**LLAMA_LIKE, tie_word_embeddings=True),
        "Qwen2ForCausalLM",
        CAUSAL,
        (*attention(D, D // 2), *GATED),
        seven=(D, D // 2),
        kv=D // 2,
    ),
    "qwen3": Family(  # heads wider than D / HEADS: d_q is not d
        lambda: transformers.Qwen3Config(**LLAMA_LIKE, head_dim=16),
        "Qwen3ForCausalLM",
        CAUSAL,
        (*attention(64, 32), *GATED),
        seven=(64, 32),
        q=64,
        kv=32,
        head=16,
    ),
    "gemma": Family(
        lambda: transformers.GemmaConfig(**LLAMA_LIKE, head_dim=16),
        "GemmaForCausalLM",
        CAUSAL,
        (*attention(64, 32), *GATED),
        seven=(64, 32),
        q=64,
        kv=32,
        head=16,
    ),
    "phi3": Family(  # q, k, v in one matrix, gate and up in one
        lambda: transformers.Phi3Config(**LLAMA_LIKE),
        "Phi3ForCausalLM",
        CAUSAL,
        ((D, 2 * D), (D, D), (D, 2 * F), (F, D)),
        kv=D // 2,
    ),
    "gpt2": Family(  # Conv1D
        lambda: transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=D,
            n_inner=F,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=POSITIONS,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "GPT2LMHeadModel",
        CAUSAL,
        ((D, 3 * D), (D, D), *PLAIN),
        gated=False,
        biased=True,
    ),
    "opt": Family(  # no feed-forward module; ReLU
        lambda: transformers.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=D,
            word_embed_proj_dim=D,
            ffn_dim=F,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=POSITIONS,
        ),
        "OPTForCausalLM",
        CAUSAL,
        (*attention(), *PLAIN),
        gated=False,
        biased=True,
    ),
    "bert": Family(  # no feed-forward module
        lambda: transformers.BertConfig(
            **BERT_LIKE, vocab_size=VOCAB, max_position_embeddings=POSITIONS
        ),
        "BertForMaskedLM",
        "AutoModelForMaskedLM",
        (*attention(), *PLAIN),
        gated=False,
        biased=True,
        decodes=False,
    ),
    "t5": Family(
        lambda: t5(feed_forward_proj="relu"),
        "T5ForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
        (*attention(), *PLAIN, *attention(), *attention(), *PLAIN),
        gated=False,
        ffns=2 * LAYERS,
        attentions=3 * LAYERS,
    ),
    "t5_gated": Family(  # v1.1 and Flan
        lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "T5ForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
        (*attention(), *GATED, *attention(), *attention(), *GATED),
        ffns=2 * LAYERS,
        attentions=3 * LAYERS,
    ),
    "vit": Family(
        lambda: transformers.ViTConfig(
            **BERT_LIKE, image_size=8, patch_size=2, num_labels=7, num_channels=3
        ),
        "ViTForImageClassification",
        "AutoModelForImageClassification",
        (*attention(), *PLAIN),
        gated=False,
        biased=True,
        decodes=False,
    ),
}


@functools.cache
def _original(name: str) -> torch.nn.Module:
    family = FAMILIES[name]
    config = family.config()
    model = getattr(transformers, family.model)(config).eval()
    # Initial biases are zero and initial norms one or zero: both would hide a mistake.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.ndim == 1 else 0.15 * noise)
    return model


def dense(name: str) -> torch.nn.Module:
    """A new copy of the family's model, in evaluation mode; always the same values."""
    return copy.deepcopy(_original(name))


def batch(name: str, length: int = 12, labels: bool = False) -> dict[str, torch.Tensor]:
    """Inputs for one forward pass, without padding."""
    generator = torch.Generator().manual_seed(2)
    if name == "vit":
        inputs = {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}
        return inputs | ({"labels": torch.tensor([1, 5, 0])} if labels else {})
    ids = torch.randint(3, VOCAB, (3, length), generator=generator)
    inputs = {"input_ids": ids}
    if FAMILIES[name].auto == "AutoModelForSeq2SeqLM":
        inputs["decoder_input_ids"] = ids.flip(-1)
    return inputs | ({"labels": ids.clone()} if labels else {})


def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def randomize_new(model: torch.nn.Module, std: float = 0.1, seed: int = 3) -> None:
    """Move every new parameter away from its start, so that experts differ and adapters act."""
    from sparsecraft.moe.names import dense_name

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if dense_name(model, name) is None:
                parameter.data = parameter + std * torch.randn(
                    parameter.shape, generator=generator
                ).to(parameter.dtype)


# -------------------------------------------------------------------------------------- the recipes


def ffn_parameters(family: Family) -> int:
    gate = 2 if family.gated else 1
    biases = gate * F + D if family.biased else 0
    return gate * D * F + F * D + biases


def lora(family: Family) -> int:
    if family.seven:
        return lora_parameters(LAYERS, D, *family.seven, F, R)
    return LAYERS * R * sum(i + o for i, o in family.linears)


def pesc(family: Family) -> int:
    return camelidae_parameters(family.ffns, D, H, E)


def upcycled(family: Family) -> int:
    return family.ffns * E * (ffn_parameters(family) + D)


def grouped(family: Family) -> int:
    """E copies of every network in G shards, each with the second bias, and G router rows each."""
    biases = (G - 1) * D if family.biased else 0
    return family.ffns * E * (ffn_parameters(family) + biases + G * D)


def nexus(family: Family) -> int:
    """The experts, and for each router W1 (2 d, 24) and W2 (d, d); embeddings are no parameters."""
    return family.ffns * (E * ffn_parameters(family) + 2 * D * EMBEDDING + D * D)


def ffn_linears(family: Family) -> list[tuple[int, int]]:
    fused = family is FAMILIES["phi3"]  # GPT-2's fused attention happens to have 2 F outputs too
    return [(i, o) for i, o in family.linears if F in (i, o) or (fused and o == 2 * F)]


def vectors(family: Family) -> int:
    """One vector on keys, values and the FFN's intermediate activation."""
    return family.attentions * 2 * family.kv + family.ffns * F


def mov(family: Family) -> int:
    return E * vectors(family) + E * D * (2 * family.attentions + family.ffns)


def mov_released(family: Family) -> int:
    routers = family.attentions * 2 * family.head + family.ffns * F
    return E * (vectors(family) + routers)


def molora(family: Family) -> int:
    return LAYERS * E * sum(R * (i + o) + i for i, o in family.linears)


def six_loras(family: Family) -> int:
    """LoRA on q, k, v, o, the gate (or up) and down."""
    attention = 2 * (D + family.q) + 2 * (D + family.kv)
    return R * (family.attentions * attention + family.ffns * 2 * (D + F))


def molora_released(family: Family) -> int:
    routers = family.attentions * (3 * D + family.q) + family.ffns * (D + F)
    return E * (six_loras(family) + routers)


def attention_lora(family: Family, rank: int) -> int:
    attention = sum(i + o for i, o in family.linears) - sum(i + o for i, o in ffn_linears(family))
    return LAYERS * rank * attention


def mixlora(family: Family) -> int:
    inside = LAYERS * E * R * sum(i + o for i, o in ffn_linears(family)) + family.ffns * E * D
    return inside + attention_lora(family, R)


def hydralora(family: Family) -> int:
    return LAYERS * sum(R * i + E * R * o + E * i for i, o in ffn_linears(family))


def split(router: int | Callable[[Family], int]) -> Callable[[Family], int]:
    """A router of this size for every network, whose neurons are the dense ones."""

    def new(family: Family) -> int:
        return family.ffns * (router(family) if callable(router) else router)

    return new


def cmoe_router(family: Family) -> int:
    return splitting.analytic_router(D, E - 1, family.gated, family.biased)


def attentions(family: Family) -> int:
    """E attentions with separate projections, and their router; norms of queries and keys once."""
    widths = family.q + 2 * family.kv
    biases = {"llama": widths + D, "qwen2": widths}
    name = next(name for name, other in FAMILIES.items() if other is family)
    one = D * widths + family.q * D + biases.get(name, 0)
    norms = 2 * family.head if name == "qwen3" else 0
    return family.attentions * (E * one + norms + E * D)


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


def layers(model: torch.nn.Module) -> list[sc.MoELayer]:
    return [module for module in model.modules() if isinstance(module, sc.MoELayer)]


def moved(start: str | torch.nn.Module, seed: int, size: float = 0.05, only: str = ""):
    """A model, or a family's, after some training apart, of what has `only` in its name."""
    model = dense(start) if isinstance(start, str) else copy.deepcopy(start)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(size * noise * (only in name))
    return model
