"""The record of a PEFT folder of ours: it stands in adapter_config.json, the one file that travels
with the tensors wherever PEFT takes them, with a digest of its own other fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsecraft.checkpoint import integrity
from sparsecraft.checkpoint.fields import ADAPTER_FIELDS, check_fields
from sparsecraft.checkpoint.folder import EXPORT_RECORD
from sparsecraft.checkpoint.jsonfile import json_digest, read_json, write_json
from sparsecraft.checkpoint.tensors import ADAPTER

TENSORS = ("adapter_model.safetensors", "adapter_model.bin")


def sign(folder: Path) -> None:
    """Write the record of an adapter that PEFT, or we, have just written."""
    config = read_json(folder / ADAPTER)
    tensors = integrity.entries(folder, TENSORS)
    write_json(folder / ADAPTER, config | {"files": {ADAPTER: own_entry(config), **tensors}})


def sign_new(folder: Path) -> None:
    """Sign the adapters of ours in a folder, and in those below it, that PEFT has just written:
    their configuration has a place for the record, and nothing in it."""
    for path in (folder / ADAPTER, *folder.glob(f"*/{ADAPTER}")):
        if path.is_file() and read_json(path).get("files", "none") is None:
            sign(path.parent)


def own_entry(config: dict[str, Any]) -> dict[str, Any]:
    """Of adapter_config.json itself: its fields but for the record."""
    fields = {key: value for key, value in config.items() if key != "files"}
    return {"bytes": len(json.dumps(fields)), "digest": json_digest(fields)}


def check(folder: Path) -> None:
    """Refuse a PEFT folder that is not as it was written, and what an export of ours put beside it.

    Raises:
        CheckpointError: names what has changed, and says how to accept it.
    """
    if found := changes(folder):
        raise integrity.edited(folder, found)


def changes(folder: Path) -> dict[str, str]:
    """File name -> in which way it is not as it was written; none in folders without a record."""
    config, found = read_json(folder / ADAPTER), {}
    check_fields(config, {"files": ADAPTER_FIELDS["files"]}, folder / ADAPTER)
    if files := config.get("files"):
        if files.get(ADAPTER) != own_entry(config):
            found[ADAPTER] = "has changed"
        tensors = {name: entry for name, entry in files.items() if name != ADAPTER}
        found |= integrity.changes(folder, tensors, TENSORS)
    if (folder / EXPORT_RECORD).is_file():
        found |= integrity.export_changes(folder, integrity.BESIDE)
    return found
