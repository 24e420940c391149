"""Over how many items a task's loss is a mean, and what part of a larger batch these are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.dense.tokens import is_encoder_decoder


def count_items(labels: Tensor, shifts: bool) -> Tensor:
    """Over how many items the loss of these labels is a mean: label tokens, rows of a classifier,
    or all numbers of a regression. A scalar.

    Args:
        shifts: the first label of a row is no item, because none predicts it.
    """
    if labels.is_floating_point():
        return torch.tensor(labels.numel(), device=labels.device)
    return (labels[..., 1:] if shifts else labels).ne(-100).sum()


def shifts(labels: Tensor, logits: Tensor, loss: Tensor) -> bool | None:
    """Whether a loss is the mean over shifted labels, and not over all: asked of the loss itself,
    because classes shift or do not whatever their names and their loss functions say.

    Args:
        labels: (B, S), of tokens.
        logits: (B, S, V).

    Returns:
        None where these labels do not tell: no row's first label counts.
    """
    first, later = labels[:, 0], labels[:, 1:]
    if not first.ne(-100).any() or not later.ne(-100).any():
        return None
    all_of_them = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().long())
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), later.flatten().long())
    return bool((loss - shifted).abs() < (loss - all_of_them).abs())


def shifts_labels(model: nn.Module) -> bool:
    """Whether a model's own loss shifts its labels by one, as Trainer guesses."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    return loss is ForCausalLMLoss and not is_encoder_decoder(model)


def weighed(loss: Tensor, items: Tensor, num_items: Tensor | int) -> Tensor:
    """A mean over `items` as a part of the mean over `num_items`; a mean over none is not a number
    and counts as zero."""
    share = items.to(loss.device) / torch.as_tensor(num_items, device=loss.device).clamp(min=1)
    return (loss * share).where(share > 0, loss.new_zeros(()))
