"""The weights of a folder: the files that transformers reads, and no others.

The first of these that is there, as `PreTrainedModel.from_pretrained` takes it:

1. the file that config.json names as `transformers_weights`;
2. model.safetensors;
3. the files that model.safetensors.index.json names;
4. pytorch_model.bin (read without running anything that it holds);
5. the files that pytorch_model.bin.index.json names.

A variant, such as "fp16", is part of the names: model.fp16.safetensors. Whatever else lies there,
shards of another upload, averages of a training, other formats, is not read.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from sparsecraft.dense import layout
from sparsecraft.errors import CheckpointError, first_line

NAMES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
INDEX, SAFE = ".index", ".safetensors"
# What layer norms' tensors were called before torch had layer norms.
LEGACY = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
# What a file that is damaged, no weights at all, or more than tensors raises.
UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Weights:
    """The tensors of one folder by the names that its files give them.

    Attributes:
        folder: with a config.json.
        variant: of the files' names; None for the plain ones.
    """

    folder: Path
    variant: str | None = None

    @cached_property
    def paths(self) -> list[Path]:
        """The files, in the order in which transformers reads them; empty if there is none.

        Raises:
            CheckpointError: an index that is no index, or names files that are not there.
        """
        config = _json(self.folder / "config.json")
        named = config.get("transformers_weights")
        names = [named] if named else [_with_variant(name, self.variant) for name in NAMES]
        first = next((p for p in (self.folder / n for n in names) if p.is_file()), None)
        if first is None:
            return []
        files = _shards(first) if INDEX in first.name else [first]
        kind = config.get("model_type")
        # No `get`: the mapping imports what it is asked for, and its `get` does not.
        known = [CONFIG_MAPPING[kind]] if kind in CONFIG_MAPPING else []
        extra = [self.folder / name for c in known for name in getattr(c, "extra_files", ())]
        return [*files, *(p for p in extra if p.is_file() and p not in files)]

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it; the last one, if several do."""
        return {name: path for path in self.paths for name in self._names(path)}

    def _names(self, path: Path) -> list[str]:
        try:
            if path.suffix != SAFE:
                return list(self._pickled(path))
            with safe_open(path, "pt") as file:
                return list(file.keys())
        except UNREADABLE as error:
            raise _unreadable(path, error) from None

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the files, on the CPU."""
        path = self.files[name]
        if path.suffix != SAFE:
            return self._pickled(path)[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except UNREADABLE as error:
            raise _unreadable(path, error) from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what `tensor` gives, from the file's header."""
        path = self.files[name]
        if path.suffix != SAFE:
            return tuple(self._pickled(path)[name].shape)
        with safe_open(path, "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    @cached_property
    def integers(self) -> set[str]:
        """Names of the tensors that hold no floating numbers, from the files' headers."""
        found = set()
        for path in self.paths:
            if path.suffix != SAFE:
                held = self._pickled(path).items()
                found |= {name for name, tensor in held if not tensor.is_floating_point()}
                continue
            names = self._names(path)
            with safe_open(path, "pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in names}
            found |= {name for name, kind in kinds.items() if kind.startswith(("I", "U", "BOOL"))}
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in the order of its name, one in memory at a time."""
        for name in sorted(self.files):
            yield name, self.tensor(name)

    def find(self, model: nn.Module, name: str) -> str | None:
        """What the files call a dense tensor of `model`; None if they have none.

        Hub files are written with or without the prefix of the base model (GPT-2, BERT), and
        under the names of older versions of transformers (ViT).
        """
        if name in self.files:
            return name
        written = layout.renamed(model, name)
        return None if written is None else self._called(model, written)

    def _called(self, model: nn.Module, written: str) -> str | None:
        """The name of a tensor that transformers would write by the name `written`."""
        names, prefix = self.files, f"{getattr(model, 'base_model_prefix', '')}."
        for new, old in LEGACY.items():
            if written.endswith(new) and written not in names:
                written = written.removesuffix(new) + old
        for candidate in (written, written.removeprefix(prefix), prefix + written):
            if candidate in names:
                return candidate
        return None

    def names(self, model: nn.Module, name: str) -> set[str]:
        """What the files call that of which a dense tensor of `model` is made."""
        found = self.find(model, name)
        return set(self._parts(model, name)) if found is None else {found}

    def shape_of(self, model: nn.Module, name: str) -> tuple[int, ...] | None:
        """The shape of what `tensor_of` gives, from the files' headers."""
        if (found := self.find(model, name)) is not None:
            return self.shape(found)
        held = self._parts(model, name)
        if any(self.shape(found) != tuple(part.shape) for found, part in held.items()):
            return None
        return tuple(layout.shape_of(model, name)) if held else None

    def tensor_of(self, model: nn.Module, name: str) -> Tensor | None:
        """The folder's tensor for a dense tensor of `model`, put together where the files hold it
        in parts, as each expert's own; None if the folder has none."""
        if (found := self.find(model, name)) is not None:
            return self.tensor(found)
        shape, whole = layout.shape_of(model, name), None
        for found, places in self._parts(model, name, places=True).items():
            part = self.tensor(found)
            whole = part.new_empty(shape.numel()) if whole is None else whole
            whole[places.flatten()] = part.flatten()
        return None if whole is None else whole.view(shape)

    def _parts(self, model: nn.Module, name: str, **how: bool) -> dict[str, Tensor]:
        """What `layout.parts` gives, by the names that the files have; empty if not all are
        there."""
        if layout.shape_of(model, name) is None or layout.renamed(model, name) is not None:
            return {}
        parts = layout.parts(model, name, **how)
        found = {self._called(model, part): places for part, places in parts.items()}
        return {} if None in found else found

    def _pickled(self, path: Path) -> dict[str, Tensor]:
        """What a .bin file holds, mapped into memory where its format can be."""
        if path not in self._mapped:
            try:
                held = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
            except UNREADABLE as error:
                raise _unreadable(path, error) from None
            others = [] if isinstance(held, dict) else [type(held).__name__]
            others = others or [n for n, t in held.items() if not isinstance(t, Tensor)]
            if others:
                raise _unreadable(path, f"it holds {str(others[0])!r}, which is no tensor")
            self._mapped[path] = held
        return self._mapped[path]

    @cached_property
    def _mapped(self) -> dict[Path, dict[str, Tensor]]:
        return {}


def variants(folder: Path) -> list[str]:
    """The variants of which a folder holds weights, by name."""
    stem, ending = SAFE_WEIGHTS_NAME.split(".")
    single = [p.name.split(".")[1] for p in folder.glob(f"{stem}.*.{ending}")]
    index = [p.name.split(".")[-2] for p in folder.glob(f"{SAFE_WEIGHTS_INDEX_NAME[:-5]}.*.json")]
    return sorted({*single, *index})


def every_safetensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All that lies in a folder, in the order of the names: what fingerprints were once made of."""
    files = {}
    for path in sorted(folder.glob(f"*{SAFE}")):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    for name in sorted(files):
        with safe_open(files[name], "pt") as file:
            yield name, file.get_tensor(name)


def _with_variant(name: str, variant: str | None) -> str:
    """model.safetensors -> model.fp16.safetensors."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    named = _json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
        raise _unreadable(index, "it has no weight_map")
    files = [index.parent / name for name in sorted(set(named.values()))]
    if missing := [path.name for path in files if not path.is_file()]:
        raise _unreadable(index, f"{len(missing)} of its files, {missing[0]} first, are not there")
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None
    return data if isinstance(data, dict) else {}


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unreadable(path: Path, why: object) -> CheckpointError:
    said = first_line(why)
    return CheckpointError(f"The base file {path} cannot be read: {said:.200}.")
