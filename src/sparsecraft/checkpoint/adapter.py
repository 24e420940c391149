"""A PEFT folder of ours: its tensors, by PEFT's names, and the model that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.checkpoint import tensorfile
from sparsecraft.checkpoint.adapter_names import HELD, WRAPPED, check_complete, standing_paths
from sparsecraft.checkpoint.base import find_base
from sparsecraft.checkpoint.folder import EXPORT_RECORD
from sparsecraft.checkpoint.jsonfile import read_json
from sparsecraft.checkpoint.tensors import ADAPTER
from sparsecraft.dense import hub
from sparsecraft.dense.digests import digest
from sparsecraft.dense.origin import Origin
from sparsecraft.errors import CheckpointError
from sparsecraft.interop.peft.configs import CONFIGS
from sparsecraft.moe.names import dense_tensors
from sparsecraft.recipe.formats import from_json
from sparsecraft.recipe.overrides import override as override_recipe
from sparsecraft.surgery.install import apply
from sparsecraft.surgery.plan import plan
from sparsecraft.surgery.record import conversion_of

WEIGHTS = "adapter_model.safetensors"


def load_adapter(
    folder: Path,
    base: str | None,
    dtype: torch.dtype | None,
    device_map: Any,
    override: dict[str, Any] | None,
    **kwargs: Any,
) -> nn.Module:
    """What `sc.load` does with a PEFT folder; the arguments are its own.

    Raises:
        CheckpointError: the adapter is none of ours, its base is unknown or another one, or its
            tensors are not those of its recipe.
    """
    config = read_json(folder / ADAPTER)
    kinds = [config_class.TYPE for config_class in CONFIGS]
    if config.get("peft_type") not in kinds:
        raise CheckpointError(
            f"{folder} holds an adapter of type {config.get('peft_type')!r}, and sparsecraft reads "
            f"{', '.join(kinds)}; use peft.PeftModel.from_pretrained."
        )
    recipe = override_recipe(from_json(config["recipe"]), override or {})
    origin, saved_dtype = _base(folder, config, base)
    model = hub.load_dense(
        str(origin.folder),
        dtype=dtype or saved_dtype,
        device_map=device_map,
        quantize=recipe.base_quantization,
        **kwargs,
    )
    digests = {name: (t.dtype, digest(t)) for name, t in dense_tensors(model).items()}
    record = apply(model, recipe, plan(model, recipe), on_meta=True)
    record.digests = digests
    if (folder / EXPORT_RECORD).is_file():  # PEFT's own folders hold no tokenizer
        record.folder = folder.absolute()
    record.origin, record.revision = origin.name, origin.revision
    record.base_card = (origin.name, hub.license_of(origin.folder))
    _read_tensors(model, folder / WEIGHTS, dtype)
    return model.eval()


def _base(
    folder: Path, config: dict[str, Any], base: str | None
) -> tuple[Origin, torch.dtype | None]:
    """The dense model that the adapter stands on, and the dtype that it had."""
    written = folder / EXPORT_RECORD
    saved = read_json(written).get("base") if written.is_file() else None
    if saved is not None:
        return find_base(folder, saved, base), getattr(torch, saved["dtype"])
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise CheckpointError(
            f"{folder} does not say which model its adapter stands on, because that one was built "
            "in memory; pass its folder or hub id as sc.load(dir, base=...)."
        )
    folder_of_base = hub.resolve(name, None if base else config.get("revision"))
    origin = Origin.find(str(folder_of_base))
    if origin is None:
        raise CheckpointError(f"The base of {folder}, {name!r}, holds no safetensors.")
    return origin, None


def named_tensors(model: nn.Module) -> dict[str, tuple[nn.Module, str, torch.device]]:
    """Name in a PEFT folder -> module, leaf and device of each new tensor of a converted model."""
    record = conversion_of(model)
    paths = standing_paths([item.site for item in record.plan])
    found = {}
    for path, layer, device in zip(paths, record.layers, record.devices, strict=True):
        for part in ("experts", "router"):
            for name in getattr(getattr(layer, part), "state_dict", dict)():
                parent, _, leaf = f"{part}.{name}".rpartition(".")
                module = layer.get_submodule(parent)
                found[f"{WRAPPED}{path}.{HELD}.{part}.{name}"] = (module, leaf, device)
    return found


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The new tensors of a converted model under their names in a PEFT folder."""
    return {
        name: getattr(module, leaf).detach()
        for name, (module, leaf, _) in named_tensors(model).items()
    }


def _read_tensors(model: nn.Module, path: Path, dtype: torch.dtype | None) -> None:
    wanted, found = named_tensors(model), dict(tensorfile.read(path))
    check_complete(found, wanted, str(path))
    if others := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(
            f"{path} holds {others[0]!r} besides its adapter (modules_to_save); "
            "use peft.PeftModel.from_pretrained, which trains and loads such modules."
        )
    for name, (module, leaf, device) in wanted.items():
        old, new = getattr(module, leaf), found[name]
        if old.shape != new.shape:
            raise CheckpointError(
                f"{path} holds {name!r} with shape {list(new.shape)}; its recipe has "
                f"{list(old.shape)} on this base."
            )
        cast = dtype if new.is_floating_point() else None
        value = nn.Parameter(new.to(device, cast), requires_grad=old.requires_grad)
        setattr(module, leaf, value if isinstance(old, nn.Parameter) else value.data)
