"""How much more a neuron does for one domain than for the others, and which neurons are its own.

The scores of Pochinkov et al. (2024) and their code. D domains, N neurons, L layers, R documents.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from sparsecraft.evaluation.analysis.chance import FALSE_DISCOVERIES
from sparsecraft.evaluation.neurons.statistics import Statistics

EPSILON = 1e-3  # of the released code, for feed-forward networks


def _ratio(of: Callable[[Statistics], Tensor]) -> Callable[[Statistics, int], Tensor]:
    def score_N(found: Statistics, domain: int) -> Tensor:
        values_DN = of(found)
        return values_DN[domain] / (_others(found, values_DN, domain) + EPSILON)

    return score_N


def _others(found: Statistics, values_DN: Tensor, domain: int) -> Tensor:
    """The mean over the tokens of the reference, or of all other domains."""
    if found.reference is not None:
        return values_DN[found.reference]
    weights_D = found.tokens_D.clone()
    weights_D[domain] = 0
    return (weights_D[:, None] * values_DN).sum(0) / weights_D.sum().clamp_min(1)


def _spread(found: Statistics, domain: int) -> Tensor:
    others = _others(found, found.means["square"], domain)
    mean = _others(found, found.means["mean"], domain)
    return found.std_DN[domain] / ((others - mean**2).clamp_min(0).sqrt() + EPSILON)


def _rms(found: Statistics, domain: int) -> Tensor:
    others = _others(found, found.means["square"], domain).sqrt()
    return found.means["square"][domain].sqrt() / (others + EPSILON)


def _shift(found: Statistics, domain: int) -> Tensor:
    mean_DN = found.means["mean"]
    return (mean_DN[domain] - _others(found, mean_DN, domain)).abs()


# Name -> (statistics, domain) -> (N,): large where a neuron is the domain's.
SCORES: dict[str, Callable[[Statistics, int], Tensor]] = {
    "abs": _ratio(lambda found: found.means["absolute"]),
    "freq": _ratio(lambda found: found.means["active"]),
    "sqrt": _ratio(lambda found: found.means["root"]),
    "std": _spread,
    "rms": _rms,
    "mean": _shift,
}


def top(score_N: Tensor, share: float, layer_N: Tensor | None = None) -> Tensor:
    """The neurons of highest score, (N,) bool: this share of all, as the paper chooses them, or
    of each layer."""
    if layer_N is None:
        return _best(score_N, share)
    chosen_N = torch.zeros(len(score_N), dtype=torch.bool)
    for layer in layer_N.unique():
        of_layer_N = layer_N == layer
        chosen_N[of_layer_N] = _best(score_N[of_layer_N], share)
    return chosen_N


def _best(score_N: Tensor, share: float) -> Tensor:
    chosen_N = torch.zeros(len(score_N), dtype=torch.bool)
    chosen_N[score_N.argsort(descending=True, stable=True)[: round(share * len(score_N))]] = True
    return chosen_N


def beyond_chance(found: Statistics, domain: int) -> Tensor | None:
    """The neurons whose mean |a| is higher in documents of the domain than in others (of the
    reference, if there is one), (N,) bool: Welch's test over documents, false discoveries at 5 %;
    None of fewer than two documents."""
    own_R = found.domain_R == domain
    other_R = ~own_R if found.reference is None else found.domain_R == found.reference
    own_RN, other_RN = (found.documents_RN[rows_R].numpy() for rows_R in (own_R, other_R))
    if min(len(own_RN), len(other_RN)) < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        p_N = stats.ttest_ind(own_RN, other_RN, equal_var=False, alternative="greater").pvalue
    q_N = stats.false_discovery_control(np.nan_to_num(p_N, nan=1.0))
    return torch.from_numpy(q_N <= FALSE_DISCOVERIES)
