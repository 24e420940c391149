"""What stands in a folder of ours, and whether one may be written."""

from __future__ import annotations

import os
from pathlib import Path

from sparsecraft.checkpoint.claim import temporary
from sparsecraft.dense.jsonfile import read_object
from sparsecraft.errors import CheckpointError, first_line

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


LONGEST_NAME = 255  # bytes, on all usual file systems


def resolved(out: str | Path) -> Path:
    """The folder that a link stands for, so that the link stays one.

    Raises:
        CheckpointError: links that stand for each other.
    """
    try:
        return Path(out).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{out} cannot be written ({first_line(error)}); choose another."
        ) from None


def check_free(out: str | Path, overwrite: bool, foreign: bool = False) -> None:
    """Raise CheckpointError unless `out` may be written, before any work is done."""
    out = resolved(out)
    try:
        _check_free(out, overwrite, foreign)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written ({error.strerror}); choose another."
        ) from None


def _check_free(out: Path, overwrite: bool, foreign: bool) -> None:
    there = os.path.lexists(out)
    if there and not overwrite:
        raise CheckpointError(f"{out} exists already; choose another folder or pass overwrite.")
    ours = out.is_dir() and (foreign or is_ours(out) or not any(out.iterdir()))
    if there and not ours:
        raise CheckpointError(f"{out} exists and was not written by sparsecraft; it is left alone.")
    if out in (Path.cwd(), *Path.cwd().parents):
        raise CheckpointError(f"{out} is the current folder or holds it; choose another.")
    existing = next(path for path in out.parents if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise CheckpointError(f"{out} cannot be written: {existing} is no writable folder.")
    if len(os.fsencode(temporary(out).name)) + len("0000000") > LONGEST_NAME:
        raise CheckpointError(
            f"The name {out.name[:40]!r}... is too long for the names beside it; choose a shorter."
        )


def is_ours(folder: Path) -> bool:
    """Whether a folder is a checkpoint or an export of ours, which may be overwritten."""
    if (folder / EXPORT_RECORD).is_file():
        return True
    try:
        manifest = read_object(folder / MANIFEST, CheckpointError)
    except CheckpointError:
        return False
    return {"format_version", "recipe", "tensors"} <= set(manifest)
