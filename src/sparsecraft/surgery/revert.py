"""revert(): take the layers out again, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecraft.dense.digests import digest
from sparsecraft.dense.origin import Origin
from sparsecraft.errors import SurgeryError
from sparsecraft.moe.names import dense_tensors
from sparsecraft.surgery.identity import bears
from sparsecraft.surgery.record import Conversion, conversion_of


def revert(model: nn.Module) -> nn.Module:
    """Give the dense model back, bit for bit.

    Shared tensors that have been trained since the conversion are read again from the base
    folder.

    Raises:
        SurgeryError: the model is dense, or shared tensors have changed and no base folder holds
            the original ones. The model is then left converted.
    """
    record = conversion_of(model)
    tensors = dense_tensors(model) | replaced_tensors(record)
    known = {name: wanted for name, (_, wanted) in record.digests.items()}
    changed = [name for name, tensor in tensors.items() if digest(tensor) != known.get(name)]
    originals = _originals(model, record, changed)
    take_out(model)
    with torch.no_grad():
        for name in changed:
            tensors[name].copy_(originals[name])
    return model


def replaced_tensors(record: Conversion) -> dict[str, Tensor]:
    """Dense name -> tensor of the modules that experts took the place of."""
    replaced = [path for i in record.plan if i.edit.replaces for path in i.site.members]
    modules = {path: record.dense[path] for path in replaced if path in record.dense}
    return {
        f"{path}.{name}": tensor
        for path, module in modules.items()
        for name, tensor in module.named_parameters()
    }


def _originals(model: nn.Module, record: Conversion, names: list[str]) -> dict[str, Tensor]:
    """The tensors as they were before the conversion, read from the base folder."""
    origin = Origin.find(record.origin, record.revision) if names else None
    found = {}
    for name in names:
        dtype, wanted = record.digests.get(name, (None, None))
        tensor = origin.tensor(model, name) if origin else None
        if tensor is None or digest(tensor.to(dtype)) != wanted:
            where = f"its base {record.origin!r} no longer" if origin else "no base folder"
            raise SurgeryError(
                f"{len(names)} tensors of the dense model are not as they were before the "
                f"conversion, {name} among them, and {where} holds the original; "
                "load the dense model again instead of reverting."
            )
        found[name] = tensor
    return found


def take_out(model: nn.Module) -> None:
    """Put the dense modules back where they stood; their tensors are not touched."""
    record = conversion_of(model)
    _follow(model, record)
    # In the reverse order of installation: an outer module has to be back before its parts.
    for path, module in reversed(record.dense.items()):
        model.set_submodule(path, module)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in record.trainable)
    for handle in record.hooks:
        handle.remove()
    bears(model, record.named)
    del model.sparsecraft
    vars(model).pop("save_pretrained", None)


def _follow(model: nn.Module, record: Conversion) -> None:
    """Move and cast the replaced modules, which were out of sight when the model was."""
    shared = dense_tensors(model)
    now = {d: shared[name].dtype for name, (d, _) in record.digests.items() if name in shared}
    for item, layer in zip(record.plan, record.layers, strict=True):
        if not item.edit.replaces:
            continue
        device = next(layer.experts.parameters()).device
        for module in (record.dense[path] for path in item.site.members if path in record.dense):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.to(device, now.get(tensor.dtype, tensor.dtype))
