"""Which experts of a split network run: rules on their scores, each a mask of every expert.

All are monotone: more experts by top-k, a larger share, or a lower threshold never leave out an
expert that ran before. T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select(scores_TE: Tensor, rule: str, k: int | None, threshold: Tensor | None) -> Tensor:
    """The mask (T, E) of the experts that `rule` takes.

    Args:
        rule: as `RouterSpec.select` says.
        k: for `top_k`.
        threshold: for the others, a float32 tensor without dimensions.
    """
    scores_TE = scores_TE.detach().nan_to_num(nan=-torch.inf)
    match rule:
        case "top_k":
            return _ranks(scores_TE) < k
        case "share":
            return _share(scores_TE, threshold)
        case "relative":
            # The best one is named apart: times a threshold of one it may round above itself.
            best_T1 = scores_TE.max(-1, keepdim=True).values
            return (scores_TE >= threshold * best_T1) | (scores_TE == best_T1)
        case "threshold":
            return scores_TE > threshold
    raise ValueError(f"unknown rule {rule!r}")


def _ranks(scores_TE: Tensor) -> Tensor:
    """Place of each expert by descending score, equal ones in order."""
    order_TE = scores_TE.sort(dim=-1, descending=True, stable=True).indices
    places_E = torch.arange(scores_TE.shape[-1], device=scores_TE.device).expand_as(order_TE)
    return torch.empty_like(order_TE).scatter_(-1, order_TE, places_E)


def _share(scores_TE: Tensor, threshold: Tensor) -> Tensor:
    """The smallest set of best experts with this share of all scores (DSTI v1); one at least."""
    sorted_TE, order_TE = scores_TE.sort(dim=-1, descending=True, stable=True)
    before_TE = sorted_TE.cumsum(-1) - sorted_TE
    taken_TE = before_TE < threshold * sorted_TE.sum(-1, keepdim=True)
    taken_TE[:, 0] = True
    return torch.empty_like(taken_TE).scatter_(-1, order_TE, taken_TE)
