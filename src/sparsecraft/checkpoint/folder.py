"""A folder that is written under a temporary name and takes its own once all is there."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsecraft.errors import CheckpointError

MANIFEST = "recipe.json"
EXPORT_RECORD = "sparsecraft_export.json"

# What stands beside a model's weights, by what it belongs to.
TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja"),
    *("additional_chat_templates", "vocab*", "*vocab.json", "merges.txt", "bpe.codes", "*.model"),
    *("*.spm", "*.tiktoken", "dict.txt", "emoji.json", "byte_maps.json", "normalizer.json"),
    *("word_pronunciation.json", "word_shape.json", "tekken.json"),
)
PROCESSOR = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("audio_tokenizer_config.json", "chat_template.json"),
)
LEGAL = ("LICEN[CS]E*", "[Ll]icen[cs]e*", "NOTICE*", "[Nn]otice*", "COPYING*", "*USE_POLICY*")
GENERATION = "generation_config.json"

# Copied byte for byte from the base's folder, so that they travel unchanged.
COMPANIONS = (*TOKENIZER, *PROCESSOR, *LEGAL, GENERATION)

# What a checkpoint or an export of ours holds; anything else in a folder is the user's.
OWN = (
    *COMPANIONS,
    MANIFEST,
    EXPORT_RECORD,
    "moe.safetensors",
    "moe-*.safetensors",
    "moe.safetensors.index.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "extra_state.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "report.json",
    "config.json",
    "README.md",
)


@contextmanager
def replacing(
    out: Path, overwrite: bool, keep: tuple[str, ...] = (), foreign: bool = False
) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name once the block has succeeded.

    Files of the old folder that are not ours move into the new one.

    Args:
        keep: globs of old files that win over new ones.
        foreign: overwrite a folder that is no checkpoint or export of ours, too.

    Raises:
        CheckpointError: `out` exists and `overwrite` is False, or the disk refuses.
    """
    out = out.resolve()  # a link stays a link
    check_free(out, overwrite, foreign)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        swap(temporary, out, keep)
    except OSError as error:
        raise CheckpointError(
            f"{out} could not be written ({error}); nothing was changed."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def swap(new: Path, out: Path, keep: tuple[str, ...] = ()) -> None:
    """Let `new` take the place of `out`; a failure at any point leaves `out` as it was."""
    if not out.exists():
        new.rename(out)
        return
    ours = _ours(out)
    keep = keep if ours else (*keep, "README.md")
    for path in out.iterdir():
        stale = ours and _matches(path.name, OWN)
        if _matches(path.name, keep) or not (stale or (new / path.name).exists()):
            _copy(path, new / path.name)
    old = new.with_suffix(".old")
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _copy(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
        return
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)  # at no cost, where the disk can
    except OSError:
        shutil.copy2(path, target)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def check_free(out: Path, overwrite: bool, foreign: bool = False) -> None:
    """Raise CheckpointError unless `out` may be written, before any work is done."""
    out = out.resolve()
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; choose another folder or pass overwrite.")
    ours = out.is_dir() and (foreign or _ours(out) or not any(out.iterdir()))
    if out.exists() and not ours:
        raise CheckpointError(f"{out} exists and was not written by sparsecraft; it is left alone.")
    if out in (Path.cwd(), *Path.cwd().parents):
        raise CheckpointError(f"{out} is the current folder or holds it; choose another.")
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise CheckpointError(f"{out} cannot be written: {existing} is no writable folder.")


def _ours(folder: Path) -> bool:
    """Whether a folder is a checkpoint or an export of ours, which may be overwritten."""
    if (folder / EXPORT_RECORD).is_file():
        return True
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"format_version", "recipe", "tensors"} <= set(manifest)
