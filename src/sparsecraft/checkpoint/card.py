"""README.md, the model card of a checkpoint."""

from __future__ import annotations

import re

from torch import nn

from sparsecraft.checkpoint.integrity import REPORT, edited_files
from sparsecraft.dense.origin import Origin
from sparsecraft.surgery.record import conversion_of

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def readme(model: nn.Module, origin: Origin | None) -> str:
    """The folder's README.md: base, license, certificate, how to load."""
    record = conversion_of(model)
    recipe = record.recipe
    report = record.report.get("conversion", {})
    name, license, *commit = record.base_card or ("a model built in memory", None)
    at = f", revision {commit[0]}" if any(commit) else ""
    front = f"\nbase_model: {name}" if HUB_ID.fullmatch(name) else ""
    held = "" if origin else ", held in this folder"
    by_hand = REPORT in edited_files(record.report)
    certificate = None if by_hand else report.get("certificate")
    what = "layer output" if certificate and certificate.get("layers") else "logit"
    measured = (
        f"max |{what} difference| {certificate['max_difference']:.1e} at the start "
        f"(tolerance {certificate['tolerance']:.1e} in {certificate['dtype']})"
        if certificate
        else f"not known, {REPORT} was edited by hand"
        if by_hand
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
