"""Accept what a user has edited in a folder: check that it loads, and write its record anew.

What was measured before an edit was not measured of what is there now: the report, or the record of
an export, names every file that was edited by hand from then on (`edited`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from sparsecraft.checkpoint import adapter_record, integrity, shards, tensorfile
from sparsecraft.checkpoint.adapter import WEIGHTS as WEIGHTS_OF_ADAPTER
from sparsecraft.checkpoint.adapter import load_adapter
from sparsecraft.checkpoint.folder import EXPORT_RECORD, GENERATION, MANIFEST
from sparsecraft.checkpoint.integrity import (
    OF_CHECKPOINT,
    OF_EXPORT,
    REPORT,
    edited_files,
    entry_of,
    signed,
)
from sparsecraft.checkpoint.jsonfile import differences, json_digest, read_json, write_json
from sparsecraft.checkpoint.load import read
from sparsecraft.checkpoint.manifest import parsed_manifest, with_all_fields
from sparsecraft.checkpoint.tensors import ADAPTER, WEIGHTS
from sparsecraft.dense import hub
from sparsecraft.dense.cache import snapshot_in
from sparsecraft.dense.loading import load_tokenizer
from sparsecraft.dense.sound import check_weight, check_weights
from sparsecraft.errors import CheckpointError, first_line
from sparsecraft.surgery.record import conversion_of

SHOWN = 5  # values of one file


def accept_edits(folder: str | Path, base: str | None = None) -> dict[str, str]:
    """Let a folder of ours be as it is now: check that it loads, and write its digests anew.

    Args:
        folder: a checkpoint, a PEFT folder or an export.
        base: as in `sc.load`, by which the folder is checked.

    Returns:
        File name -> how it was edited, in words; empty if nothing was. The report names these files
        from then on, so that what was measured before is not shown as measured.

    Raises:
        CheckpointError: the folder cannot be loaded as it is, or cannot be written; nothing has
            changed.
    """
    folder = Path(folder).expanduser()
    _check_own(folder)
    try:
        if (folder / MANIFEST).is_file():
            return _of_checkpoint(folder, base)
        return _of_adapter(folder, base) if (folder / ADAPTER).is_file() else _of_export(folder)
    except Exception as error:  # each class of transformers reads in its own way
        raise CheckpointError(
            f"The edits in {folder} were not accepted: {first_line(error)}"
        ) from None


def _check_own(folder: Path) -> None:
    """Refuse a folder that is none of ours, or not the user's to write."""
    if not any((folder / name).is_file() for name in (MANIFEST, ADAPTER, EXPORT_RECORD)):
        raise CheckpointError(f"{folder} is no checkpoint, PEFT folder or export of sparsecraft.")
    if snapshot_in(folder.absolute()) is not None:
        raise CheckpointError(
            f"{folder} lies in the hub's cache, which is not to be written by hand; copy the "
            "folder and accept the edits in the copy."
        )
    if not os.access(folder, os.W_OK):
        raise CheckpointError(
            f"{folder} cannot be written; copy it and accept the edits in the copy."
        )


def _marked(report: dict[str, Any], found: Mapping[str, str]) -> dict[str, Any]:
    return report | {"edited": sorted({*edited_files(report), *found})}


def _of_checkpoint(folder: Path, base: str | None) -> dict[str, str]:
    manifest, claimed = parsed_manifest(folder)
    with_all_fields(manifest, folder / MANIFEST)
    config, files = read_json(folder / "config.json"), manifest.get("files")
    now = {"config": json_digest(config), "tensors": shards.digest(folder / WEIGHTS)}
    found = {MANIFEST: "has changed"} if claimed != json_digest(manifest) else {}
    if now["config"] != manifest["config"]:
        found["config.json"] = "has changed"
    if now["tensors"] != manifest["tensors"]:
        found |= shards.changed(folder / WEIGHTS, manifest.get("shards"))
    found |= {} if files is None else integrity.changes(folder, files, OF_CHECKPOINT)
    if not found:
        return {}
    manifest |= now
    if "shards" in manifest:
        paths = shards.files_of(folder / WEIGHTS)
        manifest["shards"] = {path.name: entry_of(path)["digest"] for path in paths}
    record = conversion_of(read(folder, manifest, base))
    record.next_stage()  # reads the report
    _check_settings(folder)
    if record.base and files:
        found |= _since_base(folder, record.base.folder, files, found)
    write_json(folder / REPORT, _marked(read_json(folder / REPORT), found))
    manifest["files"] = integrity.entries(folder, OF_CHECKPOINT)
    write_json(folder / MANIFEST, signed(manifest))
    return found


def _since_base(
    folder: Path, base: Path, files: integrity.Files, found: Mapping[str, str]
) -> dict[str, str]:
    """What has changed in JSON files that had been the base's own, which the base still has."""
    said = {}
    for name, word in found.items():
        if name.endswith(".json") and name in files and (base / name).is_file():
            same = entry_of(base / name)["digest"] == files[name]["digest"]
            if same and (folder / name).is_file():
                pairs = differences(read_json(base / name), read_json(folder / name))
                values = [f"{key} from {then!r:.40} to {now!r:.40}" for key, then, now in pairs]
                said[name] = f"{word}: {', '.join(values[:SHOWN])}"
    return said


def _of_adapter(folder: Path, base: str | None) -> dict[str, str]:
    if not (found := adapter_record.changes(folder)):
        return {}
    if read_json(folder / ADAPTER).get("modules_to_save"):  # PEFT loads such, and we do not
        for name, tensor in tensorfile.read(folder / WEIGHTS_OF_ADAPTER):
            check_weight(name, tensor, folder, CheckpointError)
    else:
        load_adapter(folder, base, None, None, None)
    _check_settings(folder)
    _sign_export(folder, integrity.OF_PEFT_EXPORT, found)
    adapter_record.sign(folder)
    return found


def _of_export(folder: Path) -> dict[str, str]:
    if not (found := integrity.export_changes(folder, OF_EXPORT)):
        return {}
    check_weights(hub.load_dense(str(folder)), CheckpointError)
    _check_settings(folder)
    _sign_export(folder, OF_EXPORT, found)
    return found


def _sign_export(folder: Path, patterns: tuple[str, ...], found: Mapping[str, str]) -> None:
    path = folder / EXPORT_RECORD
    if path.is_file() and "files" in (record := read_json(path)):
        files = integrity.entries(folder, patterns)
        write_json(path, signed(_marked(record, found) | {"files": files}))


def _check_settings(folder: Path) -> None:
    """Refuse a tokenizer or generation settings that cannot be read."""
    load_tokenizer(folder)
    if (folder / GENERATION).is_file():
        GenerationConfig.from_pretrained(folder)
