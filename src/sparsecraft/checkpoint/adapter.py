"""A PEFT folder of ours, read without PEFT: a recipe, a base, and tensors by PEFT's names.

adapter_config.json           the recipe, the base's name and revision, digests
adapter_model.safetensors     the tensors of the adapter, and nothing else
sparsecraft_export.json       only where `sc.export` wrote the folder: the base's fingerprint,
                              digests of what stands beside the adapter
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.checkpoint.adapter_names import HELD, WRAPPED, check_complete, standing_paths
from sparsecraft.checkpoint.arguments import is_another
from sparsecraft.checkpoint.base import find_base, load_on
from sparsecraft.checkpoint.fields import ADAPTER_FIELDS, EXPORT_FIELDS, check_fields
from sparsecraft.checkpoint.folder import EXPORT_RECORD
from sparsecraft.checkpoint.jsonfile import read_json
from sparsecraft.checkpoint.manifest import read_recipe
from sparsecraft.checkpoint.pretrained import writes_ours
from sparsecraft.checkpoint.tensors import ADAPTER
from sparsecraft.dense import hub
from sparsecraft.dense.door import read_config as read_dense_config
from sparsecraft.dense.origin import Origin
from sparsecraft.dense.safefile import SafeFile
from sparsecraft.dense.sound import check_weight
from sparsecraft.errors import CheckpointError, RecipeError
from sparsecraft.moe.names import unique_tensors
from sparsecraft.recipe.formats import to_json
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.identity import stands_in
from sparsecraft.surgery.record import conversion_of

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterType:
    """One of our types of PEFT adapters.

    Attributes:
        method: the only recipe that it holds; None for any.
        fields: field of adapter_config.json -> the argument of the recipe's function, and where
            the recipe keeps the value.
    """

    method: str | None = None
    fields: dict[str, tuple[str, str]] = field(default_factory=dict)

    def check_fields(self, recipe: Recipe, given: dict[str, Any]) -> None:
        """Refuse fields that do not say what the recipe says.

        Raises:
            RecipeError: a field has another value, or the recipe keeps no such value.
        """
        for name, found in self.values(recipe).items():
            if given.get(name) is not None and not _same(given[name], found):
                raise RecipeError(
                    f"{name} is {given[name]!r} and its recipe has {found!r}; make a new "
                    "configuration instead of changing one of them."
                )

    def values(self, recipe: Recipe) -> dict[str, Any]:
        """What a recipe says in the fields of its type."""
        data = to_json(recipe)
        return {name: _at(data, path) for name, (_, path) in self.fields.items()}


def _same(given: Any, found: Any) -> bool:
    """Whether two values, or numbers by layer, say the same."""
    lists = [list(value) for value in (given, found) if isinstance(value, (list, tuple))]
    if not lists:
        return given == found
    count = len(lists[0])
    return all(
        (list(value) if isinstance(value, (list, tuple)) else [value] * count) == lists[0]
        for value in (given, found)
    )


def _at(recipe: dict[str, Any], path: str) -> Any:
    """The value at a dotted path of a recipe's JSON, or its numbers by layer; 0 where PESC's recipe
    has no LoRA, None where experts are mixed and not selected.

    Raises:
        RecipeError: the recipe was made by hand and keeps no such value.
    """
    if path.startswith("edits.1.") and len(recipe["edits"]) == 1:
        return 0
    data: Any = recipe
    try:
        number, _, field = path.removeprefix("edits.").partition(".")
        for by in recipe["edits"][int(number)]["by_layer"] if number.isdigit() else ():
            if by["field"] == field:
                return list(by["numbers"])
        for key in path.split("."):
            if key == "k" and data["kind"] == "soft":
                return None
            data = data[int(key)] if isinstance(data, (list, tuple)) else data[key]
    except (KeyError, IndexError, TypeError):
        raise RecipeError(
            f"This {recipe['name']!r} recipe has no {path}, which its own configuration names; "
            "use SparsecraftConfig(recipe=...)."
        ) from None
    return data


ADAPTER_TYPES = {
    "SPARSECRAFT": AdapterType(),
    "PESC": AdapterType(
        "camelidae",
        {
            "num_experts": ("num_experts", "edits.0.experts.num_experts"),
            "top_k": ("top_k", "edits.0.router.select.k"),
            "adapter_dim": ("adapter_dim", "edits.0.experts.dim"),
            "lora_r": ("lora_rank", "edits.1.experts.rank"),
            "lora_alpha": ("lora_alpha", "edits.1.experts.alpha"),
            "adapter_scale": ("adapter_scale", "edits.0.experts.scale"),
            "dropout": ("dropout", "edits.0.experts.dropout"),
            "paths": ("paths", "edits.0.paths"),
        },
    ),
    "MOV": AdapterType(
        "mov",
        {
            "num_experts": ("num_experts", "edits.0.experts.num_experts"),
            "top_k": ("top_k", "edits.0.router.select.k"),
            "variant": ("variant", "variant"),
            "paths": ("paths", "edits.0.paths"),
        },
    ),
    "MOLORA": AdapterType(
        "molora",
        {
            "num_experts": ("num_experts", "edits.0.experts.num_experts"),
            "r": ("rank", "edits.0.experts.rank"),
            "lora_alpha": ("alpha", "edits.0.experts.alpha"),
            "top_k": ("top_k", "edits.0.router.select.k"),
            "variant": ("variant", "variant"),
            "dropout": ("dropout", "edits.0.experts.dropout"),
            "paths": ("paths", "edits.0.paths"),
        },
    ),
}


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
    config = read_config(folder)
    recipe = _recipe(folder, config, override)
    origin, saved = base_of(folder, config, base)
    saved_dtype = getattr(torch, saved["dtype"]) if saved else None
    changed = bool(override) or _differs(origin.folder, kwargs)
    kwargs |= {"dtype": dtype or saved_dtype, "device_map": device_map}
    model, record = load_on(origin, recipe, saved.get("quantization"), **kwargs)
    if (folder / EXPORT_RECORD).is_file():  # PEFT's own folders hold no tokenizer
        record.folder = folder.absolute()
    _read_tensors(model, folder / WEIGHTS, dtype)
    writes_ours(model)
    if not changed:
        stands_in(model, folder)
    return model.eval()


def _differs(base: Path, kwargs: dict[str, Any]) -> bool:
    """Whether arguments of `from_pretrained` make another model of the base."""
    return is_another(read_dense_config(base, CheckpointError), kwargs)


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of adapter_config.json.

    Raises:
        CheckpointError: it is of none of our types, or lacks something.
    """
    config = read_json(folder / ADAPTER)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in ADAPTER_TYPES:
        raise CheckpointError(
            f"{folder} holds an adapter of type {kind!r:.80} (in {ADAPTER}), and sparsecraft reads "
            f"{', '.join(ADAPTER_TYPES)}; use peft.PeftModel.from_pretrained."
        )
    check_fields(config, ADAPTER_FIELDS, folder / ADAPTER)
    return config


def _recipe(folder: Path, config: dict[str, Any], changes: dict[str, Any] | None) -> Recipe:
    """The recipe that adapter_config.json holds, whose other fields must say the same, changed."""
    kind = config["peft_type"]
    saved, recipe = read_recipe(config["recipe"], changes)
    try:
        ADAPTER_TYPES[kind].check_fields(saved, config)
    except RecipeError as error:
        raise CheckpointError(f"{folder / ADAPTER} was edited: {error}") from None
    return recipe


def base_of(
    folder: Path, config: dict[str, Any], base: str | None
) -> tuple[Origin, dict[str, Any]]:
    """The dense model that the adapter stands on, and what an export of ours says of it."""
    written = folder / EXPORT_RECORD
    exported = read_json(written) if written.is_file() else {}
    check_fields(exported, EXPORT_FIELDS, written)
    saved = exported.get("base")
    if saved is not None:
        return find_base(folder, saved, base), saved
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise CheckpointError(
            f"{folder} does not say which model its adapter stands on, because that one was built "
            "in memory; load it with base=NAME (--base), that model's folder or hub id."
        )
    own = name == config.get("base_model_name_or_path")
    origin = Origin.at(hub.resolve(name, config.get("revision") if own else None))
    if not origin.is_there:
        raise CheckpointError(f"The base of {folder}, {name!r}, holds no weights.")
    return origin, {}


def named_tensors(model: nn.Module) -> dict[str, tuple[nn.Module, str, torch.device]]:
    """Name in a PEFT folder -> module, leaf and device of each new tensor of a converted model."""
    record = conversion_of(model)
    paths = standing_paths([item.site for item in record.plan])
    found = {}
    for path, layer, device in zip(paths, record.layers, record.devices, strict=True):
        for part, held in (("experts", layer.experts), ("router", layer.router)):
            for name in unique_tensors(held) if held is not None else ():
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
    wanted, file = named_tensors(model), SafeFile.open(path, CheckpointError)
    check_complete(file.entries, wanted, str(path))
    if others := sorted(file.entries.keys() - wanted.keys()):
        raise CheckpointError(
            f"{path} holds {others[0]!r} besides its adapter (modules_to_save); "
            "use peft.PeftModel.from_pretrained, which trains and loads such modules."
        )
    found = dict(file)
    for name, (module, leaf, device) in wanted.items():
        old, new = getattr(module, leaf), found[name]
        if old.shape != new.shape:
            raise CheckpointError(
                f"{path} holds {name!r} with shape {list(new.shape)}; its recipe has "
                f"{list(old.shape)} on this base."
            )
        check_weight(name, new, path, CheckpointError)
        cast = dtype if new.is_floating_point() else None
        value = nn.Parameter(new.to(device, cast), requires_grad=old.requires_grad)
        setattr(module, leaf, value if isinstance(old, nn.Parameter) else value.data)
