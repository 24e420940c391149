"""How many experts tokens of each kind go to, where tokens differ in that.

N tokens, K kinds, R documents.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsecraft.evaluation.analysis.choices import Choices

KINDS = (
    "special", "white space", "digits", "punctuation", "start of a word", "rest of a word",
    "part of a letter",
)  # fmt: skip
SPACES = "\u0120\u2581 "  # a space before a word, as byte-level BPE, Unigram and text say
UNKNOWN = "\ufffd"  # what a part of a letter decodes to
SPECIAL, DIGITS, START, REST, PART = (
    KINDS.index(kind)
    for kind in ("special", "digits", "start of a word", "rest of a word", "part of a letter")
)


def kinds_of(tokenizer: Any, tokens_N: np.ndarray, documents_N: np.ndarray) -> np.ndarray:
    """The number in `KINDS` of each token, (N,) uint8.

    Args:
        documents_N: the document that each token is of, in its order there.
    """
    distinct, places_N = np.unique(tokens_N, return_inverse=True)
    parts, special = _is_word_piece(tokenizer), set(tokenizer.all_special_ids)
    known = [_kind(tokenizer, int(token), special, parts) for token in distinct]
    kinds_N = np.array([KINDS.index(kind) for kind, _ in known], np.uint8)[places_N]
    if parts:  # which marks what goes on with a word
        return kinds_N
    # Others mark the space before a word: without it, a token goes on with what stands before it.
    bare_N = np.array([bare for _, bare in known])[places_N]
    before_N = np.concatenate([[SPECIAL], kinds_N[:-1]])
    before_N[np.diff(documents_N, prepend=-1) != 0] = SPECIAL
    goes_on_N = bare_N & (kinds_N == START) & np.isin(before_N, (START, DIGITS, PART))
    kinds_N[goes_on_N] = REST
    return kinds_N


def _is_word_piece(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(getattr(backend, "model", None)).__name__ == "WordPiece"


def _kind(tokenizer: Any, token: int, special: set[int], parts: bool) -> tuple[str, bool]:
    """A token's kind by itself, a word's part being the start of one but in WordPiece; and whether
    no space stands before it."""
    name, text = str(tokenizer.convert_ids_to_tokens(token)), tokenizer.decode([token])
    goes_on = parts and name.startswith("##")
    letters = text.strip(SPACES).strip().removeprefix("##" if goes_on else "")
    bare = not name.startswith(tuple(SPACES))
    if token in special:
        return "special", bare
    if not letters:
        return "white space", bare
    if UNKNOWN in letters:
        return "part of a letter", bare
    if letters.isnumeric():
        return "digits", bare
    if not any(letter.isalnum() for letter in letters):
        return "punctuation", bare
    return ("rest of a word" if goes_on else "start of a word"), bare


def experts_by_kind(choices: Choices, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """Layer -> for each kind of token that occurs: `tokens`, `experts` (the mean number of those
    that compute something for a token), and `more`, by how much that lies above the mean of all
    tokens of the same document, with its standard `error` over documents. Of layers in which tokens
    differ in that.
    """
    if tokenizer is None:
        return {}
    kinds_N = kinds_of(tokenizer, choices.tokens_N, choices.documents_N)
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
