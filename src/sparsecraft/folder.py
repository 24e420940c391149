"""What stands in a checkpoint folder beside the tensors, and how a folder takes its place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from torch import nn

from sparsecraft import hub
from sparsecraft.errors import CheckpointError
from sparsecraft.origin import Origin
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
    "*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)


@contextmanager
def replacing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name once the block has succeeded.

    Raises:
        CheckpointError: `out` exists and `overwrite` is False.
    """
    check_free(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            retired = out.with_name(f".{out.name}.{os.getpid()}.old")
            out.rename(retired)
            try:
                temporary.rename(out)
            except BaseException:
                retired.rename(out)
                raise
            shutil.rmtree(retired)
        else:
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(out: Path, overwrite: bool) -> None:
    """Raise CheckpointError unless `out` may be written."""
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; choose another folder or pass overwrite.")
    if out.exists() and not (out.is_dir() and (_ours(out) or not any(out.iterdir()))):
        raise CheckpointError(f"{out} exists and was not written by sparsecraft; it is left alone.")


def _ours(folder: Path) -> bool:
    """Whether a folder is a checkpoint or an export of ours, which may be overwritten."""
    return (folder / MANIFEST).is_file() or (folder / EXPORT_RECORD).is_file()


def write_companions(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """Tokenizer, chat template, generation settings and license, unchanged.

    They are copied from where the model came from: its checkpoint, or the base's folder.
    """
    record = conversion_of(model)
    origin = Origin.find(record.origin, record.revision)
    source = record.folder if record.folder and record.folder.is_dir() else origin and origin.folder
    if source is not None:
        for path in (path for pattern in COMPANIONS for path in source.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    elif getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def readme(model: nn.Module, origin: Origin | None) -> str:
    """The folder's README.md: base, license, certificate, how to load."""
    record = conversion_of(model)
    recipe = record.recipe
    report = record.report.get("conversion", {})
    base = origin.name if origin else "held in this folder"
    license = hub.license_of(origin.folder) if origin else None
    certificate = report.get("certificate")
    measured = (
        f"max |logit difference| {certificate['max_difference']:.1e} at the start "
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

- Base model: {base}{f", revision {origin.revision}" if origin and origin.revision else ""}
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
    path.write_text(json.dumps(data, indent=2) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from None
