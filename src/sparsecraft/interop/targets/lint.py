"""What engines do otherwise than transformers with a standard MoE.

llama.cpp was run (benchmarks/conversion/llama_cpp.py). vLLM's granitemoe, granitemoeshared and
qwen2_moe were read, in the versions that docs/guides/export.md names.
"""

from __future__ import annotations

from typing import Any


def lint(config: Any) -> list[str]:
    """Warnings about an exported model, by its configuration; none is an error in transformers."""
    kind = config.model_type
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    act, window = config.hidden_act, getattr(config, "sliding_window", None)
    width = config.hidden_size // config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width
    granite, qwen2 = kind == "granitemoeshared", kind == "qwen2_moe"
    some = config.num_experts_per_tok < experts
    normalized = getattr(config, "norm_topk_prob", False)
    expert = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    odd = [n for n in (expert, config.hidden_size) if n * config.dtype.itemsize % 16]
    found = {
        f"transformers runs it with experts_implementation='eager' alone: {odd} features are no "
        "multiple of 16 bytes.": bool(odd),
        f"llama.cpp and vLLM compute silu here, and the model has hidden_act={act!r}: wrong "
        "logits.": act != "silu",
        f"llama.cpp and vLLM take hidden_size / num_attention_heads = {width} for the width of a "
        f"head, and the model has head_dim={head_dim}.": (granite or qwen2) and head_dim != width,
        "llama.cpp has no sliding window in its graph of Mixtral, nor was one found in the others, "
        f"and the model has sliding_window={window}: wrong logits beyond it.": bool(window),
        "llama.cpp never renormalizes the weights of qwen2moe, and the model has "
        "norm_topk_prob=True: wrong logits.": qwen2 and normalized and some,
        "llama.cpp always renormalizes the weights of qwen3moe, and the model has "
        "norm_topk_prob=False: wrong logits.": kind == "qwen3_moe" and not normalized and some,
        "llama.cpp requires output.weight of qwen2moe, and the model has tie_word_embeddings=True; "
        "untie it before the export.": qwen2 and config.tie_word_embeddings,
        "vLLM's granitemoe, in the old version that was read, has no biases in its attention, and "
        "the model has; try yours.": granite and config.attention_bias,
        f"llama.cpp: {experts} experts are no power of two, of which mergekit warns.": bool(
            experts & (experts - 1)
        ),
    }
    return [warning for warning, applies in found.items() if applies]
