"""What a model has rows and classes for: the tokens and labels that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsecraft.errors import DataError


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one model.

    Attributes:
        tokens: rows of its embedding; None for a model that reads no tokens.
        classes: of a classifier; None for another model.
    """

    tokens: int | None = None
    classes: int | None = None

    @classmethod
    def of(cls, model: Any) -> Limits:
        """What a transformers model takes; everything, where None is given."""
        if model is None:
            return cls()
        try:
            table = model.get_input_embeddings()
        except NotImplementedError:  # speech and images
            table = None
        weight = getattr(table, "weight", None)
        tokens = weight.shape[0] if weight is not None and weight.ndim == 2 else None
        labelled = type(model).__name__.endswith("ForSequenceClassification")
        return cls(tokens, model.config.num_labels if labelled else None)

    def check(self, example: dict[str, Any], tokenizer: Any) -> None:
        """Refuse an encoded row that the model has no row or class for.

        Raises:
            DataError: which token or label.
        """
        labels = example["labels"]
        if not isinstance(labels, list):
            if self.classes is not None and labels >= self.classes:
                raise DataError(
                    f"the label {labels} is none of the model's, which has "
                    f"num_labels={self.classes}: labels are 0 to {self.classes - 1}"
                )
            labels = []
        largest = max(max(example["input_ids"], default=0), max(labels, default=0))
        if self.tokens is not None and largest >= self.tokens:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"the token {token!r} ({largest}) has no row in the model's embedding of "
                f"{self.tokens}: the tokenizer has {len(tokenizer)} tokens; call "
                "model.resize_token_embeddings(len(tokenizer)) before convert, or take the "
                "tokenizer that belongs to the model"
            )


def pad_id(tokenizer: Any, model: Any = None) -> int:
    """The id to pad with: the tokenizer's, else its end of text, else 0 (padding is masked).

    One that the model has no row for is passed over. A classifier finds the end of a text and T5
    the beginning of its labels by the padding of its own configuration: there that one comes first.
    """
    from sparsecraft.dense.loading import objective_of

    ids = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    if model is not None and objective_of(model) != "causal":
        ids.insert(0, getattr(model.config.get_text_config(), "pad_token_id", None))
    rows = Limits.of(model).tokens
    return next(i for i in ids if i is not None and 0 <= i < (rows or i + 1))
