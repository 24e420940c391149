"""The dense models that the experts of one mixture come from: read by tensor, checked to fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from sparsecraft import hub, merged_lora
from sparsecraft.errors import SourceError
from sparsecraft.layer import MoELayer, unique_tensors
from sparsecraft.merged_lora import LoraFolder, MergedLora
from sparsecraft.origin import Origin

# Fields of a configuration that do not change what the tensors mean.
FREE = set(
    "_name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward dtype "
    "eos_token_id id2label initializer_range label2id max_position_embeddings output_attentions "
    "output_hidden_states pad_token_id pretraining_tp problem_type return_dict torch_dtype "
    "transformers_version use_cache".split()
)

# Cosine of the same matrix in two models: about 0 of models that were trained apart from the start,
# above 0.9 of fine-tuned ones.
KIN = 0.5
# So many rows of it tell.
ROWS = 1024


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
    if (Path(given) / merged_lora.CONFIG).is_file():
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
        tokenizer=lambda: hub.load_tokenizer(folder),
        folder=folder,
    )


def _open_lora(model: nn.Module, folder: Path) -> Source:
    """A LoRA on the base that it names; on `model` itself where that is the one, or it names none.

    The base's tensors are read one by one.
    """
    named = merged_lora.read_config(folder).get("base_model_name_or_path")
    own = Origin.of(model)
    if not named or named == getattr(model, "name_or_path", None):
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
        tokenizer=lambda: hub.load_tokenizer(folder),
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


def check_sources(
    model: nn.Module,
    sources: Sequence[Source],
    tensors: Mapping[str, Tensor],
    *,
    unrelated: bool = False,
    tokenizer: Path | None = None,
) -> None:
    """Refuse sources that do not fit the base, naming the first thing that differs.

    Args:
        tensors: the base's, by their dense names, of those that will be read; the first matrix
            among them tells whether two models have one ancestor.
        unrelated: let models without a common ancestor pass.
        tokenizer: folder of the base's; None takes the folder that the model was loaded from. A
            model without one has no tokenizer that could differ.

    Raises:
        SourceError: configuration, tokenizer, shapes or ancestry differ.
    """
    named = getattr(model, "name_or_path", None)
    base = tokenizer or (Path(named) if named else None)
    for source in sources:
        _check_config(model.config, source)
        if base is not None:
            _check_tokenizer(base, source)
        for name, tensor in tensors.items():
            source.check_shape(name, tensor.shape)
        if not unrelated:
            name, ours = next((n, t) for n, t in tensors.items() if t.ndim == 2)
            _check_kin(Origin.of(model).tensor(model, name) if ours.is_meta else ours, source, name)


def _check_config(base: PreTrainedConfig, source: Source) -> None:
    ours, theirs = base.to_dict(), source.config.to_dict()
    for key in sorted(ours.keys() | theirs.keys() - FREE, key=lambda k: (k != "model_type", k)):
        if key not in FREE and ours.get(key) != theirs.get(key):
            raise SourceError(
                f"{source.name!r} has {key}={theirs.get(key)!r} and the base {ours.get(key)!r}; "
                "experts of one mixture must be models of one architecture."
            )


def _check_tokenizer(base: Path, source: Source) -> None:
    files = _tokenizer_files(base)
    if "tokenizer.json" not in files or files == _tokenizer_files(source.folder):
        return  # the same to a byte: loading both would cost a second
    other = source.tokenizer()
    if other is None:
        return
    ours, theirs = hub.load_tokenizer(base).get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    for token in sorted(ours.keys() | theirs.keys(), key=lambda t: (ours.get(t, theirs.get(t)), t)):
        if ours.get(token) != theirs.get(token):
            raise SourceError(
                f"The token {token!r} is number {theirs.get(token)} in the tokenizer of "
                f"{source.name!r} and {ours.get(token)} in the base's; experts of one mixture must "
                "read the same tokens."
            )


def _tokenizer_files(folder: Path | None) -> dict[str, bytes]:
    paths = folder.glob("*token*.json") if folder else ()
    return {path.name: path.read_bytes() for path in paths}


def _check_kin(ours: Tensor, source: Source, name: str) -> None:
    pair = (t[:ROWS].detach().cpu().float().flatten() for t in (ours, source.tensor(name)))
    cosine = F.cosine_similarity(*pair, dim=0).item()
    if not cosine >= KIN:
        raise SourceError(
            f"{source.name!r} and the base have no common ancestor: the cosine of their "
            f"{name!r} is {cosine:.3f}, and of fine-tuned models it is above 0.9. A mixture of "
            "unrelated networks computes nothing; pass unrelated=True to join them all the same."
        )


def mean(sources: Sequence[Source], name: str) -> Tensor:
    """The mean of the sources' tensors, in float32 at least, one in memory at a time beside it."""
    first = sources[0].tensor(name)
    total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
    for source in sources[1:]:
        total += source.tensor(name).to(total)
    return total / len(sources)
