"""Auxiliary losses: pure functions of what a trace recorded.

Each is computed per layer in float32 and averaged over layers, with padding masked, in training
only. T tokens, K slots per token, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsecraft.errors import RecipeError, did_you_mean
from sparsecraft.moe.routing import Routing, spread

Loss = Callable[[Routing, Tensor | None], Tensor]


def switch_balance(
    routing: Routing, mask_T: Tensor | None = None, normalize_by_topk: bool = True
) -> Tensor:
    """E * sum_e f_e p_e (Switch Eq. 4-6; PESC Eq. 10).

    f is the fraction of tokens dispatched to each expert and p the mean router probability.

    Args:
        mask_T: True on real tokens.
        normalize_by_topk: divide f by K, so that perfect balance gives 1 and a collapsed router
            E/K; without it, transformers' Mixtral convention, balance gives K.
    """
    logits_TE, indices_TK = _kept(routing, mask_T)
    num_experts = logits_TE.shape[-1]
    probs_E = logits_TE.softmax(-1).mean(0)
    chosen_TKE = F.one_hot(indices_TK, num_experts + 1)[..., :num_experts].float()
    fraction_E = chosen_TKE.sum(1).mean(0)
    if normalize_by_topk:
        fraction_E = fraction_E / indices_TK.shape[1]
    return num_experts * (fraction_E * probs_E).sum()


def switch_balance_unnormalized(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """`switch_balance` in transformers' convention: K at balance."""
    return switch_balance(routing, mask_T, normalize_by_topk=False)


def btx_balance(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """E * sum_e u_e p_e with u the mean mixing weight of each expert and p its mean probability
    (BTX, section 3.3): 1 at perfect balance, and u has a gradient, which Switch's f has not."""
    logits_TE, _ = _kept(routing, mask_T)
    weights_TE = routing.weights_TE().float()
    if mask_T is not None:
        weights_TE = weights_TE[spread(mask_T, len(weights_TE)).to(torch.bool)]
    return logits_TE.shape[-1] * (weights_TE.mean(0) * logits_TE.softmax(-1).mean(0)).sum()


def router_z(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of the logits (ST-MoE, Zoph et al. 2022)."""
    logits_TE, _ = _kept(routing, mask_T)
    return logits_TE.logsumexp(-1).square().mean()


def pesc_released_balance(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """The balance loss of PESC's released code: a constant, E/K, with zero gradient.

    The code takes the softmax over the K kept logits only and averages it over those K, which
    gives 1/K whatever the router does. Padding is not masked there. Kept as a named variant so
    that the released recipe can be reproduced; it balances nothing.
    """
    num_experts, k = routing.num_experts, routing.indices_TK.shape[1]
    top_TK = routing.logits_TE.gather(-1, routing.indices_TK.clamp(max=num_experts - 1))
    mean_prob_T = top_TK.softmax(-1).mean(-1)
    chosen_TKE = F.one_hot(routing.indices_TK, num_experts + 1)[..., :num_experts].float()
    fraction_TE = chosen_TKE.amax(1)
    return num_experts * (fraction_TE * mean_prob_T[:, None]).sum(-1).mean() / k


def relu_hoyer(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """(sum |a|)^2 / sum a^2 of a network's activations after ReLU, between 1 and its width
    (D2DMoE, section 3.1, with the square Hoyer measure)."""
    return _hoyer(_activations(routing, mask_T).relu())


def relu_l1(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Sum of a network's activations after ReLU, mean over tokens (D2DMoE's code)."""
    return _activations(routing, mask_T).relu().sum(-1).mean()


# Below it GELU is as good as zero (D2DMoE).
DISPLACEMENT = -10.0


def gelu_clamped_l1(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Sum of how far inputs of GELU lie above -10, mean over tokens (D2DMoE)."""
    return (_activations(routing, mask_T) - DISPLACEMENT).relu().sum(-1).mean()


def gelu_clamped_hoyer(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """The Hoyer measure of how far inputs of GELU lie above -10 (D2DMoE)."""
    return _hoyer((_activations(routing, mask_T) - DISPLACEMENT).relu())


def lte_efficiency(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Mean of the squared sigmoid scores (LTE, section 4.2)."""
    logits_TE, _ = _kept(routing, mask_T)
    return logits_TE.sigmoid().square().mean()


# LTE's threshold of all layers, and what keeps its loss finite where a score is on it.
LTE_THRESHOLD, LTE_EPSILON = 0.5, 1e-2


def lte_separability(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Mean of 1 / ((G - 0.5)^2 + 0.01) over sigmoid scores G (LTE, section 4.2).

    The paper has no 0.01; without it the loss of a router that starts from zeros is infinite.
    """
    logits_TE, _ = _kept(routing, mask_T)
    distance_TE = logits_TE.sigmoid() - LTE_THRESHOLD
    return (distance_TE.square() + LTE_EPSILON).reciprocal().mean()


def own_expert(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """-log sigmoid of the logit of the expert that each token was sent to, mean over tokens: the
    cross-entropy of sigmoid(h r_i) with 1 on the rows of expert i's bucket (UpIT)."""
    logits_TE, indices_TK = _kept(routing, mask_T)
    return F.softplus(-logits_TE.gather(-1, indices_TK[:, :1])).mean()


LOSSES: dict[str, Loss] = {
    "switch": switch_balance,
    "switch_unnormalized": switch_balance_unnormalized,
    "btx": btx_balance,
    "z": router_z,
    "pesc_released": pesc_released_balance,
    "relu_hoyer": relu_hoyer,
    "relu_l1": relu_l1,
    "gelu_clamped_l1": gelu_clamped_l1,
    "gelu_clamped_hoyer": gelu_clamped_hoyer,
    "own_expert": own_expert,
    "lte_efficiency": lte_efficiency,
    "lte_separability": lte_separability,
}


def auxiliary_loss(
    traced: Mapping[str, Routing],
    coefficients: Mapping[str, float],
    masks: Callable[[str], Tensor | None] = lambda layer: None,
    groups: Callable[[str], str] = lambda layer: "",
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The weighted sum of the named losses, each the mean over the traced layers.

    Args:
        traced: layer name -> routing.
        coefficients: loss name -> weight.
        masks: layer name -> True on that layer's real tokens.
        groups: layer name -> the group whose mean it counts in; the groups' means are summed, as
            D2DMoE sums those of feed-forward networks and of attention.

    Returns:
        The sum (None when there is nothing to add) and each unweighted loss by name.

    Raises:
        RecipeError: an unknown loss.
    """
    check_names(coefficients)
    if not traced or not coefficients:
        return None, {}
    parts = {}
    for name in coefficients:
        found = defaultdict(list)
        for layer, routing in traced.items():
            found[groups(layer)].append(LOSSES[name](routing, masks(layer)))
        parts[name] = sum(torch.stack(values).mean() for values in found.values())
    return sum(coefficients[name] * value for name, value in parts.items()), parts


def check_names(coefficients: Mapping[str, float]) -> None:
    for name in coefficients:
        if name not in LOSSES:
            raise RecipeError(f"Unknown loss {name!r}." + did_you_mean(name, LOSSES))


def _kept(routing: Routing, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
    logits_TE = routing.logits_TE.float()
    if mask_T is None:
        return logits_TE, routing.indices_TK
    mask_T = spread(mask_T, len(logits_TE)).to(torch.bool)
    return logits_TE[mask_T], routing.indices_TK[mask_T]


def _activations(routing: Routing, mask_T: Tensor | None) -> Tensor:
    """What the activation of a split network reads, (T, F) float32, of real tokens."""
    if routing.pre_TF is None:
        raise RecipeError(
            "A sparsity loss reads the activations of split networks, in training with "
            "stage.runs='every'; this layer recorded none."
        )
    pre_TF = routing.pre_TF.float()
    return pre_TF if mask_T is None else pre_TF[mask_T.reshape(-1).to(torch.bool)]


def _hoyer(a_TF: Tensor) -> Tensor:
    return (a_TF.abs().sum(-1).square() / (a_TF.square().sum(-1) + 1e-15)).mean()
