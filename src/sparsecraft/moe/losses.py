"""Auxiliary losses: pure functions of what a trace recorded.

Each is computed per layer in float32 and averaged over layers, with padding masked, in training
only. T tokens, K slots per token, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.errors import RecipeError, SparsecraftError, did_you_mean
from sparsecraft.moe.balance import TOGETHER, of_layers
from sparsecraft.moe.routing import Routing

Loss = Callable[[Routing, Tensor | None], Tensor]


def switch_balance(
    routing: Routing, mask_T: Tensor | None = None, normalize_by_topk: bool = True
) -> Tensor:
    """E * sum_e f_e p_e (Switch Eq. 4-6; PESC Eq. 10).

    f is the share of the filled slots that each expert received and p the mean router probability.
    Where every token has all experts, slots say nothing, and f is each expert's share of their
    weights: for weights that are p this is 1 + CV^2 of the experts' importance (Shazeer et al.
    2017). f has no gradient.

    Args:
        mask_T: True on real tokens.
        normalize_by_topk: perfect balance gives 1 and a collapsed router E/K; without it, in
            transformers' Mixtral convention, balance gives the K slots of a token.
    """
    probs_E = _mean(routing.logits_TE.float().softmax(-1), routing, mask_T)
    loss = routing.num_experts * (routing.load_E(mask_T) * probs_E).sum()
    if normalize_by_topk:
        return loss
    chosen_T = (routing.chosen_TK < routing.num_experts).sum(-1, dtype=torch.float32)
    return loss * _mean(chosen_T, routing, mask_T)


def switch_balance_unnormalized(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """`switch_balance` in transformers' convention: K at balance."""
    return switch_balance(routing, mask_T, normalize_by_topk=False)


def btx_balance(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """E * sum_e u_e p_e with u the mean mixing weight of each expert and p its mean probability
    (BTX, section 3.3): 1 at perfect balance, and u has a gradient, which Switch's f has not."""
    weights_E = _mean(routing.weights_TE().float(), routing, mask_T)
    probs_E = _mean(routing.logits_TE.float().softmax(-1), routing, mask_T)
    return routing.num_experts * (weights_E * probs_E).sum()


def heterogeneous_balance(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """sum_e eta_e f_e p_e, with f_e the share of tokens that chose expert e, p_e its mean
    probability, and eta_e one for feed-forward experts and tau for zero-computation experts, the
    inverse of the loads that they are meant to have (MoE++, Jin et al. 2025, Eq. 7-8)."""
    logits_TE, in_use_E = routing.logits_TE.float(), routing.in_use_E()
    if in_use_E is not None:  # of experts that are held back, what they are chosen by
        logits_TE = logits_TE + in_use_E.log()
    probs_E = _mean(logits_TE.softmax(-1), routing, mask_T)
    chosen_T = (routing.chosen_TK < routing.num_experts).sum(-1, dtype=torch.float32)
    fractions_E = routing.load_E(mask_T) * _mean(chosen_T, routing, mask_T)
    load = routing.target_load or (1.0,) * routing.num_experts
    eta_E = probs_E.new_tensor([load[0] / share for share in load])
    return (eta_E * fractions_E * probs_E).sum()


def relu_balance(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """sum_e f_e r_e, with r the mean weight of each expert and f_e = E / k times the share of
    tokens that it has a weight for (ReMoE, Wang et al. 2025, L1 with load balance): of routers
    that select by `relu`, whose coefficient adapts; see `BySparsity`."""
    if routing.k is None:
        raise RecipeError("The loss 'remoe' is of routers with select='relu'; use 'switch'.")
    weights_TE = routing.weights_TE().float()
    shares_E = _mean((weights_TE > 0).float(), routing, mask_T) * (routing.num_experts / routing.k)
    return (shares_E * _mean(weights_TE, routing, mask_T)).sum()


def router_z(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of the logits (ST-MoE, Zoph et al. 2022)."""
    return _mean(routing.logits_TE.float().logsumexp(-1).square(), routing, mask_T)


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
    return _mean(_hoyer(_activations(routing).relu()), routing, mask_T)


def relu_l1(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Sum of a network's activations after ReLU, mean over tokens (D2DMoE's code)."""
    return _mean(_activations(routing).relu().sum(-1), routing, mask_T)


# Below it GELU is as good as zero (D2DMoE).
DISPLACEMENT = -10.0


def gelu_clamped_l1(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Sum of how far inputs of GELU lie above -10, mean over tokens (D2DMoE)."""
    above_TF = (_activations(routing) - DISPLACEMENT).relu()
    return _mean(above_TF.sum(-1), routing, mask_T)


def gelu_clamped_hoyer(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """The Hoyer measure of how far inputs of GELU lie above -10 (D2DMoE)."""
    above_TF = (_activations(routing) - DISPLACEMENT).relu()
    return _mean(_hoyer(above_TF), routing, mask_T)


def lte_efficiency(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Mean of the squared sigmoid scores (LTE, section 4.2)."""
    return _mean(routing.logits_TE.float().sigmoid().square().mean(-1), routing, mask_T)


# LTE's threshold of all layers, and what keeps its loss finite where a score is on it.
LTE_THRESHOLD, LTE_EPSILON = 0.5, 1e-2


def lte_separability(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Mean of 1 / ((G - 0.5)^2 + 0.01) over sigmoid scores G (LTE, section 4.2).

    The paper has no 0.01; without it the loss of a router that starts from zeros is infinite.
    """
    distance_TE = routing.logits_TE.float().sigmoid() - LTE_THRESHOLD
    separate_TE = (distance_TE.square() + LTE_EPSILON).reciprocal()
    return _mean(separate_TE.mean(-1), routing, mask_T)


def own_expert(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """-log sigmoid of the logit of the expert that each token was sent to, mean over tokens: the
    cross-entropy of sigmoid(h r_i) with 1 on the rows of expert i's bucket (UpIT)."""
    best_T1 = routing.weights_TK.argmax(-1, keepdim=True)
    own_T1 = routing.indices_TK.gather(-1, best_T1)
    own_T = routing.logits_TE.float().gather(-1, own_T1).squeeze(-1)
    return _mean(F.softplus(-own_T), routing, mask_T)


def importance(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """CV^2 of the experts' importance, the sum of their probabilities over the tokens (Shazeer et
    al. 2017, Eq. 7): the squared standard deviation over the experts divided by the squared mean.

    It is 0 where all experts are used alike and E - 1 where one is used alone. A loss of a
    micro-batch: that of a batch is no more than the mean of those of its parts.
    """
    # Probabilities of a token sum to one: the mean over the experts is 1 / E.
    probs_E = _mean(routing.logits_TE.float().softmax(-1), routing, mask_T)
    return routing.num_experts**2 * probs_E.var(correction=0)


def sample_similarity(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """How far samples lie apart that go to one expert, the first term of L_s (Krishnamurthy et al.
    2023): (1/E) sum_e sum_xx' p(e|x) p(e|x') D(x, x') / (N^2 - N).

    D is the Euclidean distance divided by the largest one, of what the router's layer reads of a
    token, without a gradient. At most 1024 tokens enter, evenly spaced. A loss of a micro-batch:
    samples of two of them are never compared.

    Raises:
        RecipeError: the trace has not kept the layer's inputs.
    """
    same, _, count = _similarity(routing, mask_T)
    return same / (count.square() - count).clamp_min(1)


def sample_dissimilarity(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """How near samples are that go to different experts, the second term of L_s with its sign:
    -sum_e!=e' sum_xx' p(e|x) p(e'|x') D(x, x') / ((E^2 - E) (N^2 - N)); see `sample_similarity`.

    As probabilities sum to one, it is `sample_similarity` / (E - 1) less a number that no router
    changes.
    """
    _, different, count = _similarity(routing, mask_T)
    return -different / (count.square() - count).clamp_min(1)


def sample_similarity_released(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """`sample_similarity` as the paper's code has it: a sum, divided by no number of pairs."""
    return _similarity(routing, mask_T)[0]


def sample_dissimilarity_released(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """`sample_dissimilarity` as the paper's code has it: divided by N^2."""
    _, different, count = _similarity(routing, mask_T)
    return -different / count.square().clamp_min(1)


# Of a layer's tokens, those whose distances to each other are computed.
MOST_SAMPLES = 1024


def _similarity(routing: Routing, mask_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """tr(M) / E and (sum(M) - tr(M)) / (E^2 - E) of M = P^T D P (E, E), with probabilities P (N, E)
    and distances D (N, N), and the number N of samples."""
    if routing.inputs_TD is None:
        raise RecipeError(
            "A loss of samples reads what the layer read, and this routing has not kept it; open "
            "the trace by sc.trace(model, inputs=True)."
        )
    E, every = routing.num_experts, -(-len(routing.logits_TE) // MOST_SAMPLES) or 1
    x_ND = routing.inputs_TD[::every].detach().float()
    probs_NE = routing.logits_TE[::every].float().softmax(-1)
    counted_N = routing.counted(mask_T)
    counted_N = x_ND.new_ones(len(x_ND)) if counted_N is None else counted_N[::every].float()
    with torch.autocast(x_ND.device.type, enabled=False):  # which would multiply in bf16
        # Without products of x, whose rounding would move equal samples apart.
        distance_NN = torch.cdist(x_ND, x_ND, compute_mode="donot_use_mm_for_euclid_dist")
        distance_NN = distance_NN * counted_N[:, None] * counted_N
        distance_NN = distance_NN / distance_NN.max().clamp_min(torch.finfo(torch.float32).tiny)
        pairs_EE = probs_NE.t() @ distance_NN @ probs_NE
    same = pairs_EE.trace()
    return same / E, (pairs_EE.sum() - same) / max(1, E * E - E), counted_N.sum()


LOSSES: dict[str, Loss] = {
    "switch": switch_balance,
    "switch_unnormalized": switch_balance_unnormalized,
    "btx": btx_balance,
    "heterogeneous": heterogeneous_balance,
    "remoe": relu_balance,
    "z": router_z,
    "pesc_released": pesc_released_balance,
    "relu_hoyer": relu_hoyer,
    "relu_l1": relu_l1,
    "gelu_clamped_l1": gelu_clamped_l1,
    "gelu_clamped_hoyer": gelu_clamped_hoyer,
    "own_expert": own_expert,
    "lte_efficiency": lte_efficiency,
    "lte_separability": lte_separability,
    "importance": importance,
    "sample_similarity": sample_similarity,
    "sample_dissimilarity": sample_dissimilarity,
    "sample_similarity_released": sample_similarity_released,
    "sample_dissimilarity_released": sample_dissimilarity_released,
}


# Those that read what the layers read.
OF_SAMPLES = {
    "sample_similarity",
    "sample_dissimilarity",
    "sample_similarity_released",
    "sample_dissimilarity_released",
}


def of_samples(names: Iterable[str]) -> bool:
    """Whether any of the named losses reads what the layers read, so that a trace must keep it."""
    return not OF_SAMPLES.isdisjoint(names)


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
        The sum (None when there is nothing to add) and each unweighted loss by name. In the sum,
        layers whose coefficients adapt have these as factors of their balance losses.

    Raises:
        RecipeError: an unknown loss.
    """
    check_names(coefficients)
    if not traced or not coefficients:
        return None, {}
    parts, total = {}, 0.0
    for name, coefficient in coefficients.items():
        plain, scaled = defaultdict(list), defaultdict(list)
        found = _of_layers(name, list(traced.values()), [masks(layer) for layer in traced])
        for (layer, routing), value in zip(traced.items(), found, strict=True):
            plain[groups(layer)].append(value)
            scale = routing.loss_scale if name in routing.scaled else None
            scaled[groups(layer)].append(value if scale is None else value * scale)
        parts[name] = _summed(plain)
        total = total + coefficient * _summed(scaled)
    return total, parts


def _of_layers(name: str, routings: list[Routing], masks: list[Tensor | None]) -> Iterable[Tensor]:
    """A loss of every layer; the most used ones of all at once."""
    if name in TOGETHER:
        return of_layers(name, routings, masks)
    return [LOSSES[name](routing, mask_T) for routing, mask_T in zip(routings, masks, strict=True)]


def _summed(groups: Mapping[str, list[Tensor]]) -> Tensor:
    return sum(torch.stack(values).mean() for values in groups.values())


def latest(model: nn.Module, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The recipe's weighted auxiliary losses of this thread's latest forward pass in training,
    float32: to add to a loss of one's own, where the model was called without labels or its loss is
    not used. One that was called with labels has them in its loss already.

    Args:
        model: converted, or with an adapter of ours by PEFT; wrappers around it do not matter.
        num_items_in_batch: items (label tokens, or rows) of the whole optimizer step's batch, of
            which that pass was a part; the losses are weighed by its share. It needs labels.

    Raises:
        SparsecraftError: nothing is converted, or no forward pass in training, with gradients,
            came before.

    Example:
        logits = model(input_ids, attention_mask=mask).logits
        loss = my_loss(logits) + sc.losses.latest(model)
    """
    for module in model.modules():
        own = getattr(getattr(module, "sparsecraft", module), "own_loss", None)
        if own is not None:
            return own.read(model, num_items_in_batch)
    raise SparsecraftError(f"This {type(model).__name__} is dense; call sc.convert first.")


def check_names(coefficients: Mapping[str, float]) -> None:
    for name in coefficients:
        if name not in LOSSES:
            raise RecipeError(f"Unknown loss {name!r}." + did_you_mean(name, LOSSES))


def _mean(values_T: Tensor, routing: Routing, mask_T: Tensor | None) -> Tensor:
    """The mean of (T,) or (T, E) over the tokens that are real and that the layer acts on; zero
    where there are none."""
    counted_T = routing.counted(mask_T)
    if counted_T is None:
        return values_T.mean(0)
    # No indexing by a mask: it would wait for the device, and break a compiled graph.
    counted = counted_T.reshape(-1, *[1] * (values_T.ndim - 1))
    return values_T.where(counted, 0.0).sum(0) / counted_T.sum().clamp_min(1)


def _activations(routing: Routing) -> Tensor:
    """What the activation of a split network reads, (T, F) float32."""
    if routing.pre_TF is None:
        raise RecipeError(
            "A sparsity loss reads the activations of split networks, in training with "
            "stage.runs='every'; this layer recorded none."
        )
    return routing.pre_TF.float()


def _hoyer(a_TF: Tensor) -> Tensor:
    return a_TF.abs().sum(-1).square() / (a_TF.square().sum(-1) + 1e-15)
