"""What `load_any` is going to load, known before its weights are read, which takes long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsecraft.checkpoint import adapter_record, shards
from sparsecraft.checkpoint.adapter import base_of, read_config
from sparsecraft.checkpoint.base import find_base
from sparsecraft.checkpoint.claim import bring_back
from sparsecraft.checkpoint.folder import MANIFEST
from sparsecraft.checkpoint.jsonfile import read_json
from sparsecraft.checkpoint.load import check_has_recipe
from sparsecraft.checkpoint.manifest import base_config, checked_manifest
from sparsecraft.checkpoint.tensors import ADAPTER, WEIGHTS
from sparsecraft.dense import hub
from sparsecraft.dense.bounds import bounded
from sparsecraft.dense.door import build
from sparsecraft.dense.loading import load_tokenizer, model_class, skeleton
from sparsecraft.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Preview:
    """A model that can be loaded, as far as that is known before.

    Attributes:
        folder: where it is.
        base: what `load_any` is to be given with it: None for one that stands on no base.
        dense: the dense model that it is or stands on, without memory.
        tokenizer: its own, or its base's; None without one.
    """

    folder: Path
    base: str | None
    dense: nn.Module
    tokenizer: Any


def preview(name: str, base: str | None = None) -> Preview:
    """Look at a checkpoint folder, or at a dense model by name.

    Args:
        base: as in `load`, for those that stand on one.

    Raises:
        CheckpointError: as `load_any`, but for what is wrong inside of the weights.
        HubError: the same.
    """
    folder = Path(name).expanduser()
    bring_back(folder)
    if not (folder / MANIFEST).is_file():
        if (folder / ADAPTER).is_file():
            return _of_adapter(folder, base)
        folder = hub.resolve(name)
    if not (folder / MANIFEST).is_file():
        check_has_recipe(folder)
        return Preview(folder, None, skeleton(folder), load_tokenizer(folder))
    manifest, extent = checked_manifest(folder), shards.extent(folder / WEIGHTS)
    base = base if manifest["base"] else None
    origin = find_base(folder, manifest["base"], base)
    if origin is not None:
        return Preview(folder, base, skeleton(origin.folder), load_tokenizer(folder))
    data = read_json(folder / "config.json")
    cls, config, dtype = model_class(data["base_config"]), base_config(data), data["dtype"]
    with bounded(*extent, folder, CheckpointError), torch.device("meta"):
        dense = build(cls, config, folder, CheckpointError, dtype=getattr(torch, dtype))
    return Preview(folder, None, dense, load_tokenizer(folder))


def _of_adapter(folder: Path, base: str | None) -> Preview:
    config = read_config(folder)
    adapter_record.check(folder)
    origin, _ = base_of(folder, config, base)
    tokenizer = load_tokenizer(folder) or load_tokenizer(origin.folder)
    return Preview(folder, base, skeleton(origin.folder), tokenizer)
