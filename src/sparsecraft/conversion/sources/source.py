"""The dense models that the experts of one mixture come from: read by tensor, checked to fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from sparsecraft.conversion.sources.lora_folder import CONFIG, LoraFolder, MergedLora, read_config
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer
from sparsecraft.dense.origin import Origin
from sparsecraft.errors import SourceError
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import unique_tensors
from sparsecraft.surgery.identity import dense_name, origin_of


@dataclass(frozen=True)
class Source:
    """One dense model.

    Attributes:
        name: what the user called it.
        config: its configuration.
        find: dense name -> tensor, or None.
        shape: dense name -> its shape, or None; reads no tensor from a disk.
        tokenizer: gives its tokenizer, if it has one.
        folder: where it is, if it is not in memory.
        lora: the adapter that it is, where its update is kept apart.
    """

    name: str
    config: PreTrainedConfig
    find: Callable[[str], Tensor | None]
    shape: Callable[[str], tuple[int, ...] | None]
    tokenizer: Callable[[], Any] = lambda: None
    folder: Path | None = None
    lora: LoraFolder | None = None

    def tensor(self, name: str) -> Tensor:
        """The tensor of a dense name.

        Raises:
            SourceError: the model has none.
        """
        tensor = self.find(name)
        if tensor is None:
            raise self._lacks(name)
        return tensor

    def check_shape(self, name: str, wanted: torch.Size) -> None:
        """Refuse a tensor of another shape than the base's.

        Raises:
            SourceError: it has another, or there is none.
        """
        found = self.shape(name)
        if found is None:
            raise self._lacks(name)
        if found != tuple(wanted):
            raise SourceError(
                f"{name!r} is {list(found)} in {self.name!r} and {list(wanted)} in the base."
            )

    def _lacks(self, name: str) -> SourceError:
        return SourceError(f"{self.name!r} has no tensor {name!r}, which the base model has.")


def open_source(model: nn.Module, given: str | Path | PreTrainedModel) -> Source:
    """A folder, hub id or packaged name, the folder of a PEFT LoRA, or a model in memory.

    Args:
        model: the base, by whose names tensors are asked for.

    Raises:
        HubError: there is no such model.
        SourceError: its folder holds no safetensors, or more than a LoRA.
    """
    if isinstance(given, PreTrainedModel):
        name = given.name_or_path or type(given).__name__
        held = unique_tensors(given)
        return Source(name, given.config, held.get, partial(_shape, held))
    if (Path(given) / CONFIG).is_file():
        return _open_lora(model, Path(given))
    folder = hub.resolve(given)
    origin = Origin.find(str(folder))
    if origin is None:
        raise SourceError(f"{str(given)!r} holds no safetensors; save the model as safetensors.")
    return Source(
        name=str(given),
        config=AutoConfig.from_pretrained(folder),
        find=partial(origin.tensor, model),
        shape=partial(origin.shape, model),
        tokenizer=lambda: load_tokenizer(folder),
        folder=folder,
    )


def _open_lora(model: nn.Module, folder: Path) -> Source:
    """A LoRA on the base that it names; on `model` itself where that is the one, or it names none.

    The base's tensors are read one by one.
    """
    named = read_config(folder).get("base_model_name_or_path")
    own = origin_of(model)
    if not named or named == dense_name(model):
        config, held = model.config, unique_tensors(model)
        changed = any(isinstance(module, MoELayer) for module in model.modules())
        on_disk = own is not None and (changed or any(tensor.is_meta for tensor in held.values()))
        find = partial(own.tensor, model) if on_disk else held.get
        shape = partial(own.shape, model) if on_disk else partial(_shape, held)
    else:
        source = open_source(model, named)
        config, find, shape = source.config, source.find, source.shape
    lora = MergedLora(folder, find, shape)
    lora.check()
    return Source(
        name=str(folder),
        config=config,
        find=lora.tensor,
        shape=lora.shape,
        tokenizer=lambda: load_tokenizer(folder),
        folder=folder,
    )


def finite(source: Source) -> Source:
    """The source, whose tensors are checked as they are read."""

    def find(name: str) -> Tensor | None:
        tensor = source.find(name)
        if tensor is not None and not tensor.isfinite().all():
            raise SourceError(f"{name!r} of {source.name!r} holds numbers that are not finite.")
        return tensor

    return replace(source, find=find)


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def mean(sources: Sequence[Source], name: str) -> Tensor:
    """The mean of the sources' tensors, in float32 at least, one in memory at a time beside it."""
    first = sources[0].tensor(name)
    total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
    for source in sources[1:]:
        total += source.tensor(name).to(total)
    return total / len(sources)
