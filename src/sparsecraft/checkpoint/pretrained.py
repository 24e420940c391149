"""save_pretrained of a converted model, which writes our checkpoint, and push_to_hub through it.

transformers' own would write a configuration of the dense model and tensors that it does not know:
a folder that loads with random experts and a warning. Whatever hands a converted model to its
user calls `writes_ours`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.utils.hub import convert_file_size_to_int

from sparsecraft.checkpoint import shards
from sparsecraft.checkpoint.folder import COMPANIONS, GENERATION
from sparsecraft.checkpoint.gathering import whole_tensors
from sparsecraft.checkpoint.pushing import push_to_hub
from sparsecraft.checkpoint.save import save
from sparsecraft.dense.sharing import is_sharded
from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.decoding.generate import generates_fast
from sparsecraft.surgery.identity import stands_nowhere


def writes_ours(model: nn.Module) -> None:
    """Let `model.save_pretrained`, and all that calls it, write our checkpoint, let `generate` be
    fast, and let the model bear its base's name no more."""
    model.save_pretrained = functools.partial(save_pretrained, model)
    model.push_to_hub = functools.partial(push_to_hub, model)
    generates_fast(model)
    stands_nowhere(model)


# What transformers' own takes and what changes nothing about a checkpoint of ours.
IGNORED = frozenset(
    "safe_serialization save_function save_original_format save_peft_format token".split()
)
OURS = frozenset({"standalone", "tokenizer"})


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    *,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str = shards.SHARD_SIZE,
    **kwargs: Any,
) -> None:
    """What `model.save_pretrained` does once the model is converted: write our checkpoint, from
    which transformers' Trainer can go on too. Adapters that PEFT has put into the model
    (`add_adapter`) are written alone, as transformers does."""
    if getattr(model, "_hf_peft_config_loaded", False):
        given = {"is_main_process": is_main_process, "state_dict": state_dict, **kwargs}
        type(model).save_pretrained(model, save_directory, **given)
        return
    given = {name for name, value in kwargs.items() if value not in (None, False)}
    if unknown := sorted(given - OURS - IGNORED):
        raise SparsecraftError(
            f"save_pretrained of a converted model does not take {', '.join(unknown)}; leave that "
            "out or use sc.save(model, dir), and call model.push_to_hub(repo_id) to upload it."
        )
    if not is_main_process:
        if state_dict is None and is_sharded(model):
            whole_tensors(model)  # the process that writes waits for this one's part
        return
    chosen = {name: kwargs[name] for name in OURS & given}
    # As in transformers: into a folder of the user's too, beside a tokenizer saved before.
    keep = () if "tokenizer" in chosen else tuple(c for c in COMPANIONS if c != GENERATION)
    size = convert_file_size_to_int(max_shard_size)
    chosen |= {"state_dict": state_dict, "shard_size": size, "resumable": True}
    save(model, save_directory, overwrite=True, keep=keep, **chosen)
