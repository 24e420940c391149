"""A PEFT folder of one of our recipes, read as the converted model that it describes.

adapter_config.json           the recipe, the base's name and revision, digests
adapter_model.safetensors     the tensors of the adapter, and nothing else
sparsecraft_export.json       only where `sc.export` wrote the folder: the base's fingerprint,
                              digests of what stands beside the adapter
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from sparsecraft.checkpoint import adapter_record, tensorfile
from sparsecraft.checkpoint.adapter import WEIGHTS
from sparsecraft.dense import hub
from sparsecraft.dense.origin import Origin
from sparsecraft.dense.packaged import is_alias
from sparsecraft.interop.peft.configs import config_of
from sparsecraft.surgery.record import conversion_of


def write(
    model: nn.Module, tensors: dict[str, Tensor], folder: Path, origin: Origin | None
) -> None:
    """Write a converted model's adapter as PEFT reads it.

    Args:
        tensors: as `adapter_tensors` gives them.
        origin: the base that adapter_config.json names; None for one built in memory.
    """
    recipe = conversion_of(model).recipe
    config = config_of(recipe)
    config.inference_mode = True
    if origin is not None:
        # An alias of ours means nothing to PEFT, and neither does a subfolder of a repository.
        local = is_alias(origin.name) or origin.subfolder
        config.base_model_name_or_path = str(origin.folder) if local else origin.name
        config.revision = None if local else origin.revision
    classes = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    if model.can_generate():
        config.task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    config.save_pretrained(folder, auto_mapping_dict=None if config.task_type else classes)
    tensorfile.write(folder / WEIGHTS, tensors)
    adapter_record.sign(folder)
    base = origin.name if origin else "a model built in memory"
    license = hub.license_of(origin.folder) if origin else None
    (folder / "README.md").write_text(f"""---
library_name: peft
license: {license or "other"}
---
# {recipe.name} ({recipe.variant}), a PEFT adapter

{recipe.title}. {recipe.paper}.

- Base model: {base}{f", revision {origin.revision}" if origin and origin.revision else ""}
- License of the base: {license or "unknown; see the base model"}

```python
import sparsecraft  # PEFT knows the type after this; without, it raises KeyError: {config.TYPE!r}
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
`sparsecraft.load("path/to/this/folder")` reads the same folder, with its base.
""")
