"""What stands beside a checkpoint's tensors: model card, tokenizer, license and settings."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from sparsecraft.checkpoint.folder import COMPANIONS
from sparsecraft.dense.origin import Origin
from sparsecraft.surgery.record import conversion_of

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_companions(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """Tokenizer, chat template, generation settings and license, unchanged.

    They are copied from where the model came from, its checkpoint or the base's folder; generation
    settings that differ from those there are the model's own.
    """
    source = conversion_of(model).settings
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
    name, license, *commit = record.base_card or ("a model built in memory", None)
    at = f", revision {commit[0]}" if any(commit) else ""
    front = f"\nbase_model: {name}" if HUB_ID.fullmatch(name) else ""
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
license: {license or "other"}{front}
---
# {recipe.name} ({recipe.variant})

{recipe.title}. {recipe.paper}.

- Base model: {name}{at}{held}
- License of the base: {license or "unknown; see the base model"}
- Certificate: the recipe {claim}; measured: {measured}

```python
import sparsecraft as sc
model = sc.load("path/to/this/folder")
```
After `import sparsecraft`, transformers' `AutoModelFor....from_pretrained` reads the folder too.
"""
