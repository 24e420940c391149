"""A text of the reader's own, token by token, with the first expert of each in every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsecraft.errors import DataError
from sparsecraft.evaluation.analysis.watching import decisions
from sparsecraft.evaluation.held_out import length_of
from sparsecraft.evaluation.routing import ordered_choices


@torch.no_grad()
def read(model: nn.Module, tokenizer: Any, text: str, max_length: int | None) -> dict[str, Any]:
    """Of as many tokens as `evaluate` takes: `tokens`, and `first`: layer -> the first expert of
    every token, None where it has none.

    Raises:
        DataError: the text has no token.
    """
    ids = tokenizer(text)["input_ids"][: length_of(model, max_length)]
    if not ids:
        raise DataError("text holds no token; give a few words.")
    with decisions(model) as decided:
        model(input_ids=torch.tensor([ids], device=model.device))
    first = {}
    for name, routing in decided.items():
        if len(routing.logits_TE) == len(ids):
            chosen = ordered_choices(routing)[0].tolist()
            first[name] = [e if e < routing.num_experts else None for e in chosen]
    return {"tokens": [tokenizer.decode([token]) for token in ids], "first": first}


def word_of(tokenizer: Any, token: int) -> str:
    """A token as text, white space as Python writes it; its name in the vocabulary where it is a
    part of a letter."""
    text = tokenizer.decode([token])
    if text and not text.strip():
        return repr(text)
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))
