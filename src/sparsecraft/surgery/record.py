"""Conversion: what is remembered on a converted model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.dense.loading import load_tokenizer
from sparsecraft.dense.origin import Origin
from sparsecraft.errors import SurgeryError
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.own_loss import OwnLoss
from sparsecraft.moe.routers.running import Running
from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.stages import Stage
from sparsecraft.surgery.plan import PlannedEdit, rewritten


@dataclass(slots=True)
class Conversion:
    """What `convert` remembers on the model, as `model.sparsecraft`.

    Attributes:
        recipe: the recipe that was applied.
        plan: its edits, in the order in which they were made.
        layers: the layers that were installed, one for each planned edit.
        devices: where each layer's donor was.
        dense: module path -> the module that stood there, for `revert`.
        aliases: each further name of a shared dense parameter -> its first, which these go by:
        digests: dense tensor name -> its dtype and digest before the conversion.
        shapes: dense tensor name -> its shape then.
        vocabulary: rows of the embedding of tokens then; None without one.
        masters: dense names of what training holds in float32, whatever type it had.
        trainable: names of the dense parameters that required gradients before.
        named: the dense model's `name_or_path`; a converted one does not bear it, see `identity`.
        came_from: where the dense model came from, if it did from anywhere.
        base_card: name, license and commit of the base, for the checkpoint's README.
        folder: the checkpoint that the model was loaded from, if it was.
        written: the recipe's JSON in that folder, of whatever format.
        report: what `convert` and `train` measured, as written to report.json.
        seen: what the parameters were when our verbs had last changed them; see `elsewhere`.
        hooks: handles of the hooks that give the layers each batch's masks.
        running: what of its split networks the model runs.
        left_out: reason -> what the recipe does not reach; see `sparsecraft.surgery.left_out`.
        fast: the model has its form for inference, which no verb changes or saves.
        own_loss: adds the recipe's auxiliary losses to the loss that the model gives in training.
    """

    recipe: Recipe
    plan: list[PlannedEdit]
    layers: list[MoELayer] = field(default_factory=list)
    devices: list[torch.device] = field(default_factory=list)
    dense: dict[str, nn.Module] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    digests: dict[str, tuple[torch.dtype, str]] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    vocabulary: int | None = None
    masters: set[str] = field(default_factory=set)
    trainable: frozenset[str] = frozenset()
    named: str = ""
    came_from: Origin | None = None
    folder: Path | None = None
    written: dict[str, Any] | None = None
    base_card: tuple[str | None, ...] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    seen: Any = None
    hooks: list[Any] = field(default_factory=list)
    running: Running = field(default_factory=Running)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    fast: bool = False
    own_loss: OwnLoss = field(init=False)

    def __post_init__(self) -> None:
        self.own_loss = OwnLoss(self.next_stage)

    def next_stage(self) -> Stage | None:
        """The first stage by gradient that has not been trained; the last one after all have."""
        done = {entry.get("stage") for entry in self.report.get("training", ())}
        stages = [stage for stage in self.recipe.stages if isinstance(stage, Stage)]
        return next((s for s in stages if s.name not in done), stages[-1] if stages else None)

    @property
    def types_of_masters(self) -> dict[str, torch.dtype]:
        """Dense name -> type before the conversion, of what training holds in float32."""
        return {name: self.digests[name][0] for name in self.masters if name in self.digests}

    def by_first_name(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Dense tensors by the names that `digests` has; those that were shared and are not any
        more keep their own."""
        found = {name: t for name, t in tensors.items() if name not in self.aliases}
        for name in tensors.keys() - found.keys():
            first = self.aliases[name]
            shared = found.setdefault(first, tensors[name]) is tensors[name]
            found |= {} if shared else {name: tensors[name]}
        return found

    @property
    def base(self) -> Origin | None:
        """Where the dense model came from, if it is still there."""
        return self.came_from if self.came_from and self.came_from.is_there else None

    @property
    def origin(self) -> str | None:
        """The folder, hub id or alias that the dense model came from, if any."""
        return self.came_from and self.came_from.name

    @property
    def settings(self) -> Path | None:
        """The folder whose tokenizer, license and generation settings are the model's: the
        checkpoint that it was loaded from, else the base's."""
        if self.folder is not None and self.folder.is_dir():
            return self.folder
        return self.base and self.base.folder


def origin_of(model: nn.Module) -> Origin | None:
    """Where a dense or converted model came from, if that is still there."""
    return conversion_of(model).base if is_converted(model) else Origin.of(model)


def settings_of(model: nn.Module) -> Path | None:
    """The folder whose tokenizer, license and generation settings are a model's, if any is."""
    if is_converted(model):
        return conversion_of(model).settings
    origin = Origin.of(model)
    return origin and origin.folder


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer that came with a dense or a converted model; None if none did."""
    folder, origin = settings_of(model), origin_of(model)
    found = folder and load_tokenizer(folder)
    return found or (origin and load_tokenizer(origin.folder))


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


def rewrite(record: Conversion, edits: Sequence[Edit]) -> None:
    """Let the record say that these edits are what stands at the sites of its plan, one for each.

    Raises:
        RecipeError: the recipe would make no sense; nothing is changed.
    """
    new = rewritten(record.recipe, zip(record.plan, edits, strict=True))
    record.recipe = replace(record.recipe, edits=tuple(new.values()))
    record.plan = [
        replace(item, edit=edit, source=new[item.source])
        for item, edit in zip(record.plan, edits, strict=True)
    ]


def check_not_fast(model: nn.Module) -> None:
    """Refuse a converted model in its form for inference.

    Raises:
        SurgeryError: it has that form.
    """
    if conversion_of(model).fast:
        raise SurgeryError(
            "This model is in its form for inference (sc.fast), in which it only answers and is "
            "measured: load the checkpoint again to train, change or save it."
        )


def check_stands(model: nn.Module) -> None:
    """Refuse to change a model whose layers are no longer where they were installed.

    Raises:
        SurgeryError: the model is dense, or something else took a layer's place.
    """
    check_not_fast(model)
    record, inside = conversion_of(model), set(model.modules())
    for item, layer in zip(record.plan, record.layers, strict=True):
        if layer not in inside:
            raise SurgeryError(
                f"The layer that was installed at {item.site.path!r} is no longer in the model: "
                "something else took its place. Put it back, or load the model again."
            )
