"""What counts would be if nothing stood behind them.

Tokens of a document are not independent of each other: domains are drawn anew for whole documents.
Shapes: N tokens, R documents, D domains, E experts, P draws.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy import stats

from sparsecraft.evaluation.routing import mutual_information

DRAWS = 200
FEWEST = 5  # of an expert's tokens of one kind, below which a test says nothing
FALSE_DISCOVERIES = 0.05


@dataclass(frozen=True, slots=True)
class Information:
    """I(first expert; domain) in bits, beside what chance gives.

    Attributes:
        bits: of these documents.
        chance, chance_95: mean, and 95th percentile, of draws in which documents' domains are
            permuted.
        p: share of the draws that reach `bits`, the observed one counted.
    """

    bits: float
    chance: float
    chance_95: float
    p: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def information(
    first_N: np.ndarray, domains_N: np.ndarray, documents_N: np.ndarray, experts: int, seed: int = 0
) -> Information | None:
    """Information of a token's first expert about its domain; None of fewer than two domains, or
    where no token has an expert."""
    counted = _by_document(first_N, domains_N, documents_N, experts)
    if counted is None:
        return None
    counts_RE, domain_R = counted
    observed = _bits(counts_RE, domain_R)
    draw = np.random.default_rng(seed)
    drawn_P = np.array([_bits(counts_RE, draw.permutation(domain_R)) for _ in range(DRAWS)])
    # A sum in another order is not another result.
    reached = (drawn_P >= observed - 1e-12).sum()
    return Information(
        observed, drawn_P.mean(), np.quantile(drawn_P, 0.95), (1 + reached) / (1 + DRAWS)
    )


def information_bits(
    first_N: np.ndarray, domains_N: np.ndarray, documents_N: np.ndarray, experts: int
) -> float | None:
    """`information` without what chance gives."""
    counted = _by_document(first_N, domains_N, documents_N, experts)
    return None if counted is None else _bits(*counted)


def _by_document(
    first_N: np.ndarray, domains_N: np.ndarray, documents_N: np.ndarray, experts: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """How often each document's tokens chose each expert first, (R, E), and its domain, (R,)."""
    live_N = first_N < experts
    first_N, domains_N, documents_N = (a[live_N] for a in (first_N, domains_N, documents_N))
    names, document_N = np.unique(documents_N, return_inverse=True)
    if len(np.unique(domains_N)) < 2:
        return None
    R = len(names)
    counts_RE = np.bincount(document_N * experts + first_N, minlength=R * experts)
    domain_R = np.zeros(R, np.int64)
    domain_R[document_N] = domains_N
    return counts_RE.reshape(R, experts).astype(np.float64), domain_R


def _bits(counts_RE: np.ndarray, domain_R: np.ndarray) -> float:
    counts_DE = np.zeros((domain_R.max() + 1, counts_RE.shape[1]))
    np.add.at(counts_DE, domain_R, counts_RE)
    return mutual_information(torch.from_numpy(counts_DE[counts_DE.sum(1) > 0]))


def over_represented(
    first_N: np.ndarray, tokens_N: np.ndarray, experts: int, most: int = 20
) -> list[list[dict[str, float]]]:
    """For each expert the kinds of tokens (entries of the vocabulary) that it is first choice of
    more often than chance would give it: a hypergeometric test, false discoveries controlled over
    all experts and kinds (Benjamini and Hochberg 1995), surest first.

    Returns:
        A list for each expert, of `token`, `count` (of its tokens), `times` (over chance) and `q`
        (the p value, adjusted).
    """
    live_N = first_N < experts
    first_N, tokens_N = first_N[live_N].astype(np.int64), tokens_N[live_N]
    kinds, kind_N = np.unique(tokens_N, return_inverse=True)
    if not len(kinds):
        return [[] for _ in range(experts)]
    pairs, count_M = np.unique(first_N * len(kinds) + kind_N, return_counts=True)
    expert_M, kind_M = pairs // len(kinds), pairs % len(kinds)
    of_expert_E = np.bincount(first_N, minlength=experts)
    of_kind = np.bincount(kind_N)
    N = len(first_N)
    # What no count could show is not tested.
    tested = of_kind[kind_M] >= FEWEST
    expert_M, kind_M, count_M = expert_M[tested], kind_M[tested], count_M[tested]
    if not len(count_M):
        return [[] for _ in range(experts)]
    p_M = stats.hypergeom.sf(count_M - 1, N, of_kind[kind_M], of_expert_E[expert_M])
    q_M = stats.false_discovery_control(p_M)
    times_M = count_M / (of_kind[kind_M] * of_expert_E[expert_M] / N)
    found: list[list[dict[str, float]]] = [[] for _ in range(experts)]
    for m in np.lexsort((-times_M, q_M)):
        e = expert_M[m]
        if q_M[m] <= FALSE_DISCOVERIES and times_M[m] > 1 and len(found[e]) < most:
            row = {"token": int(kinds[kind_M[m]]), "count": int(count_M[m])}
            found[e].append(row | {"times": float(times_M[m]), "q": float(q_M[m])})
    return found


def lifts(pairs_EE: np.ndarray) -> np.ndarray:
    """How much oftener two experts have a token together than chance gives it, (E, E); NaN on the
    diagonal, and for experts without tokens.

    By chance, pairs are as many as there are, and shared out by the product of both experts' loads.

    Args:
        pairs_EE: tokens that had both; the diagonal holds each expert's own.
    """
    each_E = np.diag(pairs_EE)
    chance_EE = np.outer(each_E, each_E)
    off = ~np.eye(len(each_E), dtype=bool)
    total = chance_EE[off].sum()
    chance_EE = chance_EE * (pairs_EE[off].sum() / total if total else 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(off & (chance_EE > 0), pairs_EE / chance_EE, np.nan)
