"""The tensors of a checkpoint: which are new or changed, and into which model they go."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

import torch
from torch import nn

from sparsecraft.checkpoint.folder import MANIFEST
from sparsecraft.checkpoint.integrity import accepting
from sparsecraft.checkpoint.shards import changed, read
from sparsecraft.dense.digests import combine, digest
from sparsecraft.dense.origin import Origin
from sparsecraft.dense.sharing import shared_like
from sparsecraft.dense.sound import check_weight
from sparsecraft.errors import CheckpointError
from sparsecraft.moe.names import dense_name, unique_tensors
from sparsecraft.moe.routers.moving import moving_tensors
from sparsecraft.surgery.record import conversion_of

WEIGHTS, ADAPTER = "moe.safetensors", "adapter_config.json"


def new_or_changed(
    model: nn.Module,
    origin: Origin | None,
    tensors: Mapping[str, torch.Tensor],
    always: Set[str] = frozenset(),
) -> dict[str, torch.Tensor]:
    """Those of the model's tensors that a checkpoint has to hold: which the base folder does not.

    Args:
        always: names of tensors that it holds whatever the base does.
    """
    kept = {}
    for name, tensor in tensors.items():
        dense = dense_name(model, name)
        if dense is not None and origin is not None and name not in always:
            if conversion_of(model).recipe.quantization and not tensor.is_floating_point():
                continue  # packed from the base, never trained
            original = origin.tensor(model, dense)
            if original is not None and digest(original.to(tensor.dtype)) == digest(tensor):
                continue
        kept[name] = tensor
    return kept


def read_tensors(
    model: nn.Module,
    path: Path,
    wanted_digest: str,
    complete: bool = False,
    in_place: bool = False,
    shards: Mapping[str, str] | None = None,
) -> None:
    """Put the file's tensors into the model.

    Args:
        wanted_digest: of all tensors, from the manifest.
        complete: the file must hold every tensor of the model, not only the new ones.
        in_place: copy values into the existing tensors, whatever is in the file, so that
            optimizers and wrappers keep their references.
        shards: the digest of each of several files, by which the one that differs is found.
    """
    devices, known = _devices(model), unique_tensors(model)
    new = {n for n in known if dense_name(model, n) is None}
    required = set() if in_place else set(known) if complete else new
    digests, moving = {}, moving_tensors(model)
    for name, tensor in read(path):
        digests[name] = digest(tensor)
        if name not in known:
            raise CheckpointError(f"{path} holds {name!r}, which this recipe has no place for.")
        tensor = _by_expert(name, tensor, known[name])
        if name in moving:
            check_weight(name, tensor, path, CheckpointError)
        if known[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path} holds {name!r} with shape {list(tensor.shape)}; this recipe has "
                f"{list(known[name].shape)}."
            )
        _check_kind(path, name, tensor, known[name])
        if in_place:
            with torch.no_grad():
                known[name].copy_(shared_like(tensor, known[name]))
        else:
            _assign(model, name, tensor, devices.get(name, known[name].device))
    if missing := sorted(required - set(digests)):
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, {missing[0]!r} among them.")
    if combine(digests) != wanted_digest:
        which = " and ".join(changed(path, shards))
        advice = "." if in_place else f", or {accepting(path.parent)}"
        raise CheckpointError(
            f"The tensors in {path.parent / which} are not those that {MANIFEST} was written with; "
            f"copy or save the folder again{advice}"
        )


def _by_expert(name: str, tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Of an activation that all experts shared in older versions, a copy for each."""
    shared = ".experts.activation." in name and own.shape[1:] == tensor.shape
    return tensor.expand(own.shape).contiguous() if shared else tensor


def _check_kind(path: Path, name: str, tensor: torch.Tensor, own: torch.Tensor) -> None:
    """Refuse integers where the model has floating numbers, and weights that are not finite."""
    if own.is_floating_point() and isinstance(own, nn.Parameter):
        check_weight(name, tensor, path, CheckpointError)
    elif tensor.is_floating_point() != own.is_floating_point():
        words = [str(t.dtype).removeprefix("torch.") for t in (tensor, own)]
        raise CheckpointError(
            f"{path} holds {name!r} as {words[0]}, and the model has {words[1]} there; copy or "
            "save the folder again."
        )


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
