"""The dense models that the experts of one mixture come from: read by tensor, checked to fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparsecraft.conversion.sources.lora_folder import CONFIG, LoraFolder, MergedLora, read_settings
from sparsecraft.dense import hub
from sparsecraft.dense.door import read_config
from sparsecraft.dense.loading import load_tokenizer
from sparsecraft.dense.origin import Origin
from sparsecraft.dense.sound import check_weight
from sparsecraft.errors import SourceError
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import unique_tensors
from sparsecraft.surgery.identity import dense_name
from sparsecraft.surgery.record import origin_of


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
        revision: the hub's commit, if it came from there.
        lora: the adapter that it is, where its update is kept apart.
        changes: of an adapter, the names of the base's tensors that it changes.
        used: names that were read for the model.
    """

    name: str
    config: PreTrainedConfig
    find: Callable[[str], Tensor | None]
    shape: Callable[[str], tuple[int, ...] | None]
    tokenizer: Callable[[], Any] = lambda: None
    folder: Path | None = None
    revision: str | None = None
    lora: LoraFolder | None = None
    changes: frozenset[str] | None = None
    used: set[str] = field(default_factory=set, compare=False)

    @property
    def title(self) -> str:
        """What a report says that it was."""
        return f"{self.name} at {self.revision}" if self.revision else self.name

    def tensor(self, name: str) -> Tensor:
        """The tensor of a dense name, a weight.

        Raises:
            SourceError: the model has none, or something else of that name.
        """
        tensor = self.find(name)
        if tensor is None:
            raise self._lacks(name)
        self.used.add(name)
        return check_weight(name, tensor, repr(self.name), SourceError)

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


def open_source(
    model: nn.Module, given: str | Path | PreTrainedModel, revision: str | None = None
) -> Source:
    """A folder, hub id or packaged name, the folder of a PEFT LoRA, or a model in memory.

    Args:
        model: the base, by whose names tensors are asked for.
        revision: branch, tag or commit of a hub id.

    Raises:
        HubError: there is no such model.
        SourceError: its folder holds no weights, or more than a LoRA.
    """
    if isinstance(given, PreTrainedModel):
        name = given.name_or_path or type(given).__name__
        held = unique_tensors(given)
        return Source(name, _true(given.config, model, held.get), held.get, partial(_shape, held))
    if (Path(given).expanduser() / CONFIG).is_file():
        return _open_lora(model, Path(given).expanduser())
    origin = Origin.at(hub.resolve(given, revision))
    if not origin.is_there:
        raise SourceError(f"{str(given)!r} holds no weights that transformers reads.")
    find = partial(origin.tensor, model)
    return Source(
        name=str(given),
        config=_true(read_config(origin.folder, SourceError), model, find),
        find=find,
        shape=partial(origin.shape, model),
        tokenizer=lambda: load_tokenizer(origin.folder),
        folder=origin.folder,
        revision=origin.revision,
    )


def _true(
    config: PreTrainedConfig, model: nn.Module, find: Callable[[str], Tensor | None]
) -> PreTrainedConfig:
    """A configuration that says of a head with weights of its own that it is not tied, as
    transformers reads it."""
    head, table = (find(name) if name else None for name in ends(model))
    if head is None or table is None or head is table or torch.equal(head, table):
        return config
    config = copy.deepcopy(config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def ends(model: nn.Module) -> tuple[str | None, str | None]:
    """The names of the weights of a model's head and of its table of embeddings, if it has both."""
    modules = (model.get_output_embeddings(), model.get_input_embeddings())
    paths = {module: path for path, module in model.named_modules()}
    if any(not isinstance(getattr(module, "weight", None), Tensor) for module in modules):
        return None, None
    head, table = (f"{paths[module]}.weight" for module in modules)
    return head, table


def _open_lora(model: nn.Module, folder: Path) -> Source:
    """A LoRA on the base that it names; on `model` itself where that is the one, or it names none.

    The base's tensors are read one by one.
    """
    config = read_settings(folder)
    LoraFolder(folder).check_kind()
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    own = origin_of(model)
    if not named or is_base(model, named, revision):
        config, held = model.config, unique_tensors(model)
        changed = any(isinstance(module, MoELayer) for module in model.modules())
        on_disk = own is not None and (changed or any(tensor.is_meta for tensor in held.values()))
        find = partial(own.tensor, model) if on_disk else held.get
        shape = partial(own.shape, model) if on_disk else partial(_shape, held)
    else:
        source = open_source(model, named, revision)
        config, find, shape = source.config, source.find, source.shape
    lora = MergedLora(folder, find, shape)
    if getattr(config.get_text_config(), "tie_word_embeddings", False):
        lora.check_tied(*ends(model))
    lora.check()
    return Source(
        name=str(folder),
        config=config,
        find=lora.tensor,
        shape=lora.shape,
        tokenizer=lambda: load_tokenizer(folder),
        folder=folder,
        changes=lora.lora.changes(),
    )


def is_base(model: nn.Module, named: str, revision: str | None) -> bool:
    """Whether a name, such as a LoRA's of its base, is that of the folder that `model` is from."""
    own, theirs = origin_of(model), Origin.find(named, revision)
    if own is None or theirs is None:
        return named == dense_name(model)
    return own.folder == theirs.folder


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def mean(sources: Sequence[Source], name: str) -> Tensor:
    """The mean of the sources' tensors, in float32 at least, one in memory at a time beside it."""
    first = sources[0].tensor(name)
    total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
    for source in sources[1:]:
        total += source.tensor(name).to(total)
    return total / len(sources)
