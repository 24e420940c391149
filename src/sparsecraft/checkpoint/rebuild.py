"""What a folder gives, built anew from the folder alone before it takes its name.

That the bytes came back from the disk does not say that the same model does: a tensor may have no
place there, a setting may be lost, a module may stand in the model that no configuration builds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.checkpoint.base import as_it_was, convert_base, load_on
from sparsecraft.checkpoint.jsonfile import read_json
from sparsecraft.checkpoint.manifest import base_config, read_manifest, read_recipe
from sparsecraft.checkpoint.tensors import WEIGHTS, read_tensors
from sparsecraft.checkpoint.wide import wide_outputs, wide_type
from sparsecraft.dense.door import build
from sparsecraft.dense.loading import model_class
from sparsecraft.dense.memory import free_memory, main_memory
from sparsecraft.dense.origin import Origin
from sparsecraft.dense.probes import UNREADABLE, Inputs, candidates, random_probe
from sparsecraft.dense.sharing import is_sharded
from sparsecraft.dense.windows import long_probe
from sparsecraft.errors import CheckpointError
from sparsecraft.moe import cost
from sparsecraft.moe.buffers import alike
from sparsecraft.moe.names import unique_tensors
from sparsecraft.surgery.budget import restore
from sparsecraft.surgery.install import apply
from sparsecraft.surgery.plan import plan

log = logging.getLogger("sparsecraft")

# Beyond this, names, shapes and types are compared and not the values: to build it twice would take
# as long as to load it.
MOST_BYTES = 4 * 2**30
# Of the probes: short, and long where no window of the configuration is longer.
SHORT, LONG = (1, 16), (1, 128)
# Largest difference of the outputs, relative to the largest of them.
OUTPUTS_EQUAL = {torch.float64: 1e-6, torch.float32: 1e-4}
HALF_OUTPUTS_EQUAL = 1e-1  # where memory lacks a copy in float32
NOT_RUN = "tensors and buffers are equal; its outputs were not compared"


def memory_to_rebuild(size: int, free: int, widened: int = 0) -> int:
    """Bytes that a save takes to build a model of `size` bytes again and compare its values; none
    where `free` bytes of the main memory are too few, or it is too large: only names and shapes are
    compared then.

    Args:
        widened: bytes of a copy in float32, which outputs are compared in where it fits; see
            `checkpoint.wide.widened`.
    """
    if size > MOST_BYTES or free <= 2 * size:
        return 0
    return size + (widened if widened <= free - size else 0)


def check_rebuilt(
    model: nn.Module, tensors: Mapping[str, Tensor], folder: Path, origin: Origin | None
) -> None:
    """Build the model of a folder that has just been written, and compare.

    Args:
        tensors: what was to be written, each whole: of `model`, unless a state of it was given.
        origin: the base that it stands on.

    Raises:
        CheckpointError: it is another model.
    """
    size = cost.bytes_of(model)
    whole = memory_to_rebuild(size, main_memory()) > 0
    with torch.random.fork_rng():  # a class draws weights before it gets its own
        again = _rebuilt(folder, origin, device=_place(model.device, size) if whole else None)
    if again is None:
        return
    theirs = unique_tensors(again)
    if missing := sorted(tensors.keys() ^ theirs.keys()):
        raise _other(f"{len(missing)} tensors are in one of them alone, such as {missing[0]!r}")
    for name, tensor in tensors.items():
        if not _same(tensor, theirs[name], values=whole):
            raise _other(f"the tensor {name!r} is another one")
    if not whole:
        log.info("Rebuilt from the folder: names and shapes agree.")
        return
    rounded, differ = alike(model, again)
    if differ:
        raise _other(f"the buffer {differ[0]!r}, which is in no file, is another one")
    runs = again.device == model.device and _runs_on(model, tensors)
    ran = _compare_outputs(model, again, rounded) if runs else 0
    said = f"all is equal, outputs on {ran} probe(s) too" if ran else NOT_RUN
    log.info("Rebuilt from the folder: %s.", said)


def _place(device: torch.device, size: int) -> torch.device:
    """The model's own device, if it has room for as much again and what the probe takes."""
    full = device.type == "cuda" and free_memory(device) < 2 * size + 2**30
    return torch.device("cpu") if full or device.type == "meta" else device


def _rebuilt(folder: Path, origin: Origin | None, device: torch.device | None) -> nn.Module | None:
    """The model of a folder, as `load` builds it; without a device, without memory, if possible."""
    manifest, data = read_manifest(folder), read_json(folder / "config.json")
    recipe = read_recipe(manifest["recipe"], None)[1]
    config = base_config(data)
    if device is None:
        if recipe.quantization:
            return None  # a quantizer needs the values
        with torch.device("meta"):
            again = _of_class(data, config)
        apply(again, recipe, plan(again, recipe), on_meta=True)
        return again
    if origin is None:
        again = _of_class(data, config)
        convert_base(again, recipe, None)
    else:
        again, _ = load_on(origin, recipe, **as_it_was(manifest["base"]), config=config)
    read_tensors(again, folder / WEIGHTS, manifest["tensors"], complete=origin is None)
    restore(again, manifest.get("running"), changed=False)
    return again.to(device) if not recipe.quantization else again


def _of_class(data: dict[str, Any], config: Any) -> nn.Module:
    dtype = getattr(torch, data["dtype"])
    return build(
        model_class(data["base_config"]), config, "The folder", CheckpointError, dtype=dtype
    )


def _same(ours: Tensor, theirs: Tensor, values: bool) -> bool:
    """Whether two tensors have one shape and, where values are known, the same bytes."""
    if not values:
        return ours.shape == theirs.shape
    pair = (ours.detach().to(theirs.device), theirs.detach())
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in pair]
    return (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) and torch.equal(*as_bytes)


def _runs_on(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether what the model runs on here are these tensors: it is neither sharded, where every
    process would have to run it, nor offloaded, and they are no other state of it."""
    own = unique_tensors(model)
    return not is_sharded(model) and all(
        name in own
        and not own[name].is_meta
        and (own[name] is tensor or _same(own[name], tensor, values=True))
        for name, tensor in tensors.items()
    )


def _compare_outputs(model: nn.Module, again: nn.Module, rounded: dict[Tensor, Tensor]) -> int:
    """Compare what both give; the number of probes that the model ran on.

    Args:
        rounded: buffer of `again` -> what the model has in its place.
    """
    dtype, _ = wide_type(model, again)
    found = _probes(again)
    for probes in (found, found[:1]):
        try:
            wanted = wide_outputs(model, probes, dtype)
        except UNREADABLE:
            continue  # a model that only its own inputs run
        for ours, theirs in zip(wanted, wide_outputs(again, probes, dtype, rounded), strict=True):
            _check_same(ours, theirs)
        return len(probes)
    return 0


def _check_same(ours: Tensor, theirs: Tensor) -> None:
    scale = max(1.0, ours.abs().max().nan_to_num().item())
    near = {"rtol": 0, "atol": OUTPUTS_EQUAL.get(ours.dtype, HALF_OUTPUTS_EQUAL) * scale}
    if not torch.allclose(theirs, ours.to(theirs.dtype), **near, equal_nan=True):
        difference = (theirs - ours).abs().max().item()
        raise _other(
            f"its tensors are equal and its outputs differ by {difference:.1e} at scale {scale:.1f}"
        )


def _probes(model: nn.Module) -> list[Inputs]:
    """A short one first, after which frequencies that have grown are as they were."""
    long = long_probe(model) or candidates(model, shape=LONG)[-1]
    return [random_probe(model, shape=SHORT), *([long] if "input_ids" in long else [])]


def _other(what: str) -> CheckpointError:
    return CheckpointError(
        f"The folder was written and gives another model than the one in memory: {what}. Nothing "
        "was kept. A module or a setting of this model is in no file that load reads; undo it, or "
        "keep its state_dict()."
    )
