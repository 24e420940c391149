"""Conversion: what is remembered on a converted model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsecraft.errors import SurgeryError
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.running import Running
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.plan import PlannedEdit


@dataclass(slots=True)
class Conversion:
    """What `convert` remembers on the model, as `model.sparsecraft`.

    Attributes:
        recipe: the recipe that was applied.
        plan: its edits, in the order in which they were made.
        layers: the layers that were installed, one for each planned edit.
        devices: where each layer's donor was.
        dense: module path -> the module that stood there, for `revert`.
        digests: dense tensor name -> its dtype and digest before the conversion.
        trainable: names of the dense parameters that required gradients before.
        named: the dense model's `name_or_path`; a converted one does not bear it, see `identity`.
        origin: the folder, hub id or alias that the dense model came from, if any.
        base_card: name and license of the base, for the checkpoint's README.
        folder: the checkpoint that the model was loaded from, if it was.
        written: the recipe's JSON in that folder, of whatever format.
        report: what `convert` and `train` measured, as written to report.json.
        hooks: handles of the hooks that give the layers each batch's masks.
        running: what of its split networks the model runs.
    """

    recipe: Recipe
    plan: list[PlannedEdit]
    layers: list[MoELayer] = field(default_factory=list)
    devices: list[torch.device] = field(default_factory=list)
    dense: dict[str, nn.Module] = field(default_factory=dict)
    digests: dict[str, tuple[torch.dtype, str]] = field(default_factory=dict)
    trainable: frozenset[str] = frozenset()
    named: str = ""
    origin: str | None = None
    revision: str | None = None
    folder: Path | None = None
    written: dict[str, Any] | None = None
    base_card: tuple[str, str | None] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)
    running: Running = field(default_factory=Running)


def is_converted(model: nn.Module) -> bool:
    return isinstance(getattr(model, "sparsecraft", None), Conversion)


def conversion_of(model: nn.Module) -> Conversion:
    """The record of a converted model.

    Raises:
        SurgeryError: the model is still dense.
    """
    if not is_converted(model):
        raise SurgeryError(f"This {type(model).__name__} is dense; call sc.convert first.")
    return model.sparsecraft
