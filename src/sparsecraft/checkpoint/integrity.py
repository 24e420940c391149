"""The record of a folder: a digest of every file that changes what its model does or what we say of
it, written last and compared whenever the folder is read.

It stands under `files` in recipe.json, sparsecraft_export.json and adapter_config.json: file name,
bytes and digest. README.md and licenses are the user's to edit and have none. Of tensors the
content counts, of text not how its lines end, of our own JSON not how it is spaced: what git or a
copy makes of them is the same file.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from sparsecraft.checkpoint import tensorfile
from sparsecraft.checkpoint.fields import EXPORT_FIELDS, check_fields
from sparsecraft.checkpoint.folder import EXPORT_RECORD, GENERATION, MANIFEST, PROCESSOR, TOKENIZER
from sparsecraft.checkpoint.jsonfile import json_digest, read_json, write_json
from sparsecraft.checkpoint.resumable import EXTRA
from sparsecraft.dense.digests import combine
from sparsecraft.errors import CheckpointError

log = logging.getLogger("sparsecraft")

REPORT, INDEX = "report.json", "*.safetensors.index.json"

# What transformers reads beside a model, and writes by calls of its own.
BESIDE = (*TOKENIZER, *PROCESSOR, GENERATION)

# Of an adapter that stands on a checkpoint, in the same folder: transformers loads both as one.
ADAPTERS = ("adapter_config.json",)

# What a checkpoint's record holds: recipe.json has digests of itself, config.json and tensors.
OF_CHECKPOINT = (*BESIDE, REPORT, INDEX, EXTRA, *ADAPTERS)
OF_EXPORT = (*BESIDE, "config.json", "model*.safetensors", INDEX)
OF_PEFT_EXPORT = BESIDE

TEMPLATES = "additional_chat_templates"  # the one folder of them

# Copies that editors leave, which nothing reads.
SPARE = ("*~", "*.bak", "*.orig", "*.swp", "*.tmp")

Files = Mapping[str, Mapping[str, Any]]


def entries(folder: Path, patterns: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """File name -> bytes and digest of all files in a folder that match one of the patterns.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    return {name: entry_of(folder / name) for name in sorted(_names(folder, patterns))}


def entry_of(path: Path) -> dict[str, Any]:
    """Bytes and digest of one file."""
    if path.suffix == ".safetensors":
        digests = tensorfile.read_digests(path)
        return {"bytes": path.stat().st_size, "digest": combine(digests)}
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from None
    text = data if b"\0" in data else data.replace(b"\r\n", b"\n")
    ours = _matches(path.name, (REPORT, INDEX))
    digest = json_digest(read_json(path)) if ours else _of_bytes(text)
    return {"bytes": len(text), "digest": digest}


def digest_of_file(path: Path) -> str:
    """Of the bytes of a file of any size; a sentence, which no digest equals, if it is not read."""
    state = xxhash.xxh3_128()
    try:
        with open(path, "rb") as file:
            while block := file.read(tensorfile.BLOCK):
                state.update(block)
    except OSError as error:
        return f"cannot be read ({error})"
    return f"xxh3_128:{state.hexdigest()}"


def changes(folder: Path, files: Files, patterns: tuple[str, ...]) -> dict[str, str]:
    """File name -> in which way the file is not the one of the record.

    Raises:
        CheckpointError: a file cannot be read.
    """
    here, found = _names(folder, patterns), {}
    for name in sorted(here | files.keys()):
        if name not in here:
            found[name] = "is missing"
        elif name not in files:
            found[name] = "is new"
        elif (now := entry_of(folder / name))["digest"] != files[name]["digest"]:
            found[name] = f"has changed ({_sizes(files[name]['bytes'], now['bytes'])})"
    return found


def check(
    folder: Path, files: Files, patterns: tuple[str, ...], free: tuple[str, ...] = ()
) -> None:
    """Refuse a folder that is not as its record says.

    Args:
        free: patterns of files that may have changed, which a warning says.

    Raises:
        CheckpointError: names what has changed, and says how to accept it.
    """
    found = changes(folder, files, patterns)
    if held := {n: word for n, word in found.items() if not _matches(_top(n), free)}:
        raise edited(folder, held)
    if found:
        log.warning(
            f"Beside the model in {folder} is not what it was saved with: {listed(found)}; "
            f"{accepting(folder)}"
        )


def edited(folder: Path, found: Mapping[str, str]) -> CheckpointError:
    """The error of a folder that is not as it was written."""
    return CheckpointError(
        f"{folder} is not as it was written: {listed(found)}; copy or save it again, or "
        f"{accepting(folder)}"
    )


def listed(found: Mapping[str, str]) -> str:
    shown = [f"{name} {word}" for name, word in list(found.items())[:5]]
    return ", ".join(shown) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def accepting(folder: Path) -> str:
    """The end of a sentence about what was edited."""
    return (
        f"accept it, if it was meant: sparsecraft inspect {folder} --accept-edits "
        "(sparsecraft.checkpoint.edits.accept_edits)."
    )


def signed(data: dict[str, Any]) -> dict[str, Any]:
    """The data of recipe.json or sparsecraft_export.json with the digest of itself, last."""
    data = {key: value for key, value in data.items() if key != "digest"}
    return {**data, "digest": json_digest(data)}


@contextmanager
def rewriting(folder: Path) -> Iterator[None]:
    """Let the record of a folder follow what the block writes beside the model: it is transformers'
    own `save_pretrained` of a tokenizer, a processor or generation settings."""
    holder = next((h for h in (MANIFEST, EXPORT_RECORD) if (folder / h).is_file()), None)
    before = entries(folder, BESIDE) if holder else {}
    yield
    if holder:
        after = entries(folder, BESIDE)
        written = {name: entry for name, entry in after.items() if before.get(name) != entry}
        with suppress(CheckpointError):  # a damaged record; loading will say it
            _record(folder / holder, written, before.keys() - after.keys())


def _record(path: Path, written: Files, gone: set[str]) -> None:
    """Put what was written into the record; what had changed before stays as the record has it."""
    data = read_json(path)
    if not (written or gone) or "files" not in data or signed(data) != data:
        return  # nothing to do, an older folder, or one that was edited
    files = {name: entry for name, entry in data["files"].items() if name not in gone}
    write_json(path, signed(data | {"files": dict(sorted({**files, **written}.items()))}))


def _names(folder: Path, patterns: tuple[str, ...]) -> set[str]:
    """The regular files that match, and those in a folder of templates; pipes are none."""
    paths = [*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")]
    names = (path.relative_to(folder).as_posix() for path in paths if path.is_file())
    return {n for n in names if _matches(_top(n), patterns) and not _matches(n, SPARE)}


def _top(name: str) -> str:
    return name.partition("/")[0]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _of_bytes(data: bytes) -> str:
    return f"xxh3_128:{xxhash.xxh3_128(data).hexdigest()}"


def _sizes(then: int, now: int) -> str:
    return "as many bytes as before" if then == now else f"{now:,} bytes, {then:,} before"


def export_changes(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    """File name -> in which way an export of ours is not as it was written, its record included;
    nothing of one without digests.

    Raises:
        CheckpointError: the record is no JSON, or has something else in the place of digests.
    """
    record = read_json(folder / EXPORT_RECORD)
    check_fields(record, EXPORT_FIELDS, folder / EXPORT_RECORD)
    if "files" not in record:
        return {}
    own = {} if signed(record) == record else {EXPORT_RECORD: "has changed"}
    return own | changes(folder, record["files"], patterns)


def warn_of_changes(folder: Path, how: str) -> None:
    """Say which files of an export or a merge are not as it was written.

    Args:
        how: what becomes of it all the same, such as "read".
    """
    if (folder / EXPORT_RECORD).is_file() and (found := export_changes(folder, OF_EXPORT)):
        log.warning(
            f"{folder} was exported by sparsecraft and is {how} as it is now, of which "
            f"{EXPORT_RECORD} says nothing: {listed(found)}; {accepting(folder)}"
        )


def edited_files(report: Mapping[str, Any]) -> list[str]:
    """The files that were edited by hand, as a report or the record of an export names them."""
    found = report.get("edited")
    return [str(name) for name in found] if isinstance(found, list) else []
