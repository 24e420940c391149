"""recipe.json and config.json of a checkpoint: what they say, read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsecraft.checkpoint import integrity, shards
from sparsecraft.checkpoint.claim import bring_back
from sparsecraft.checkpoint.fields import MANIFEST_FIELDS, check_fields
from sparsecraft.checkpoint.folder import MANIFEST
from sparsecraft.checkpoint.jsonfile import json_digest, read_json
from sparsecraft.checkpoint.tensors import WEIGHTS
from sparsecraft.dense.door import build_config
from sparsecraft.dense.loading import class_of
from sparsecraft.errors import CheckpointError, RecipeError
from sparsecraft.moe.names import dense_tensors
from sparsecraft.recipe.formats import check_format, from_json
from sparsecraft.recipe.overrides import override
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.record import conversion_of, is_converted

NOTHING = "nothing that transformers reads alone; import sparsecraft first"


def checked_manifest(folder: Path) -> dict[str, Any]:
    """The contents of recipe.json, once all files that it has digests of are as they were written,
    but for configuration and tensors, which are checked where they are read.

    Raises:
        CheckpointError: as `read_manifest`; or a file was changed, added or lost.
    """
    manifest = read_manifest(folder)
    if "files" in manifest:
        # By transformers' custom a tokenizer comes by a call of its own, before or after the model.
        free = integrity.BESIDE if manifest.get("written_by") == "save_pretrained" else ()
        free = (*free, *integrity.ADAPTERS)
        integrity.check(folder, manifest["files"], integrity.OF_CHECKPOINT, free)
    return manifest


def check_whole(folder: Path) -> None:
    """Refuse a checkpoint of which anything is not as it was written, before others read of it.

    Raises:
        CheckpointError: so it is, or something is missing.
    """
    manifest = checked_manifest(folder)
    if manifest["config"] != json_digest(read_json(folder / "config.json")):
        raise integrity.edited(folder, {"config.json": "has changed"})
    if manifest["tensors"] != shards.digest(folder / WEIGHTS):
        changed = shards.changed(folder / WEIGHTS, manifest.get("shards"))
        raise integrity.edited(folder, changed)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The contents of recipe.json, checked against its own digest.

    Raises:
        CheckpointError: it is missing, no JSON, of another format, edited, or lacks something.
    """
    manifest, claimed = parsed_manifest(folder)
    if claimed != json_digest(manifest):
        raise CheckpointError(
            f"{folder / MANIFEST} was edited after it was written; undo the edit and pass the "
            f"change as sc.load(dir, override={{...}}) instead, or {integrity.accepting(folder)}"
        )
    return with_all_fields(manifest, folder / MANIFEST)


def parsed_manifest(folder: Path) -> tuple[dict[str, Any], Any]:
    """The contents of recipe.json of a known format, and the digest that it has of them."""
    bring_back(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is no sparsecraft checkpoint: it has no {MANIFEST}.")
    manifest = read_json(path)
    try:
        check_format(manifest.get("format_version"), str(path))
    except RecipeError as error:
        raise CheckpointError(str(error)) from None
    claimed = manifest.pop("digest", None)
    return manifest, claimed


def with_all_fields(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """The contents of recipe.json, if each field is there and of its type.

    Raises:
        CheckpointError: it is not.
    """
    check_fields(manifest, MANIFEST_FIELDS, path)
    if manifest["base"] is None and manifest["dense"] is None:
        raise CheckpointError(
            f"{path} has neither base nor dense, the digests of a base that the folder itself "
            "holds; save the model again."
        )
    return manifest


def read_recipe(data: dict[str, Any], changes: dict[str, Any] | None) -> tuple[Recipe, Recipe]:
    """The recipe that a file holds, and the same with what the user changes of it.

    Raises:
        RecipeError: a newer format, an unknown field, or an impossible change.
    """
    saved = from_json(data)
    return saved, override(saved, changes or {})


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def base_config(data: dict[str, Any]) -> Any:
    """The dense model's configuration out of our config.json."""
    inner = dict(data["base_config"])
    inner.pop("quantization_config", None)  # the recipe's backbone says it
    if inner.get("transformers_weights") == NOTHING:
        inner.pop("transformers_weights")
    return build_config(inner, "The base_config of config.json", CheckpointError)


def config_of(model: nn.Module) -> dict[str, Any]:
    """Our config.json."""
    inner = model.config.to_dict()
    inner["architectures"] = [class_of(model).__name__]
    inner.pop("_name_or_path", None)
    # Where our classes are not known, transformers stops at this and says it. The dense class looks
    # for a configuration of its own type inside ours.
    if not inner.get("transformers_weights"):  # else the base's file, which our folder lacks
        inner["transformers_weights"] = NOTHING
    return {
        "model_type": "sparsecraft",
        "architectures": inner["architectures"],
        "dtype": word(base_dtype(model)),
        "transformers_weights": NOTHING,
        "base_config": inner,
    }


def base_dtype(model: nn.Module) -> torch.dtype:
    """Most common floating dtype of the dense tensors of a dense or converted model, whatever
    training holds in float32."""
    before = conversion_of(model).types_of_masters if is_converted(model) else {}
    sizes: dict[torch.dtype, int] = {}
    for name, tensor in dense_tensors(model).items():
        if tensor.is_floating_point():
            dtype = before.get(name, tensor.dtype)
            sizes[dtype] = sizes.get(dtype, 0) + tensor.numel()
    return max(sizes, key=sizes.get)
