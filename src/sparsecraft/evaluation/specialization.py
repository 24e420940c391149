"""How decisively and how evenly experts are used, and what they know of classes (Krishnamurthy et
al. 2023). All in bits. T samples or tokens, E experts, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsecraft.errors import SparsecraftError


def sample_entropy(probs_TE: Tensor) -> float:
    """H_s, the mean entropy of a sample's probabilities of the experts: 0 where every sample knows
    its expert, log2 E where none does."""
    return _bits(_checked(probs_TE)).mean().item()


def usage_entropy(probs_TE: Tensor) -> float:
    """H_u, the entropy of the experts' mean probability: log2 E where all are used alike, 0 where
    one is used alone."""
    return _bits(_checked(probs_TE).mean(0)).item()


def class_information(experts_T: Tensor, classes_T: Tensor) -> float:
    """I(E;Y) = H(E) + H(Y) - H(E,Y), of how often each expert and each class came together.

    The paper's code takes for Y the class that the chosen expert predicts, and not the label.

    Args:
        experts_T: number of the chosen expert of every sample.
        classes_T: number of its class.

    Raises:
        SparsecraftError: they are not whole numbers from 0, one of each for every sample.
    """
    for name, numbers_T in (("experts_T", experts_T), ("classes_T", classes_T)):
        whole = not (numbers_T.is_floating_point() or numbers_T.is_complex())
        if not (whole and numbers_T.shape == (len(experts_T),) and len(numbers_T)):
            raise SparsecraftError(
                f"{name} is {numbers_T.dtype} of shape {tuple(numbers_T.shape)}; pass one whole "
                "number for each sample."
            )
        if numbers_T.min() < 0:
            raise SparsecraftError(f"{name} holds {numbers_T.min().item()}; numbers are from 0.")
    count = int(classes_T.max()) + 1
    size = (int(experts_T.max()) + 1) * count
    joint = torch.bincount(experts_T.long() * count + classes_T.long(), minlength=size)
    joint_EC = joint.double().view(-1, count) / len(experts_T)
    apart = _bits(joint_EC.sum(1)) + _bits(joint_EC.sum(0))
    return (apart - _bits(joint_EC.flatten())).clamp_min(0).item()


def _bits(shares: Tensor) -> Tensor:
    """Entropy along the last dimension."""
    return torch.special.entr(shares).sum(-1) / math.log(2)


def _checked(probs_TE: Tensor) -> Tensor:
    """Probabilities in float64.

    Raises:
        SparsecraftError: they are none.
    """
    found_TE = probs_TE.detach().double()
    good = found_TE.ndim == 2 and len(found_TE) and (found_TE >= 0).all()
    if not (good and torch.allclose(found_TE.sum(-1), found_TE.new_ones(()), atol=1e-3)):
        raise SparsecraftError(
            f"A table of shape {tuple(probs_TE.shape)} holds no probabilities of experts: rows of "
            "numbers from 0 that sum to one, one for each sample, such as "
            "routing.logits_TE.softmax(-1)."
        )
    return found_TE
