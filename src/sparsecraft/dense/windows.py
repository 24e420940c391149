"""Lengths beyond which a model computes otherwise, and a probe that is longer than they are.

Sliding windows, attention in chunks, frequencies that scale with the length: two models that differ
in these agree on every shorter probe.
"""

from __future__ import annotations

from typing import Any

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
# Bytes of the logits of the longest probe, and of one attention's scores.
MOST_LOGITS, MOST_SCORES = 2**30, 2**31


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
    """One sequence of random tokens beyond every window that memory allows; None if there is no
    such window."""
    reached = set(windows_of(model)) - set(unprobed(model))
    return candidates(model, seed, (1, max(reached) + BEYOND))[-1] if reached else None


def unprobed(model: nn.Module) -> list[int]:
    """The windows that `long_probe` does not reach, because they are too large."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    vocabulary = getattr(config, "vocab_size", None) or 1

    def fits(length: int) -> bool:
        return 4 * length * vocabulary <= MOST_LOGITS and 4 * heads * length**2 <= MOST_SCORES

    return [size for size in windows_of(model) if not fits(size + BEYOND)]


def _field(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, dict) else getattr(part, name, None)
