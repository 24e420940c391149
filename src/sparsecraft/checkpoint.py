"""A converted model on disk: `recipe.json`, `moe.safetensors`, and what other tools expect beside.

    recipe.json       format_version, recipe, base (name, revision, fingerprint), digests
    moe.safetensors   tensors that are new or differ from the base; all of them if standalone.
                      If large, moe-00001-of-0000N.safetensors and moe.safetensors.index.json
    report.json       certificate, parameter counts, training log
    config.json       model_type "sparsecraft" with the base's configuration inside
    README.md, tokenizer files, generation_config.json

A folder is written under a temporary name, read back, and then renamed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from sparsecraft import budget, cost, hub, shards
from sparsecraft.errors import CheckpointError, HubError, SparsecraftError
from sparsecraft.folder import (
    COMPANIONS,
    MANIFEST,
    base_config,
    base_dtype,
    config_of,
    json_digest,
    read_json,
    read_manifest,
    readme,
    replacing,
    word,
    write_companions,
    write_json,
)
from sparsecraft.layer import dense_name, dense_tensors, unique_tensors
from sparsecraft.origin import Origin, combine, digest
from sparsecraft.planning import plan
from sparsecraft.recipe import FORMAT_VERSION, VERSION, from_json, to_json
from sparsecraft.recipe import override as override_recipe
from sparsecraft.surgery import apply, conversion_of

WEIGHTS, ADAPTER = "moe.safetensors", "adapter_config.json"


def save(
    model: nn.Module,
    out: str | Path,
    *,
    standalone: bool = False,
    overwrite: bool = False,
    tokenizer: Any = None,
    keep: tuple[str, ...] | None = None,
    shard_size: int = shards.SHARD_SIZE,
) -> Path:
    """Write a converted model as a checkpoint folder.

    Args:
        standalone: hold the base's tensors too, so that the folder needs nothing else. Always so
            for a model that cannot be built from a base on disk (another head, another size).
        overwrite: replace an existing folder once the new one is complete.
        tokenizer: written beside the model; by default the base's own files are copied.
        keep: write into a folder of the user's too; these globs of its files win over ours.
        shard_size: bytes beyond which the tensors are split over several files.

    Raises:
        SurgeryError: the model is dense.
        CheckpointError: the folder exists, or the disk gives back other bytes than were written.
        ResourceError: the disk is too small.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    conversion_of(model)
    check_loadable(model)
    budget.warn_untrained(model)
    out = Path(out)
    origin = usable_base(model, out, standalone)
    tensors = new_or_changed(model, origin)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    cost.require(out, disk=size, memory=0, task="Saving")
    with replacing(out, overwrite, keep or (), foreign=keep is not None) as folder:
        weights_digest = shards.write(folder / WEIGHTS, tensors, shard_size)
        write_rest(model, folder, origin, weights_digest, tokenizer)
    return out


def write_rest(
    model: nn.Module, folder: Path, origin: Origin | None, weights_digest: str, tokenizer: Any
) -> None:
    """All of a checkpoint but its tensors, of which only the names and dtypes are asked."""
    record, config = conversion_of(model), config_of(model)
    manifest = {
        "format_version": FORMAT_VERSION,
        "sparsecraft": VERSION,
        "recipe": to_json(record.recipe),
        "base": origin
        and {
            "name": origin.name,
            "revision": origin.revision,
            "fingerprint": origin.fingerprint(),
            "dtype": word(base_dtype(model)),
        },
        "base_card": record.base_card,
        # What `revert` compares with, where there is no base to read the originals from.
        "dense": None if origin else {n: [word(d), h] for n, (d, h) in record.digests.items()},
        "running": budget.state_of(model),
        "tensors": weights_digest,
        "config": json_digest(config),
    }
    write_json(folder / MANIFEST, {**manifest, "digest": json_digest(manifest)})
    write_json(folder / "report.json", record.report)
    write_json(folder / "config.json", config)
    write_companions(model, folder, tokenizer)
    (folder / "README.md").write_text(readme(model, origin))


def usable_base(model: nn.Module, out: Path, standalone: bool) -> Origin | None:
    """The base that a checkpoint in `out` can stand on; None if it has to hold everything."""
    record = conversion_of(model)
    origin = Origin.find(record.origin, record.revision)
    if origin is not None and out.resolve() == origin.folder.resolve():
        raise CheckpointError(f"{out} holds the base that the model stands on; choose another.")
    if standalone or origin is None or not origin.holds(model, _dense_shapes(model)):
        return None
    return origin


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
        kwargs: passed to the dense model's `from_pretrained`.

    Raises:
        CheckpointError: the folder is incomplete, edited or truncated, or stands on another base.
        RecipeError: a newer format, or an impossible override.
    """
    folder, dtype = Path(folder), _dtype(dtype)
    if (folder / ADAPTER).is_file() and not (folder / MANIFEST).is_file():
        from sparsecraft.peft.folder import load as load_adapter  # PEFT costs seconds to import

        return load_adapter(folder, base, dtype, device_map, override, **kwargs)
    manifest = read_manifest(folder)
    recipe = override_recipe(from_json(manifest["recipe"]), override or {})
    origin = find_base(folder, manifest["base"], base)
    # Not the base folder's: the model may have been loaded with other settings.
    config = base_config(_checked_config(folder, manifest))
    config.update({key: kwargs.pop(key) for key in list(kwargs) if key in config.to_dict()})
    if origin is None:
        model = _from_config(folder, config, device_map, kwargs)
    else:
        model = hub.load_dense(
            str(origin.folder),
            dtype=getattr(torch, manifest["base"]["dtype"]),
            device_map=device_map,
            quantize=recipe.base_quantization,
            config=config,
            **kwargs,
        )
    digests = {name: (t.dtype, digest(t)) for name, t in dense_tensors(model).items()}
    record = apply(model, recipe, plan(model, recipe), on_meta=True)
    if origin is None:
        digests = {n: (getattr(torch, d), h) for n, (d, h) in manifest["dense"].items()}
    else:
        record.origin, record.revision = origin.name, origin.revision
    record.digests, record.base_card = digests, manifest.get("base_card")
    record.folder, record.report = folder.absolute(), read_json(folder / "report.json")
    read_tensors(model, folder / WEIGHTS, manifest["tensors"], complete=origin is None)
    budget.restore(model, manifest.get("running"), changed=recipe != from_json(manifest["recipe"]))
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if dtype is not None:
        # Not model.to(dtype): that would round the rotary frequencies, which are not saved.
        for tensor in unique_tensors(model).values():
            tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
    return model.eval()


def _checked_config(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if json_digest(config) != manifest["config"]:
        raise CheckpointError(
            f"{folder / 'config.json'} was edited after it was written; undo the edit, and pass "
            "settings of the dense model as arguments of sc.load instead."
        )
    return config


def save_pretrained(model: nn.Module, save_directory: str | Path, **kwargs: Any) -> None:
    """What `model.save_pretrained` does once the model is converted: write our checkpoint."""
    ours = {"standalone", "tokenizer"}
    # What transformers' own takes and what changes nothing about a checkpoint of ours.
    ignored = {
        "is_main_process",
        "safe_serialization",
        "max_shard_size",
        "save_peft_format",
        "token",
    }
    given = {name for name, value in kwargs.items() if value not in (None, False)}
    if unknown := sorted(given - ours - ignored):
        raise SparsecraftError(
            f"save_pretrained of a converted model does not take {', '.join(unknown)}; "
            "use sc.save(model, dir)."
        )
    if kwargs.get("is_main_process", True):
        chosen = {name: kwargs[name] for name in ours & given}
        # As in transformers: into a folder of the user's too, beside a tokenizer saved before.
        settings = "generation_config.json"
        keep = () if "tokenizer" in chosen else tuple(c for c in COMPANIONS if c != settings)
        save(model, save_directory, overwrite=True, keep=keep, **chosen)


def check_loadable(model: nn.Module) -> None:
    """Refuse what `load` could not build again: a class or a tie that the config cannot tell."""
    try:
        found = hub.model_class(model)
    except HubError:
        found = None
    if found is not type(model):
        raise CheckpointError(
            f"{type(model).__name__} is no class of transformers, so that a checkpoint of it could "
            "not be loaded again; save a model of a transformers class."
        )
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    head = model.get_output_embeddings() if tied else None
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        raise CheckpointError(
            "The configuration says tie_word_embeddings=True and the head has a weight of its own; "
            "set model.config.tie_word_embeddings = False, or tie them."
        )


def new_or_changed(model: nn.Module, origin: Origin | None) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint has to hold: those that the base folder does not."""
    kept = {}
    for name, tensor in unique_tensors(model).items():
        dense = dense_name(model, name)
        if dense is not None and origin is not None:
            if conversion_of(model).recipe.base_quantization and not tensor.is_floating_point():
                continue  # packed from the base, never trained
            original = origin.tensor(model, dense)
            if original is not None and digest(original.to(tensor.dtype)) == digest(tensor):
                continue
        kept[name] = tensor
    return kept


def _dense_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Dense name -> shape of what is not quantized (that is packed, and in the base anyway)."""
    return {n: t.shape for n, t in dense_tensors(model).items() if t.is_floating_point()}


def read_tensors(
    model: nn.Module,
    path: Path,
    wanted_digest: str,
    complete: bool = False,
    in_place: bool = False,
) -> None:
    """Put the file's tensors into the model.

    Args:
        wanted_digest: of all tensors, from the manifest.
        complete: the file must hold every tensor of the model, not only the new ones.
        in_place: copy values into the existing tensors, whatever is in the file, so that
            optimizers and wrappers keep their references.
    """
    known = unique_tensors(model)
    new = {n for n in known if dense_name(model, n) is None}
    required = set() if in_place else set(known) if complete else new
    devices = _devices(model)
    digests = {}
    for name, tensor in shards.read(path):
        digests[name] = digest(tensor)
        if name not in known:
            raise CheckpointError(f"{path} holds {name!r}, which this recipe has no place for.")
        if known[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path} holds {name!r} with shape {list(tensor.shape)}; this recipe has "
                f"{list(known[name].shape)}."
            )
        if in_place:
            with torch.no_grad():
                known[name].copy_(tensor)
        else:
            _assign(model, name, tensor, devices.get(name, known[name].device))
    if missing := sorted(required - set(digests)):
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, {missing[0]!r} among them.")
    if combine(digests) != wanted_digest:
        raise CheckpointError(
            f"The tensors in {path} are not those that {MANIFEST} was written with; "
            "copy or save the folder again."
        )


def _dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    """A floating dtype from what the user asked; None and "auto" keep what was saved."""
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if asked is None or asked == "auto":
        return None
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise CheckpointError(f"dtype is {asked!r}; it must be a floating type such as 'bfloat16'.")
    return found


def _devices(model: nn.Module) -> dict[str, torch.device]:
    """Name of every new tensor -> the device of the dense module that its layer stands on."""
    record = conversion_of(model)
    targets = {
        id(layer): device for layer, device in zip(record.layers, record.devices, strict=True)
    }
    return {
        f"{path}.{name}": targets[id(module)]
        for path, module in model.named_modules()
        if id(module) in targets
        for part in ("experts", "router")
        if getattr(module, part) is not None
        for name in (f"{part}.{n}" for n in unique_tensors(getattr(module, part)))
    }


def _assign(model: nn.Module, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    store = module._parameters if leaf in module._parameters else module._buffers
    old = store[leaf]
    if not old.is_meta:
        old.data = tensor.to(device)  # in place, so that whatever is tied to it stays tied
    elif store is module._parameters:
        store[leaf] = nn.Parameter(tensor.to(device), requires_grad=old.requires_grad)
    else:
        store[leaf] = tensor.to(device)


def find_base(folder: Path, saved: dict[str, Any] | None, base: str | None) -> Origin | None:
    """The base that a folder stands on, checked by fingerprint; None for a self-contained one."""
    if saved is None:
        if base is not None:
            raise CheckpointError(f"{folder} is self-contained and takes no base; drop {base!r}.")
        return None
    name = base or saved["name"]
    try:
        resolved = hub.resolve(name, None if base else saved["revision"])
    except HubError as error:
        raise CheckpointError(f"The base of {folder} is {name!r}: {error}") from None
    origin = Origin.find(str(resolved))
    if origin is None:
        raise CheckpointError(f"The base of {folder}, {name!r}, holds no safetensors.")
    if origin.fingerprint() != saved["fingerprint"]:
        raise CheckpointError(
            f"{folder} stands on {saved['name']!r}, and {name!r} holds other tensors; "
            "pass the right base as sc.load(dir, base=...)."
        )
    if base is not None or hub.is_alias(name):
        return origin
    return dataclasses.replace(origin, name=name, revision=saved["revision"])


def _from_config(folder: Path, config: Any, device_map: Any, kwargs: dict[str, Any]) -> nn.Module:
    data = read_json(folder / "config.json")
    model = hub.model_class(data["base_config"])._from_config(
        config, dtype=getattr(torch, data["dtype"]), **kwargs
    )
    if isinstance(device_map, (str, torch.device)) and device_map != "auto":
        model.to(device_map)
    elif device_map is not None:
        raise CheckpointError(
            f"{folder} is self-contained; device_map takes one device there, not {device_map!r}."
        )
    return model
