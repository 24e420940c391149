"""The dense model that a checkpoint stands on: where it is, and whether it is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsecraft.checkpoint.folder import resolved
from sparsecraft.checkpoint.manifest import word
from sparsecraft.dense import hub
from sparsecraft.dense.digests import digest
from sparsecraft.dense.memory import check_in_memory
from sparsecraft.dense.once import looked_at_once
from sparsecraft.dense.origin import Origin
from sparsecraft.dense.quantization import settings_in, settings_of
from sparsecraft.errors import CheckpointError, HubError
from sparsecraft.moe.names import dense_tensors
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.install import apply
from sparsecraft.surgery.plan import plan
from sparsecraft.surgery.record import Conversion, conversion_of


def convert_base(model: nn.Module, recipe: Recipe, origin: Origin | None) -> Conversion:
    """Put the layers of a checkpoint on its dense model, their tensors still without memory.

    Args:
        origin: where the dense model came from; None for one that only the checkpoint holds.
    """
    digests = {name: (t.dtype, digest(t)) for name, t in dense_tensors(model).items()}
    with looked_at_once():
        record = apply(model, recipe, plan(model, recipe), on_meta=True)
    record.digests = digests
    if origin is not None:
        record.came_from = origin
    return record


def load_on(
    origin: Origin, recipe: Recipe, packed: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[nn.Module, Conversion]:
    """The dense model of a folder with the layers of a checkpoint, which still lack their tensors,
    and what is remembered on it.

    Args:
        packed: how its weights were packed, if the recipe says that they are; None is as usual.
        kwargs: passed to `hub.load_dense`.
    """
    kwargs |= origin.loading
    if "config" in kwargs and (own := settings_in(origin.folder)):
        kwargs["config"].quantization_config = packed or own
    before = origin.stamps()
    quantize = recipe.quantization and (packed or recipe.quantization)
    model = hub.load_dense(str(origin.folder), quantize=quantize, **kwargs)
    check_in_memory(model, "pass no device_map that offloads")
    if origin.stamps() != before:
        raise CheckpointError(f"The base {origin.name!r} changed while it was read; load it again.")
    record = convert_base(model, recipe, origin)
    record.base_card = card_of(origin)
    return model, record


def card_of(origin: Origin) -> tuple[str | None, ...]:
    """Name, license and commit of a base, for the checkpoint's README."""
    return origin.name, hub.license_of(origin.folder), origin.revision


def entry(origin: Origin, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """What a folder says of the base that `model` stands on.

    Args:
        dtype: of the dense model's own tensors.
    """
    place = {
        "subfolder": origin.subfolder,
        "variant": origin.variant,
        "quantization": settings_of(model),
    }
    return {
        "name": origin.name,
        "revision": origin.revision,
        **{key: value for key, value in place.items() if value},
        "fingerprint": origin.fingerprint(),
        "dtype": word(dtype),
    }


def as_it_was(saved: dict[str, Any]) -> dict[str, Any]:
    """What `load_on` takes to load a base as `entry` found it."""
    return {"packed": saved.get("quantization"), "dtype": getattr(torch, saved["dtype"])}


def usable_base(model: nn.Module, out: Path, standalone: bool) -> Origin | None:
    """The base that a checkpoint in `out` can stand on; None if it has to hold everything."""
    record = conversion_of(model)
    origin = record.base
    if origin is not None and resolved(out) == origin.folder.resolve():
        raise CheckpointError(f"{out} holds the base that the model stands on; choose another.")
    alone = origin is None or not origin.holds(model, _dense_shapes(model))
    if record.recipe.quantization and (standalone or alone):
        raise CheckpointError(
            f"The base is packed ({record.recipe.quantization}), and a checkpoint cannot hold it; "
            + (
                "leave out standalone=True (--standalone)."
                if not alone
                else "save the dense model as a folder, load that, and keep its head and sizes."
            )
        )
    if standalone or alone:
        return None
    _check_unchanged(model, origin)
    return origin


def _check_unchanged(model: nn.Module, origin: Origin) -> None:
    """Refuse to stand on a base whose tensors are not those that the model was made of.

    Raises:
        CheckpointError: names the first; what is in memory may have changed with it, where the
            model maps its files.
    """
    if not origin.has_changed():
        return
    for name, (dtype, before) in conversion_of(model).digests.items():
        now = origin.tensor(model, name)
        if now is not None and now.is_floating_point() and digest(now.to(dtype)) != before:
            raise CheckpointError(
                f"The base {origin.name!r} has changed since the model was made of it: {name!r} "
                "holds other numbers. Put the old files back, or convert or load it again; "
                "standalone=True (--standalone) keeps what is in memory."
            )


def _dense_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Dense name -> shape of what is not quantized (that is packed, and in the base anyway)."""
    return {n: t.shape for n, t in dense_tensors(model).items() if t.is_floating_point()}


def find_base(folder: Path, saved: dict[str, Any] | None, base: str | None) -> Origin | None:
    """The base that a folder stands on, checked by fingerprint; None for a self-contained one."""
    if saved is None:
        if base is not None:
            raise CheckpointError(f"{folder} is self-contained and takes no base; drop {base!r}.")
        return None
    name, revision, place = base or saved["name"], None, {}
    if name == saved["name"]:
        revision, place = saved["revision"], {"subfolder": saved.get("subfolder", "")}
    try:
        resolved = hub.resolve(name, revision, **place)
    except HubError as error:
        raise CheckpointError(
            f"The base of {folder} is {name!r}{_at(revision)}: {error} If it has moved, load the "
            "checkpoint with base=FOLDER (--base)."
        ) from None
    origin = Origin.at(resolved, saved.get("variant"))
    if not origin.is_there:
        raise CheckpointError(f"The base of {folder}, {name!r}, holds no weights.")
    _ = origin.seen  # before it is compared and read
    if origin.has_fingerprint(saved["fingerprint"]):
        return origin
    # Written before commits were remembered, and the branch has moved since.
    moved = origin.revision is not None and revision is None
    for other in Origin.named(origin.name) if moved else ():
        if other.has_fingerprint(saved["fingerprint"]):
            return other
    raise CheckpointError(
        f"{folder} stands on {saved['name']!r}{_at(saved['revision'])}, and {name!r} holds other "
        "tensors; load it with the right base=FOLDER (--base)."
    )


def _at(revision: str | None) -> str:
    return f" at {revision}" if revision else ""
