"""What a change of a model costs: logits, predictions and held-out loss, before and after.

Shapes: B sequences, S positions, V classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsecraft.data.batches import as_batches, collate
from sparsecraft.data.limits import pad_id
from sparsecraft.data.prepare import TASK_OF_MODEL, prepare
from sparsecraft.dense.loading import gives_one_class, objective_of
from sparsecraft.dense.probes import PROBE_SHAPE
from sparsecraft.dense.tokens import positions_of
from sparsecraft.errors import DataError
from sparsecraft.evaluation.certificate import DATA_LENGTH
from sparsecraft.evaluation.held_out import DEFAULT_MAX_LENGTH, evaluate
from sparsecraft.surgery.record import tokenizer_of

BATCH_ROWS = 8
# What transformers calls the losses of heads that give a token or an image one of several labels.
LABELLED = ("ForTokenClassification", "ForImageClassification")


@dataclass(frozen=True, slots=True)
class Change:
    """How far the merged model is from the one that was given.

    Attributes:
        max_difference: largest |logit difference| on the probe batches.
        mean_kl: mean KL divergence from the old predictions to the new ones, in nats; None for a
            model that predicts no classes.
        loss: file -> held-out loss before and after; empty without data.
    """

    max_difference: float
    mean_kl: float | None
    loss: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        words = [f"max |logit difference| {self.max_difference:.1e}"]
        if self.mean_kl is not None:
            words.append(f"mean KL {self.mean_kl:.1e} nats")
        words += [f"{name}: loss {a:.4f} -> {b:.4f}" for name, (a, b) in self.loss.items()]
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out data of a model.

    Attributes:
        sources: file -> its batches of model inputs; empty without data.
        from_files: whether they were read from files, and may be cut.
    """

    sources: dict[str, list[dict[str, Any]]]
    from_files: bool

    @classmethod
    def read(cls, model: nn.Module, data: Any, tokenizer: Any = None) -> HeldOut:
        """Held-out data for a converted model: None, files, or an iterable of batches.

        Raises:
            DataError: no such file, no row that fits, no tokenizer, or batches that are none.
        """
        listed = [data] if isinstance(data, (str, Path)) else list(data or ())
        if not all(isinstance(item, (str, Path)) for item in listed):
            return cls({"data": list(as_batches(listed, model=model))}, from_files=False)
        if listed and tokenizer is None:
            tokenizer = tokenizer_of(model)
        if listed and tokenizer is None:
            raise DataError(f"The model came without a tokenizer, and {listed[0]} needs one.")
        positions = positions_of(model) or DEFAULT_MAX_LENGTH
        options = {
            "max_length": min(DEFAULT_MAX_LENGTH, positions),
            "task": TASK_OF_MODEL.get(objective_of(model), "causal"),
            "model": model,
        }
        return cls({str(p): _batches(p, tokenizer, options) for p in listed}, from_files=True)

    @property
    def batches(self) -> list[dict[str, Any]]:
        return [batch for batches in self.sources.values() for batch in batches]

    def probes(self, count: int) -> list[dict[str, Any]]:
        """The first batches; those from files are cut to what `convert` compares on."""
        if not self.from_files:
            return self.batches[:count]
        rows, length = PROBE_SHAPE[0], DATA_LENGTH
        return [
            {k: v[:rows, :length] if v.ndim == 2 else v[:rows] for k, v in batch.items()}
            for batch in self.batches[:count]
        ]

    def losses(self, model: nn.Module) -> dict[str, float]:
        """File -> loss; nothing without data, or for a task that has no such loss."""
        if not self.sources or objective_of(model) is None:
            return {}
        return {
            name: evaluate(model, batches)["loss"]["data"]["loss"]
            for name, batches in self.sources.items()
        }


def _batches(path: str | Path, tokenizer: Any, options: dict[str, Any]) -> list[dict[str, Tensor]]:
    rows, _ = prepare(path, tokenizer, split="test", **options)
    batches = []
    for start in range(0, len(rows), BATCH_ROWS):
        part = rows.select(range(start, min(start + BATCH_ROWS, len(rows))))
        batch = collate(list(part), pad_id(tokenizer, options["model"]))
        del batch["token_mask"]  # the models' forward does not know it
        batches.append(batch)
    return batches


def mean_kl(
    before: Iterable[Tensor], after: Iterable[Tensor], batches: Iterable[dict[str, Any]]
) -> float:
    """Mean KL(before || after) of predictions (B, S, V) or (B, V), padding left out."""
    total, count = 0.0, 0
    for old, new, batch in zip(before, after, batches, strict=True):
        p, q = old.double().log_softmax(-1), new.double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == kl.shape:
            kl = kl[mask.bool().cpu()]
        total, count = total + kl.sum().item(), count + kl.numel()
    return max(total / count, 0.0)


def predicts_classes(model: nn.Module) -> bool:
    """Whether the model's outputs are logits, of tokens or of one of several labels."""
    if objective_of(model) or model.get_output_embeddings() is not None:
        return True
    return model.loss_type in LABELLED and gives_one_class(model)
