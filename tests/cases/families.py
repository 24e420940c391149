"""The table of families: tiny random dense models, their inputs, and what tests do with any model.

Sizes: D width, F hidden width of a feed-forward network.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers

import sparsecraft as sc

VOCAB, D, F, HEADS, KV_HEADS, LAYERS, POSITIONS = 96, 32, 48, 4, 2, 2, 64


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
