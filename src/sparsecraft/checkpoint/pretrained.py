"""save_pretrained of a converted model, which writes our checkpoint.

transformers' own would write a configuration of the dense model and tensors that it does not know:
a folder that loads with random experts and a warning. Whatever hands a converted model to its
user calls `writes_ours`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn

from sparsecraft.checkpoint.folder import COMPANIONS, GENERATION
from sparsecraft.checkpoint.save import save
from sparsecraft.errors import SparsecraftError


def writes_ours(model: nn.Module) -> None:
    """Let `model.save_pretrained`, and all that calls it, write our checkpoint."""
    model.save_pretrained = functools.partial(save_pretrained, model)


def save_pretrained(model: nn.Module, save_directory: str | Path, **kwargs: Any) -> None:
    """What `model.save_pretrained` does once the model is converted: write our checkpoint."""
    ours = {"standalone", "tokenizer"}
    # What transformers' own takes and what changes nothing about a checkpoint of ours.
    ignored = {
        "is_main_process",
        "safe_serialization",
        "max_shard_size",
        "save_peft_format",
        "token",
    }
    given = {name for name, value in kwargs.items() if value not in (None, False)}
    if unknown := sorted(given - ours - ignored):
        raise SparsecraftError(
            f"save_pretrained of a converted model does not take {', '.join(unknown)}; "
            "use sc.save(model, dir)."
        )
    if kwargs.get("is_main_process", True):
        chosen = {name: kwargs[name] for name in ours & given}
        # As in transformers: into a folder of the user's too, beside a tokenizer saved before.
        keep = () if "tokenizer" in chosen else tuple(c for c in COMPANIONS if c != GENERATION)
        save(model, save_directory, overwrite=True, keep=keep, **chosen)
