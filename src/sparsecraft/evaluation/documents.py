"""Losses of documents, which comparisons draw and whose spread their errors come from.

Shapes: N labels of a batch, R rows of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sparsecraft.dense.tokens import is_encoder_decoder
from sparsecraft.evaluation.logprobs import label_logprobs


@torch.no_grad()
def by_document(model: nn.Module, batch: dict[str, Tensor]) -> np.ndarray:
    """The nats of every row of a batch, its labels, and how many of them are the model's first
    choice, (3, R); rows without a label are left out.

    Raises:
        SparsecraftError: the model gives probabilities that are not finite.
    """
    given = {key: value for key, value in batch.items() if key != "token_mask"}
    logprobs_N, right_N = label_logprobs(model, given)
    labels = given["labels"]
    if labels.ndim == 2 and not is_encoder_decoder(model):
        labels = labels[:, 1:]  # the first one of a causal model has nothing before it
    row_N = (labels != -100).nonzero()[:, 0]
    counted_3N = torch.stack([-logprobs_N, torch.ones_like(logprobs_N), right_N.to(logprobs_N)])
    found_3R = torch.zeros(3, len(labels), dtype=torch.float64)
    found_3R.index_add_(1, row_N.cpu(), counted_3N.double().cpu())
    return found_3R[:, found_3R[1] > 0].numpy()
