"""revert(): take the layers out again, bit for bit."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from sparsecraft.dense.digests import digest
from sparsecraft.dense.sites import silence
from sparsecraft.errors import SurgeryError
from sparsecraft.moe.names import dense_tensors, unique_tensors
from sparsecraft.surgery.identity import bears
from sparsecraft.surgery.record import Conversion, check_stands, conversion_of
from sparsecraft.surgery.rollback import atomic

log = logging.getLogger("sparsecraft")


@atomic
def revert(model: nn.Module) -> nn.Module:
    """Give the dense model back, bit for bit.

    Shared tensors that have been trained since the conversion are read again from the base
    folder, and what training held in float32 gets its own type back. Embeddings that
    `resize_token_embeddings` has made longer keep the rows that were added behind their own.

    Raises:
        SurgeryError: the model is dense; a layer is no longer where it was installed; shared
            tensors have changed and no base folder holds the original ones, or have other shapes.
            The model is then left as it was.
    """
    record = conversion_of(model)
    check_stands(model)
    tensors = record.by_first_name(dense_tensors(model) | replaced_tensors(record))
    types = _types_now(model, record)
    values = _Originals(model, record, tensors, types).values()
    take_out(model)
    for name, value in values.items():
        tensors[name].data = value.to(tensors[name].device)
    return model


def replaced_tensors(record: Conversion) -> dict[str, Tensor]:
    """Dense name -> tensor of the modules that experts took the place of."""
    replaced = [path for i in record.plan if i.edit.replaces for path in i.site.members]
    modules = {path: record.dense[path] for path in replaced if path in record.dense}
    return {
        f"{path}.{name}": tensor
        for path, module in modules.items()
        for name, tensor in unique_tensors(module).items()
    }


class _Originals:
    """What the dense tensors were before the conversion, in the types that the model has now.

    Attributes:
        changed: names of those that are something else now.
    """

    def __init__(
        self,
        model: nn.Module,
        record: Conversion,
        tensors: dict[str, Tensor],
        types: dict[torch.dtype, torch.dtype],
    ):
        self.model, self.record, self.tensors, self.types = model, record, tensors, types
        self.changed = [name for name in tensors if not self._is_same(name)]
        self.origin = record.base if self.changed else None

    def values(self) -> dict[str, Tensor]:
        """Name -> its value, of those whose value or type is another now.

        Raises:
            SurgeryError: a tensor has another shape, or its value is nowhere to be found.
        """
        kept = [name for name in self.tensors if self._rows(name)]
        found = {name: self._original(name) for name in self.changed}
        if kept:
            sizes = sorted({tuple(self.tensors[name].shape) for name in kept})
            log.warning(
                f"{', '.join(sorted(kept))}: resized since the conversion to {sizes[0]}; revert "
                "keeps the size, and the rows that were added."
            )
        for name, tensor in self.tensors.items():
            dtype = self._type(name)
            if name not in found and tensor.dtype != dtype:
                found[name] = tensor.detach().to(dtype)
        return found

    def _type(self, name: str) -> torch.dtype:
        dtype = self.record.digests.get(name, (self.tensors[name].dtype, None))[0]
        return self.types.get(dtype, dtype)

    def _rows(self, name: str) -> tuple[int, int] | None:
        """(dimension, size before) of a tensor with a row for each token, resized since."""
        now, before = tuple(self.tensors[name].shape), self.record.shapes.get(name)
        if before is None or tuple(before) == now or len(before) != len(now):
            return None
        differ = [d for d in range(len(now)) if before[d] != now[d]]
        return (differ[0], before[differ[0]]) if differ == [self._by_token(before)] else None

    def _by_token(self, shape: torch.Size) -> int | None:
        """The dimension that has a row for each token, if one does."""
        vocabulary = self.record.vocabulary
        return next((d for d, size in enumerate(shape) if size == vocabulary), None)

    def _is_same(self, name: str) -> bool:
        """Whether the tensor has the value that it had, up to a cast that loses nothing."""
        tensor = self.tensors[name].detach()
        dtype, wanted = self.record.digests.get(name, (None, None))
        if resized := self._rows(name):
            dimension, rows = resized
            if rows > tensor.shape[dimension]:
                return False  # rows are missing, and with them the proof
            tensor = tensor.narrow(dimension, 0, rows)
        if dtype is None or tensor.dtype == dtype or not tensor.is_floating_point():
            return digest(tensor) == wanted
        cast = tensor.to(dtype)
        return torch.equal(cast.to(tensor.dtype), tensor) and digest(cast) == wanted

    def _original(self, name: str) -> Tensor:
        """The tensor as it was, read from the base folder; beside it the rows that were added."""
        now, resized = self.tensors[name].detach(), self._rows(name)
        before = self.record.shapes.get(name)
        if before is not None and tuple(before) != tuple(now.shape) and not resized:
            raise SurgeryError(
                f"{name!r} is {list(now.shape)} and was {list(before)} before the conversion; "
                "load the dense model again instead of reverting."
            )
        dtype, wanted = self.record.digests.get(name, (None, None))
        tensor = self.origin.tensor(self.model, name) if self.origin else None
        if tensor is None or digest(tensor.to(dtype)) != wanted:
            where = f"its base {self.origin.name!r} no longer" if self.origin else "no base folder"
            raise SurgeryError(
                f"{len(self.changed)} tensors of the dense model are not as they were before the "
                f"conversion, {name} among them, and {where} holds the original; "
                "load the dense model again instead of reverting."
            )
        tensor = tensor.to(now.device, dtype).to(self._type(name))
        if resized:
            dimension, rows = resized
            size = now.shape[dimension]
            added = now.narrow(dimension, rows, max(0, size - rows)) if size > rows else None
            tensor = tensor.narrow(dimension, 0, min(rows, size))
            tensor = tensor if added is None else torch.cat([tensor, added.to(tensor)], dimension)
        return tensor.contiguous()


def take_out(model: nn.Module) -> None:
    """Put the dense modules back where they stood; their tensors are not touched."""
    record = conversion_of(model)
    _follow(model, record)
    # In the reverse order of installation: an outer module has to be back before its parts.
    for path, module in reversed(record.dense.items()):
        model.set_submodule(path, module)
    for item in record.plan:
        silence(model, item.site, undo=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in record.trainable)
    for handle in record.hooks:
        handle.remove()
    bears(model, record.named)
    record.own_loss.remove()
    del model.sparsecraft
    for name in ("save_pretrained", "push_to_hub", "load_state_dict", "generate"):
        function = getattr(vars(model).get(name), "func", None)  # ours are partials
        if function is not None and function.__module__.startswith("sparsecraft."):
            delattr(model, name)


def _types_now(model: nn.Module, record: Conversion) -> dict[torch.dtype, torch.dtype]:
    """Type before the conversion -> the one that the model was cast to since. What training holds
    in float32 was not cast by anybody."""
    shared = dense_tensors(model)
    return {
        dtype: shared[name].dtype
        for name, (dtype, _) in record.digests.items()
        if name in shared and name not in record.masters
    }


def _follow(model: nn.Module, record: Conversion) -> None:
    """Move and cast the replaced modules, which were out of sight when the model was."""
    now = _types_now(model, record)
    for item, layer in zip(record.plan, record.layers, strict=True):
        if not item.edit.replaces:
            continue
        device = next(layer.experts.parameters()).device
        for module in (record.dense[path] for path in item.site.members if path in record.dense):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.to(device, now.get(tensor.dtype, tensor.dtype))
