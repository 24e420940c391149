"""The folder of a PEFT adapter. PEFT costs seconds to import: what needs it imports it there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsecraft.checkpoint.base import entry
from sparsecraft.checkpoint.gathering import whole_tensors
from sparsecraft.checkpoint.tensors import new_or_changed
from sparsecraft.dense.digests import digest
from sparsecraft.dense.door import guarded
from sparsecraft.dense.origin import Origin
from sparsecraft.errors import ExportError
from sparsecraft.interop.targets.form import MERGE_PARTS, splits
from sparsecraft.interop.targets.standard import dtype_of
from sparsecraft.moe.names import dense_name, dense_tensors
from sparsecraft.surgery.record import conversion_of
from sparsecraft.surgery.revert import revert


class PeftTarget:
    """A recipe whose layers stand on a base that stays, as a PEFT adapter on that base."""

    def why_not(self, model: nn.Module) -> str | None:
        from sparsecraft.interop.peft.configs import why_no_adapter

        if reason := why_no_adapter(conversion_of(model).recipe):
            recipe = conversion_of(model).recipe
            other = MERGE_PARTS if splits(recipe) else "`upcycling` exports as mixtral."
            return f"{reason} sc.save keeps it as it is; {other}"
        if conversion_of(model).report.get("merge", {}).get("folded"):
            return (
                "a merge changed its dense weights, and an adapter would be put on the original "
                "ones; sc.save keeps them all."
            )
        if changed := self._changed(model):
            return (
                f"{len(changed)} dense tensors are not as the base has them, {changed[0]!r} among "
                "them, and an adapter holds new tensors only; sc.save keeps them all."
            )
        return None

    def _changed(self, model: nn.Module) -> list[str]:
        if origin := self._origin(model):
            held = new_or_changed(model, origin, whole_tensors(model))
            return [name for name in held if dense_name(model, name) is not None]
        known = conversion_of(model).digests
        now = conversion_of(model).by_first_name(dense_tensors(model))
        return [name for name, tensor in now.items() if digest(tensor) != known[name][1]]

    def _origin(self, model: nn.Module) -> Origin | None:
        """The base on disk, if the dense model can be built from it alone."""
        origin = conversion_of(model).base
        dense = dense_tensors(model).items()
        shapes = {name: t.shape for name, t in dense if t.is_floating_point()}
        return origin if origin and origin.holds(model, shapes) else None

    def to_target(self, model: nn.Module) -> dict[str, Tensor]:
        from sparsecraft.checkpoint.adapter import adapter_tensors

        return adapter_tensors(model)

    def write(self, model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
        from sparsecraft.interop.peft.folder import write

        write(model, tensors, folder, self._origin(model))

    def read(self, model: nn.Module, folder: Path) -> nn.Module:
        from peft import PeftModel

        with guarded(folder, ExportError):
            return PeftModel.from_pretrained(revert(copy.deepcopy(model)), folder).eval()

    def record(self, model: nn.Module) -> dict[str, Any]:
        origin = self._origin(model)
        return {"base": origin and entry(origin, model, dtype_of(model))}

    def lint(self, model: nn.Module) -> list[str]:
        return []  # engines do not read our adapters
