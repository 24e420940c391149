"""Experts of neurons that fire together: MoEfication's co-activation graph, cut by METIS.

Shapes: T tokens, F neurons, E experts, m neurons per expert (F = E * m), G tokens in a group.
The graph is dense, F * F float32: 38 MB for F = 3072, 822 MB for F = 14336.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from sparsecraft.errors import DataError, ResourceError
from sparsecraft.moe.init.partition import contiguous, expert_size, neurons_of

GROUP = 8  # tokens whose co-activation the released code limits to 1 together
RELEASED_TOKENS = 200_000  # the released code stops at the first group beyond
METIS_TOTAL = 2**30  # of all weights: METIS adds them up in 32 bits


def co_activation(
    hidden_chunks: Iterable[Tensor], num_experts: int, *, released: bool = False, seed: int = 0
) -> Tensor:
    """neurons_EM by the graph of `co_activation_weights`, cut by `cut_graph`."""
    return cut_graph(co_activation_weights(hidden_chunks, released=released), num_experts, seed)


def co_activation_weights(hidden_chunks: Iterable[Tensor], *, released: bool = False) -> Tensor:
    """weights_FF of the graph between neurons, from chunks hidden_TF after the ReLU.

    MoEfication (Zhang et al. 2022): the sum over tokens of h_n h_m where both are positive.

    released: as the paper's code does. The sums over each group of 8 tokens are cut off at 1 and
        added up; an incomplete last group is left out, and so is what follows the group that
        brings the tokens above 200 000. Weights are then whole multiples of 0.99 times the
        first of the 10th, 20th ... 100th percentile (diagonal included) that is not zero.
    """
    weights_FF = None
    for group_GF in _groups(hidden_chunks) if released else _checked(hidden_chunks):
        if weights_FF is None:
            weights_FF = group_GF.new_zeros(group_GF.shape[1], group_GF.shape[1])
            product_FF = torch.empty_like(weights_FF) if released else None
        if released:
            torch.mm(group_GF.mT, group_GF, out=product_FF)
            weights_FF += product_FF.clamp_(max=1)
        else:
            weights_FF.addmm_(group_GF.mT, group_GF)
    if weights_FF is None:
        needed = f"at least {GROUP} tokens" if released else "at least one chunk of tokens"
        raise DataError(f"A co-activation graph needs {needed}, and none came.")
    if released:
        weights_FF = (weights_FF / (0.99 * _first_percentile(weights_FF))).floor_()
    if not weights_FF.fill_diagonal_(0).any():
        raise DataError(
            f"No two of the {len(weights_FF)} neurons are active together often enough on these "
            "tokens, so there is no graph to cut. Give more tokens."
        )
    return weights_FF


def check_metis() -> ModuleType:
    """The module pymetis.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        import pymetis
    except ImportError as error:
        raise ResourceError(
            "Cutting a co-activation graph needs METIS, and pymetis is not installed. "
            "Install it with `pip install pymetis`, or use balanced_kmeans, which needs nothing."
        ) from error
    return pymetis


def cut_graph(weights_FF: Tensor, num_experts: int, seed: int = 0) -> Tensor:
    """neurons_EM that keep much of the weight inside experts: METIS, then exactly m each.

    METIS (k-way, as `gpmetis`) takes whole numbers: weights that are not, or that are too large
    in total for it, are scaled by one factor and rounded; edges that round to zero fall away.
    Its parts are only nearly equal. Where the paper's code assigns the surplus at random,
    `_level` moves the neuron that loses the least co-activation.
    """
    F = len(weights_FF)
    expert_size(F, num_experts)
    if num_experts == 1 or num_experts == F:  # one way to do it, up to names
        return contiguous(F, num_experts).to(weights_FF.device)
    pymetis = check_metis()
    starts, neighbors, values = _edges(weights_FF)
    _, parts = pymetis.part_graph(
        num_experts,
        pymetis.CSRAdjacency(starts, neighbors),
        eweights=values,
        recursive=False,
        options=pymetis.Options(seed=seed),
    )
    labels_F = torch.as_tensor(parts, dtype=torch.long, device=weights_FF.device)
    return neurons_of(_level(weights_FF, labels_F, num_experts), num_experts)


def _level(weights_FF: Tensor, labels_F: Tensor, num_experts: int) -> Tensor:
    """Equal parts by single moves from large parts to small ones, the least loss first."""
    labels_F = labels_F.clone()
    size = len(labels_F) // num_experts
    load_E = torch.bincount(labels_F, minlength=num_experts)
    member_FE = torch.nn.functional.one_hot(labels_F, num_experts).to(weights_FF.dtype)
    inside_FE = weights_FF @ member_FE  # co-activation of a neuron with each expert
    for _ in range(int((load_E - size).clamp(min=0).sum())):
        loss_FE = inside_FE.gather(1, labels_F[:, None]) - inside_FE
        loss_FE.masked_fill_((load_E <= size)[labels_F][:, None], torch.inf)
        loss_FE.masked_fill_(load_E >= size, torch.inf)
        neuron, expert = divmod(int(loss_FE.argmin()), num_experts)
        left = int(labels_F[neuron])
        labels_F[neuron] = expert
        load_E[left] -= 1
        load_E[expert] += 1
        inside_FE[:, left] -= weights_FF[:, neuron]
        inside_FE[:, expert] += weights_FF[:, neuron]
    return labels_F


def _edges(weights_FF: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of the graph as METIS wants them: starts, neighbors and whole-number weights."""
    total = weights_FF.sum(dtype=torch.float64).item()
    whole_FF = weights_FF
    if total > METIS_TOTAL or not torch.equal(weights_FF, weights_FF.round()):
        whole_FF = (weights_FF * (METIS_TOTAL / total)).round_()
    matrix = whole_FF.cpu().numpy()
    rows, columns = np.nonzero(matrix)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(matrix)))])
    return (
        starts.astype(np.int32),
        columns.astype(np.int32),
        matrix[rows, columns].astype(np.int32),
    )


def _first_percentile(weights_FF: Tensor) -> float:
    """The first non-zero one of the 10th, 20th ... 100th percentile of all entries, or inf."""
    tenths = np.percentile(weights_FF.cpu().numpy(), range(10, 101, 10))
    return next((tenth.item() for tenth in tenths if tenth > 0), float("inf"))


def _checked(hidden_chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    for hidden_TF in hidden_chunks:
        hidden_TF = hidden_TF.detach().float()
        if not (hidden_TF >= 0).all():  # also false for what is not a number
            raise DataError(
                "The activations for a co-activation graph hold negative or undefined numbers; "
                f"the least is {hidden_TF.min().item():.3g}. Give them after the ReLU."
            )
        yield hidden_TF


def _groups(hidden_chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Groups of 8 tokens across the borders of chunks, until more than 200 000 have come."""
    rest_TF, tokens = None, 0
    for hidden_TF in _checked(hidden_chunks):
        if rest_TF is not None:
            hidden_TF = torch.cat([rest_TF, hidden_TF])
        groups = hidden_TF.split(GROUP)
        whole = len(hidden_TF) // GROUP
        for group_GF in groups[:whole]:
            yield group_GF
            tokens += GROUP
            if tokens > RELEASED_TOKENS:
                return
        rest_TF = groups[whole] if whole < len(groups) else None
