"""Tasks of lm-eval on a model in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from sparsecraft.data.sentences import Prompts
from sparsecraft.errors import SparsecraftError


def run_lm_eval(model: nn.Module, tokenizer: Any, tasks: Sequence[str], limit: int | None) -> dict:
    if Prompts.of(model) is not None:
        raise SparsecraftError(
            "lm-eval's tasks give no sentence to the model's routers, which decide by one; pass "
            "choice files instead."
        )
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise SparsecraftError(
            "lm-eval tasks need lm-eval: pip install 'sparsecraft[eval]'."
        ) from None
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer)
    results = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)["results"]
    return {  # a metric that does not apply is NaN there, which JSON does not have
        task: {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in m.items()
        }
        for task, m in results.items()
    }
