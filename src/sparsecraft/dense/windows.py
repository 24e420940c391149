"""Lengths beyond which a model computes otherwise, and a probe that is longer than they are.

Sliding windows, attention in chunks, frequencies that scale with the length: two models that differ
in these agree on every shorter probe.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from psutil import virtual_memory
from torch import nn

from sparsecraft.dense.probes import Inputs, candidates
from sparsecraft.dense.tokens import positions_of

WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "attention_window_size",
    "window_size",
    "local_attention",
    "original_max_position_embeddings",
)
BEYOND = 16
# Bytes of a probe's logits, of one attention's scores and of a mask, and on a CPU its operations.
MOST_LOGITS, MOST_SCORES, MOST_MASK, MOST_WORK = 2**30, 2**31, 2**33, 2e13


def windows_of(model: nn.Module) -> list[int]:
    """The lengths that the configuration names, of whatever family, in their order; below the
    longest sequence that the model was made for."""
    config, longest = model.config.get_text_config(), positions_of(model)
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    found = {_field(part, name) for part in (config, *parts) for name in WINDOWS}
    known = {size for size in found if isinstance(size, int) and size > 0}
    return sorted(size for size in known if longest is None or size < longest)


def long_probe(model: nn.Module, seed: int = 0) -> Inputs | None:
    """One sequence of random tokens beyond every window that can be probed; None if there is no
    such window. Of a model that gives them alone, it asks for the last tokens' logits."""
    reached = set(windows_of(model)) - set(unprobed(model))
    if not reached:
        return None
    probe = candidates(model, seed, (1, _beyond(max(reached))))[-1]
    if _gives_the_last(model) and "input_ids" in probe:
        length = probe["input_ids"].shape[1]
        probe["logits_to_keep"] = torch.arange(length - BEYOND, length)
    return probe


def _beyond(window: int) -> int:
    """A length at which it shows whether the last tokens see the first."""
    return window + max(BEYOND, window // 8)


def _gives_the_last(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def unprobed(model: nn.Module) -> list[int]:
    """The windows that `long_probe` does not reach, because that takes too much memory or time."""
    config = model.config.get_text_config()
    size = sum(parameter.numel() for parameter in model.parameters())
    heads, width, layers, vocabulary = (
        getattr(config, name, None) or 1
        for name in ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size")
    )
    eager = config._attn_implementation == "eager"
    bounded = next(model.parameters()).device.type == "cpu"

    def fits(window: int) -> bool:
        length = _beyond(window)
        logits = BEYOND if _gives_the_last(model) else length
        work = 2 * size * length + 4 * layers * width * length**2
        mask = 4 * length**2
        return (
            4 * logits * vocabulary <= MOST_LOGITS
            and (mask * heads <= MOST_SCORES if eager else mask <= MOST_MASK)
            and not (bounded and (work > MOST_WORK or 2 * mask > virtual_memory().available))
        )

    return [window for window in windows_of(model) if not fits(window)]


def _field(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, dict) else getattr(part, name, None)
