"""What stands in a checkpoint folder beside the tensors, and how a folder takes its place."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from sparsecraft.errors import CheckpointError
from sparsecraft.layer import dense_tensors
from sparsecraft.origin import Origin
from sparsecraft.recipe import FORMAT_VERSION
from sparsecraft.surgery import conversion_of

MANIFEST = "recipe.json"
EXPORT_RECORD = "sparsecraft_export.json"

# Copied byte for byte from the base's folder, so that they travel unchanged.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.json",
    "additional_chat_templates",
    "*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)


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
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format_version", "recipe", "tensors"} <= set(manifest)


def write_companions(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """Tokenizer, chat template, generation settings and license, unchanged.

    They are copied from where the model came from, its checkpoint or the base's folder; generation
    settings that differ from those there are the model's own.
    """
    record = conversion_of(model)
    source = record.folder
    if source is None or not source.is_dir():
        origin = Origin.find(record.origin, record.revision)
        source = origin and origin.folder
    if source is not None:
        copy_companions(source, folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation != _generation_config(folder, model):
        generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, generation settings and license of `source`, byte for byte."""
    for path in (path for pattern in COMPANIONS for path in source.glob(pattern)):
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, folder / path.name)


def _generation_config(folder: Path, model: nn.Module) -> Any:
    """The generation settings in a folder, read as from_pretrained reads them; None if absent."""
    if not (folder / "generation_config.json").is_file():
        return None
    return type(model.generation_config).from_pretrained(folder)


def readme(model: nn.Module, origin: Origin | None) -> str:
    """The folder's README.md: base, license, certificate, how to load."""
    record = conversion_of(model)
    recipe = record.recipe
    report = record.report.get("conversion", {})
    name, license = record.base_card or ("a model built in memory", None)
    held = "" if origin else ", held in this folder"
    certificate = report.get("certificate")
    what = "layer output" if certificate and certificate.get("layers") else "logit"
    measured = (
        f"max |{what} difference| {certificate['max_difference']:.1e} at the start "
        f"(tolerance {certificate['tolerance']:.1e} in {certificate['dtype']})"
        if certificate
        else "not measured"
    )
    claim = (
        "starts as the dense model"
        if recipe.exact_at_start
        else "does not start as the dense model"
    )
    return f"""---
library_name: sparsecraft
license: {license or "other"}
---
# {recipe.name} ({recipe.variant})

{recipe.title}. {recipe.paper}.

- Base model: {name}{held}{f", revision {origin.revision}" if origin and origin.revision else ""}
- License of the base: {license or "unknown; see the base model"}
- Certificate: the recipe {claim}; measured: {measured}

```python
import sparsecraft as sc
model = sc.load("path/to/this/folder")
```
After `import sparsecraft`, transformers' `AutoModelFor....from_pretrained` reads the folder too.
"""


def json_digest(data: Any) -> str:
    """xxh3_128 of plain JSON data, whatever the order of its keys."""
    return f"xxh3_128:{xxhash.xxh3_128(json.dumps(data, sort_keys=True).encode()).hexdigest()}"


def write_json(path: Path, data: Any) -> None:
    """Write plain JSON data under a temporary name, then rename it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=2) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: it is missing, no JSON, or no object.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {data!r:.40}, no JSON object; save it again.")
    return data


def read_manifest(folder: Path) -> dict[str, Any]:
    """The contents of recipe.json, checked against its own digest.

    Raises:
        CheckpointError: it is missing, no JSON, of another format, or edited.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is no sparsecraft checkpoint: it has no {MANIFEST}.")
    manifest = read_json(path)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r} and this sparsecraft reads {FORMAT_VERSION}; "
            "upgrade sparsecraft."
        )
    claimed = manifest.pop("digest", None)
    if claimed != json_digest(manifest):
        raise CheckpointError(
            f"{path} was edited after it was written; undo the edit and pass the change as "
            "sc.load(dir, override={...}) instead."
        )
    return manifest


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def base_config(data: dict[str, Any]) -> Any:
    """The dense model's configuration out of our config.json."""
    from transformers import AutoConfig

    inner = dict(data["base_config"])
    inner.pop("quantization_config", None)  # the recipe's base_quantization says it
    return AutoConfig.for_model(inner.pop("model_type"), **inner)


def config_of(model: nn.Module) -> dict[str, Any]:
    """Our config.json."""
    inner = model.config.to_dict()
    inner["architectures"] = [type(model).__name__]
    inner.pop("_name_or_path", None)
    return {
        "model_type": "sparsecraft",
        "architectures": inner["architectures"],
        "dtype": word(base_dtype(model)),
        "base_config": inner,
    }


def base_dtype(model: nn.Module) -> torch.dtype:
    """Most common floating dtype of the dense tensors (trained parts may be float32 masters)."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in dense_tensors(model).values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=sizes.get)
