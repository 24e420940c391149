"""Log-probabilities of labels, batch by batch, in bounded memory."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.dense.tokens import is_encoder_decoder
from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.outputs import decoder_ids

# Tokens in one forward pass: the logits of a large vocabulary in float32 are the largest tensor.
BATCH_TOKENS = 4096


def label_logprobs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probability of every label, and whether it is the model's first choice.

    Labels of -100 are skipped; causal models predict label i + 1 from position i.
    """
    batch = {key: value.to(model.device) for key, value in batch.items()}
    labels = batch.pop("labels")
    decoder = is_encoder_decoder(model)
    if decoder:
        batch["decoder_input_ids"] = decoder_ids(model, labels)
    # A cache would hide the document borders of packed batches from the attention mask.
    options = {"use_cache": False} if labels.ndim == 2 else {}
    logits = model(**batch, **options).logits
    if labels.ndim == 2 and not decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    logits_NV, labels_N = logits[kept].float(), labels[kept]
    logprobs_N = -F.cross_entropy(logits_NV, labels_N, reduction="none")
    if not logprobs_N.isfinite().all():
        raise SparsecraftError(
            f"{type(model).__name__} gives probabilities that are not finite numbers; check its "
            "weights, or load it in float32."
        )
    return logprobs_N, logits_NV.argmax(-1) == labels_N
