"""load(): a checkpoint folder -> the converted model, in every tensor the one that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsecraft.checkpoint import adapter_record, integrity, shards
from sparsecraft.checkpoint.adapter import load_adapter, read_config
from sparsecraft.checkpoint.arguments import is_another, meant
from sparsecraft.checkpoint.base import as_it_was, convert_base, find_base, load_on
from sparsecraft.checkpoint.claim import bring_back
from sparsecraft.checkpoint.fields import CONFIG_FIELDS, REPORT_FIELDS, check_fields
from sparsecraft.checkpoint.folder import GENERATION, MANIFEST
from sparsecraft.checkpoint.jsonfile import json_digest, read_json
from sparsecraft.checkpoint.manifest import (
    base_config,
    checked_manifest,
    read_manifest,
    read_recipe,
)
from sparsecraft.checkpoint.pretrained import writes_ours
from sparsecraft.checkpoint.tensors import ADAPTER, WEIGHTS, read_tensors
from sparsecraft.dense import hub
from sparsecraft.dense.bounds import bounded
from sparsecraft.dense.door import build, check_asked, check_folder, read_generation
from sparsecraft.dense.jsonfile import MEASURED
from sparsecraft.dense.loading import load_tokenizer, model_class
from sparsecraft.dense.memory import check_new_in_memory, outside_of_inference_mode
from sparsecraft.errors import CheckpointError
from sparsecraft.moe.names import dense_tensors, unique_tensors
from sparsecraft.surgery.budget import restore
from sparsecraft.surgery.elsewhere import remember
from sparsecraft.surgery.identity import stands_in
from sparsecraft.surgery.record import Conversion, conversion_of, tokenizer_of


@outside_of_inference_mode()
def load(
    folder: str | Path,
    base: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    override: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Read a checkpoint or a PEFT folder of ours; the model comes back in evaluation mode.

    Args:
        base: name or folder of the dense model, if it has moved; its tensors must be the same.
        dtype: cast the whole model after loading; None keeps what was saved.
        device_map: as in transformers' `from_pretrained`.
        override: changes to the recipe, dotted path -> value.
        kwargs: passed to the dense model's `from_pretrained`; `torch_dtype` is `dtype`.

    Raises:
        CheckpointError: the folder is incomplete, edited or truncated, or stands on another base.
        RecipeError: a newer format, or an impossible override.
        ResourceError: it is called where new parameters have no memory.
    """
    check_new_in_memory("sc.load")
    older = kwargs.pop("torch_dtype", None)
    folder, dtype = bring_back(Path(folder)), _dtype(older if dtype is None else dtype)
    check_asked(kwargs, CheckpointError)
    check_folder(folder, CheckpointError)
    if (folder / ADAPTER).is_file() and not (folder / MANIFEST).is_file():
        read_config(folder)  # says what is none of ours, before what has changed
        adapter_record.check(folder)
        model = load_adapter(folder, base, dtype, device_map, override, **kwargs)
        remember(model, "it was loaded")
        return model
    return read(folder, checked_manifest(folder), base, dtype, device_map, override, **kwargs)


def read(
    folder: Path,
    manifest: dict[str, Any],
    base: str | None = None,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    override: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """What `load` does with a checkpoint, by what its manifest says, or is going to say."""
    saved, recipe = read_recipe(manifest["recipe"], override)
    origin = find_base(folder, manifest["base"], base)
    # Not the base folder's: the model may have been loaded with other settings.
    config = base_config(_checked_config(folder, manifest))
    changed = recipe != saved or is_another(config, kwargs)
    config.update({key: kwargs.pop(key) for key in list(kwargs) if key in config.to_dict()})
    kwargs = meant(kwargs)
    if origin is None:
        spread = None if _one_device(device_map) else device_map
        model = _from_config(folder, config, None if spread else device_map, kwargs)
        record = _known(convert_base(model, recipe, None), manifest)
    else:
        kwargs |= as_it_was(manifest["base"])
        kwargs["packed"] = kwargs["packed"] or _packed(folder)
        model, record = load_on(origin, recipe, config=config, device_map=device_map, **kwargs)
    record.written, record.base_card = manifest["recipe"], manifest.get("base_card")
    record.folder, record.report = folder.absolute(), _report(folder)
    weights, shards = folder / WEIGHTS, manifest.get("shards")
    read_tensors(model, weights, manifest["tensors"], complete=origin is None, shards=shards)
    record.masters = _masters(model)
    if dtype is not None:
        _cast(model, dtype)
        record.masters.clear()
    restore(model, manifest.get("running"), changed=recipe != saved)
    _settle(model, folder, changed)
    remember(model, "it was loaded")
    if origin is None and spread is not None:
        _dispatch(model, spread, kwargs)
    return model.eval()


def _known(record: Conversion, manifest: dict[str, Any]) -> Conversion:
    """With what a folder that stands on no base says of its dense model."""
    held = manifest["dense"].items()
    record.digests = {name: (getattr(torch, dtype), found) for name, (dtype, found) in held}
    if resized := manifest.get("resized"):
        record.vocabulary = resized["vocabulary"]
        record.shapes |= {name: torch.Size(shape) for name, shape in resized["shapes"].items()}
    return record


def _report(folder: Path) -> dict[str, Any]:
    report = read_json(folder / "report.json", MEASURED)
    check_fields(report, REPORT_FIELDS, folder / "report.json")
    return report


def _settle(model: nn.Module, folder: Path, changed: bool) -> None:
    """How a model that is read generates, saves and is called; by the folder unless it differs."""
    if (folder / GENERATION).is_file() and model.can_generate():
        model.generation_config = read_generation(folder, CheckpointError)
    writes_ours(model)
    if not changed:
        stands_in(model, folder)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Not model.to(dtype): that would round the rotary frequencies, which are not saved."""
    for tensor in unique_tensors(model).values():
        tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.dtype = dtype


def _masters(model: nn.Module) -> set[str]:
    """Dense names of what was saved in another type than the base has: what training holds so."""
    digests = conversion_of(model).digests
    return {
        name
        for name, tensor in dense_tensors(model).items()
        if tensor.is_floating_point() and name in digests and tensor.dtype != digests[name][0]
    }


def _checked_config(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if json_digest(config) != manifest["config"]:
        raise CheckpointError(
            f"{folder / 'config.json'} was edited after it was written; undo the edit and pass "
            "settings of the dense model as arguments of sc.load instead, or "
            f"{integrity.accepting(folder)}"
        )
    check_fields(config, CONFIG_FIELDS, folder / "config.json")
    return config


def _packed(folder: Path) -> dict[str, Any] | None:
    """How the base's weights were packed, where older versions kept it."""
    return read_json(folder / "config.json")["base_config"].get("quantization_config")


def _dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    """A floating dtype from what the user asked; None and "auto" keep what was saved."""
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if asked is None or asked == "auto":
        return None
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise CheckpointError(f"dtype is {asked!r}; it must be a floating type such as 'bfloat16'.")
    return found


def _one_device(device_map: Any) -> bool:
    if isinstance(device_map, dict):
        return list(device_map) == [""] and device_map[""] != "disk"
    return device_map not in ("auto", "balanced", "balanced_low_0", "sequential")


def _from_config(folder: Path, config: Any, device_map: Any, kwargs: dict[str, Any]) -> nn.Module:
    data = read_json(folder / "config.json")
    ways = {name: kwargs[name] for name in kwargs if name.endswith("_implementation")}
    cls, dtype = model_class(data["base_config"]), getattr(torch, data["dtype"])
    with bounded(*shards.extent(folder / WEIGHTS), folder, CheckpointError, everything=True):
        model = build(cls, config, folder, CheckpointError, dtype=dtype, **ways)
    where = device_map[""] if isinstance(device_map, dict) else device_map
    return model if where is None else model.to(where)


def _dispatch(model: nn.Module, device_map: Any, kwargs: dict[str, Any]) -> None:
    """Spread a model that lies on the CPU, as accelerate does."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    if isinstance(device_map, str):
        block = {"no_split_module_classes": list(model._no_split_modules or [])}
        memory = kwargs.get("max_memory")
        if device_map != "sequential":
            low = device_map == "balanced_low_0"
            memory = get_balanced_memory(model, memory, low_zero=low, **block)
        device_map = infer_auto_device_map(model, max_memory=memory, **block)
    where = {"offload_dir": kwargs.get("offload_folder")}
    where["offload_buffers"] = kwargs.get("offload_buffers", False)
    dispatch_model(model, device_map, **where)


def is_self_contained(folder: str | Path) -> bool:
    """Whether a folder is a checkpoint that stands on no base."""
    folder = Path(folder).expanduser()
    return (folder / MANIFEST).is_file() and read_manifest(folder)["base"] is None


def load_any(name: str, base: str | None = None) -> tuple[nn.Module, Any]:
    """Model and tokenizer of a checkpoint folder, or of a dense model by name.

    On the GPU if there is one.

    Args:
        base: of a checkpoint, as in `load`.

    Raises:
        CheckpointError: a checkpoint folder that lacks its recipe, or a base of a dense model.
        HubError: no such model, or weights or a tokenizer that cannot be read.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(name).expanduser()
    bring_back(folder)
    if (folder / "adapter_config.json").is_file():
        model = load(folder, base, device_map=device)
        return model, load_tokenizer(folder) or tokenizer_of(model)
    if not (folder / MANIFEST).is_file():
        folder = hub.resolve(name)
    manifest = checked_manifest(folder) if (folder / MANIFEST).is_file() else None
    tokenizer = load_tokenizer(folder)  # before the weights, which take long
    if manifest is not None:
        return read(folder, manifest, base, device_map=device), tokenizer
    check_has_recipe(folder)
    if base is not None:
        raise CheckpointError(f"{name} is a dense model and stands on no base; drop {base!r}.")
    integrity.warn_of_changes(folder, "read")
    return hub.load_dense(name, device_map=device), tokenizer


def check_has_recipe(folder: Path) -> None:
    """Refuse a folder without recipe.json whose configuration is a checkpoint's.

    Raises:
        CheckpointError: so it is.
    """
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and config.get("model_type") == "sparsecraft":
        raise CheckpointError(
            f"{folder} is a sparsecraft checkpoint whose {MANIFEST} is missing; "
            "copy or save the folder again."
        )
