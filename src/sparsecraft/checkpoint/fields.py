"""What the JSON files of a checkpoint must hold: tables of their keys, and what each may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import torch

from sparsecraft.errors import CheckpointError
from sparsecraft.moe.routers.running import is_running


class Field(NamedTuple):
    """One key of a file.

    Attributes:
        fits: whether a value makes sense.
        words: what it must be.
        older: versions before this one did not write it, or PEFT does not.
    """

    fits: Callable[[Any], bool]
    words: str
    older: bool = False


def check_fields(data: Mapping[str, Any], fields: Mapping[str, Field], path: Path) -> None:
    """Refuse the contents of a file that lack a key, or have something else there.

    Raises:
        CheckpointError: so it is; the first such key is named.
    """
    for name, field in fields.items():
        if name not in data and not field.older:
            raise CheckpointError(f"{path} lacks {name!r}; save the model again.")
        if name in data and not field.fits(data[name]):
            raise CheckpointError(
                f"{path} has {name}={data[name]!r:.100}; it must be {field.words}. Save the model "
                "again."
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _is_base(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and _is_text(value.get("name"))
        and all(_is_text_or_none(value.get(key)) for key in ("revision", "subfolder", "variant"))
        and isinstance(value.get("quantization"), (dict, NoneType))
        and _is_text(value.get("fingerprint"))
        and _is_dtype(value.get("dtype"))
    )


def _is_dense(value: Any) -> bool:
    """Name -> dtype and digest, or None."""
    return value is None or (
        isinstance(value, dict)
        and all(isinstance(found, list) and len(found) == 2 for found in value.values())
        and all(_is_dtype(dtype) and _is_text(digest) for dtype, digest in value.values())
    )


def _is_resized(value: Any) -> bool:
    """Rows of the embedding before, and name -> shape before, or None."""
    if value is None:
        return True
    if not (isinstance(value, dict) and isinstance(value.get("vocabulary"), int)):
        return False
    shapes = value.get("shapes")
    lists = isinstance(shapes, dict) and all(isinstance(s, list) for s in shapes.values())
    return lists and all(isinstance(n, int) for shape in shapes.values() for n in shape)


def _is_files(value: Any) -> bool:
    """File name -> bytes and digest."""
    return isinstance(value, dict) and all(
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and _is_text(entry.get("digest"))
        for entry in value.values()
    )


def _is_shards(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_text, value.values())))


def _is_card(value: Any) -> bool:
    """Name, license and, since commits are remembered, commit of the base, or None."""
    is_list = isinstance(value, list) and len(value) in (2, 3)
    return value is None or (
        is_list and _is_text(value[0]) and all(_is_text_or_none(word) for word in value[1:])
    )


FILES = Field(_is_files, "bytes and digest of each file by its name", older=True)
BASE = Field(_is_base, "null, or name, revision, fingerprint and dtype of the dense model")

# recipe.json
MANIFEST_FIELDS = {
    "recipe": Field(_is_object, "the object that to_json wrote"),
    "base": BASE,
    "dense": Field(_is_dense, "null, or dtype and digest of each dense tensor by its name"),
    "resized": Field(
        _is_resized,
        "null, or vocabulary and shapes before the embeddings were resized",
        older=True,
    ),
    "tensors": Field(_is_text, "the digest of the tensors"),
    "config": Field(_is_text, "the digest of config.json"),
    "base_card": Field(_is_card, "null, or the base's name, license and commit", older=True),
    "running": Field(
        lambda value: value is None or is_running(value),
        "null, or stages, budget, calibration, rectified and imitates of the split networks",
        older=True,
    ),
    "shards": Field(_is_shards, "null, or each file's digest by its name", older=True),
    "files": FILES,
    "written_by": Field(_is_text, "save or save_pretrained", older=True),
}

# report.json; what it says in its entries is shown and not relied on
_ENTRIES = Field(
    lambda value: isinstance(value, list) and all(isinstance(entry, dict) for entry in value),
    "a list of objects",
    older=True,
)
_ENTRY = Field(_is_object, "an object", older=True)
REPORT_FIELDS = {
    **dict.fromkeys(("training", "extensions"), _ENTRIES),
    **dict.fromkeys(("conversion", "merge", "elsewhere", "import", "calibration"), _ENTRY),
}

# config.json
CONFIG_FIELDS = {
    "base_config": Field(
        lambda value: isinstance(value, dict) and _is_text(value.get("model_type")),
        "the dense model's configuration, with its model_type",
    ),
    "dtype": Field(_is_dtype, "the name of a torch dtype"),
}

# adapter_config.json, which PEFT writes
ADAPTER_FIELDS = {
    "recipe": Field(_is_object, "the object that to_json wrote"),
    "base_model_name_or_path": Field(_is_text_or_none, "null, or a folder or hub id", older=True),
    "revision": Field(_is_text_or_none, "null, or a revision on the hub", older=True),
    "files": Field(lambda value: value is None or _is_files(value), FILES.words, older=True),
}

# sparsecraft_export.json
EXPORT_FIELDS = {"base": BASE._replace(older=True), "files": FILES}
