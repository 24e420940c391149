"""The dense models of the studies: SmolLM2, and random ones for trials."""

from __future__ import annotations

import gc

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsecraft as sc

# Name: width, hidden width, layers, heads, key-value heads. `random` is as large as SmolLM2.
SHAPES = {
    "random": (576, 1536, 30, 9, 3),
    "tiny": (64, 128, 2, 4, 2),
    "tiny_wide": (64, 384, 2, 4, 2),  # neurons enough for 128 experts
}
FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def dense_model(
    source: str, device: str, words: int = 49_152, rounded: bool = False
) -> LlamaForCausalLM:
    """The dense model in float32, in evaluation mode.

    Args:
        source: a name of the hub, or of random weights in SHAPES.
        words: of the vocabulary of random weights.
        rounded: to bf16 once, so that methods which keep frozen weights in bf16 start alike.
    """
    if source in SHAPES:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=words,
            tie_word_embeddings=True,
            pad_token_id=2,
            **dict(zip(FIELDS, SHAPES[source], strict=True)),
        )
        model = LlamaForCausalLM(config)
    else:
        model = sc.hub.load_dense(source, dtype=torch.float32)
    if rounded:
        model = model.to(torch.bfloat16).float()
    return model.to(device).eval()


def forget() -> None:
    """Free the last model and its compiled code."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
