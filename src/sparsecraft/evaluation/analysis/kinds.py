"""How many experts tokens of each kind go to, where tokens differ in that.

N tokens, K kinds, R documents.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsecraft.evaluation.analysis.choices import Choices

KINDS = ("special", "white space", "digits", "punctuation", "start of a word", "rest of a word")
SPACES = ("\u0120", "\u2581", " ")  # a space before a word, as byte-level BPE, Unigram and text say


def kinds_of(tokenizer: Any, tokens_N: np.ndarray) -> np.ndarray:
    """The number in `KINDS` of each token, (N,) uint8."""
    distinct, places_N = np.unique(tokens_N, return_inverse=True)
    parts = any(token.startswith("##") for token in tokenizer.get_vocab())  # WordPiece
    kinds = [_kind(tokenizer, int(token), parts) for token in distinct]
    return np.array([KINDS.index(kind) for kind in kinds], np.uint8)[places_N]


def _kind(tokenizer: Any, token: int, parts: bool) -> str:
    if token in tokenizer.all_special_ids:
        return "special"
    name, text = str(tokenizer.convert_ids_to_tokens(token)), tokenizer.decode([token])
    bare = text.strip("".join(SPACES)).strip().removeprefix("##")
    if not bare:
        return "white space"
    if bare.isnumeric():
        return "digits"
    if not any(letter.isalnum() for letter in bare):
        return "punctuation"
    starts = not name.startswith("##") if parts else name.startswith(SPACES)
    return "start of a word" if starts else "rest of a word"


def experts_by_kind(choices: Choices, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """Layer -> for each kind of token that occurs: `tokens`, `experts` (the mean number of those
    that compute something for a token), and `more`, by how much that lies above the mean of all
    tokens of the same document, with its standard `error` over documents. Of layers in which tokens
    differ in that.
    """
    if tokenizer is None:
        return {}
    kinds_N = kinds_of(tokenizer, choices.tokens_N)
    layers = choices.layers.items()
    return {
        name: _by_kind(layer.sizes_N, kinds_N, choices.documents_N)
        for name, layer in layers
        if layer.apart is None and len(layer.sizes_N) and np.ptp(layer.sizes_N)
    }


def _by_kind(
    sizes_N: np.ndarray, kinds_N: np.ndarray, documents_N: np.ndarray
) -> list[dict[str, Any]]:
    R, K = int(documents_N.max()) + 1, len(KINDS)
    at_N = documents_N * K + kinds_N
    tokens_RK = np.bincount(at_N, minlength=R * K).reshape(R, K)
    experts_RK = np.bincount(at_N, sizes_N, R * K).reshape(R, K)
    mean_R = experts_RK.sum(1) / np.maximum(tokens_RK.sum(1), 1)
    found = []
    for k in np.flatnonzero(tokens_RK.sum(0)):
        live_R = tokens_RK[:, k] > 0
        more_R = experts_RK[live_R, k] / tokens_RK[live_R, k] - mean_R[live_R]
        several = len(more_R) > 1
        found.append(
            {
                "kind": KINDS[k],
                "tokens": int(tokens_RK[:, k].sum()),
                "experts": float(experts_RK[:, k].sum() / tokens_RK[:, k].sum()),
                "more": float(more_R.mean()),
                "error": float(more_R.std(ddof=1) / len(more_R) ** 0.5) if several else None,
            }
        )
    return found
