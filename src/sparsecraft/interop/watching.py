"""What transformers and PEFT write into a folder of ours, its record says; what they read of one is
checked. Each function here wraps one of theirs; `doors` and `interop.peft` put them in its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
# What transformers and PEFT call the folder of an adapter.
NAMES = ("model_id", "peft_model_id", "pretrained_model_name_or_path")


def recorded(theirs: Callable) -> Callable:
    """`save_pretrained` of a tokenizer, a processor or generation settings: its caller means the
    new files. Trainer is one, which saves the tokenizer right after the model."""

    @functools.wraps(theirs)
    def save_pretrained(self, save_directory, *args, **kwargs):
        from sparsecraft.checkpoint.integrity import rewriting

        with rewriting(Path(save_directory)):
            return theirs(self, save_directory, *args, **kwargs)

    return save_pretrained


def signed(theirs: Callable) -> Callable:
    """`save_pretrained` of a model that may hold adapters of ours."""

    @functools.wraps(theirs)
    def save_pretrained(self, save_directory, *args, **kwargs):
        from sparsecraft.checkpoint.adapter_record import sign_new

        found = theirs(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            sign_new(Path(save_directory))
        return found

    return save_pretrained


def checked(theirs: Callable, at: int = 0) -> Callable:
    """What reads an adapter's folder: `load_adapter` and `from_pretrained`.

    Args:
        at: the place of the folder's name among the arguments, after the first.
    """

    @functools.wraps(theirs)
    def reading(self, *args, **kwargs):
        from sparsecraft.checkpoint.adapter_record import check

        names = (*args[at : at + 1], *(kwargs[word] for word in NAMES if word in kwargs))
        folder = Path(str(next(iter(names), "")), kwargs.get("subfolder") or "")
        here = (folder / CONFIG).is_file()
        if here:
            check(folder)
        found = theirs(self, *args, **kwargs)
        if names and not here and (fetched := _fetched(names[0], kwargs)):
            check(fetched)
        return found

    return reading


def sound(theirs: Callable) -> Callable:
    """`load_sharded_checkpoint`, by which Trainer takes back the best model or goes on from one."""

    @functools.wraps(theirs)
    def load_sharded_checkpoint(model, folder, *args, **kwargs):
        from sparsecraft.checkpoint.manifest import check_whole
        from sparsecraft.interop.reading import our_folder

        if our_folder(folder):
            check_whole(Path(folder))
        return theirs(model, folder, *args, **kwargs)

    return load_sharded_checkpoint


def _fetched(name: Any, kwargs: dict[str, Any]) -> Path | None:
    """Where the hub's cache has an adapter that was just fetched, or was there."""
    from huggingface_hub import try_to_load_from_cache

    place = {key: kwargs[key] for key in ("cache_dir", "revision") if kwargs.get(key)}
    file = "/".join(filter(None, (kwargs.get("subfolder"), CONFIG)))
    found = try_to_load_from_cache(str(name), file, **place)
    return Path(found).parent if isinstance(found, str) else None
