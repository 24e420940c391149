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

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from sparsecraft.dense import layout
from sparsecraft.dense.jsonfile import check_regular, read_object
from sparsecraft.dense.safefile import SafeFile
from sparsecraft.errors import CheckpointError, first_line

NAMES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
INDEX, SAFE = ".index", ".safetensors"
# What layer norms' tensors were called before torch had layer norms.
LEGACY = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


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
        path = self.folder / "config.json"
        config = read_object(path, CheckpointError) if path.exists() else {}
        named = config.get("transformers_weights")
        if named:
            _check_inside(path, named)
        names = [named] if named else [_with_variant(name, self.variant) for name in NAMES]
        first = next((p for p in (self.folder / n for n in names) if p.is_file()), None)
        if first is None:
            return []
        files = _shards(first) if INDEX in first.name else [first]
        kind = str(config.get("model_type"))
        # No `get`: the mapping imports what it is asked for, and its `get` does not.
        known = [CONFIG_MAPPING[kind]] if kind in CONFIG_MAPPING else []
        extra = [self.folder / name for c in known for name in getattr(c, "extra_files", ())]
        return [*files, *(p for p in extra if p.is_file() and p not in files)]

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it; the last one, if several do."""
        return {name: path for path in self.paths for name in self._names(path)}

    @property
    def extent(self) -> tuple[int, int]:
        """How many tensors the files hold, and their bytes."""
        return len(self.files), sum(path.stat().st_size for path in self.paths)

    def _names(self, path: Path) -> list[str]:
        return list(self._pickled(path) if path.suffix != SAFE else self._safe(path).entries)

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the files, on the CPU, with memory of its own."""
        path = self.files[name]
        if path.suffix != SAFE:
            return self._pickled(path)[name].clone()
        return self._safe(path).read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what `tensor` gives, from the file's header."""
        path = self.files[name]
        if path.suffix != SAFE:
            return tuple(self._pickled(path)[name].shape)
        return self._safe(path).entries[name].shape

    @cached_property
    def integers(self) -> set[str]:
        """Names of the tensors that hold no floating numbers, from the files' headers."""
        found = set()
        for path in self.paths:
            if path.suffix != SAFE:
                held = self._pickled(path).items()
                found |= {name for name, tensor in held if not tensor.is_floating_point()}
            else:
                held = self._safe(path).entries.items()
                found |= {name for name, entry in held if not entry.is_floating}
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

    def _safe(self, path: Path) -> SafeFile:
        if path not in self._opened:
            self._opened[path] = SafeFile.open(path, CheckpointError)
        return self._opened[path]

    @cached_property
    def _opened(self) -> dict[Path, SafeFile]:
        return {}

    def _pickled(self, path: Path) -> dict[str, Tensor]:
        """What a .bin file holds, mapped into memory where its format can be."""
        if path not in self._mapped:
            check_regular(path, CheckpointError)
            try:
                held = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
            except Exception as error:  # a damaged one raises what its pickle says
                raise _unreadable(path, error) from None
            others = [] if isinstance(held, dict) else [type(held).__name__]
            others = others or [n for n, t in held.items() if not _is_stored(t)]
            if others:
                raise _unreadable(path, f"it holds {str(others[0])!r}, which is no tensor")
            self._mapped[path] = held
        return self._mapped[path]

    @cached_property
    def _mapped(self) -> dict[Path, dict[str, Tensor]]:
        return {}


def _is_stored(held: object) -> bool:
    """Whether it is a tensor whose numbers the file holds: a view may claim any number of them."""
    return isinstance(held, Tensor) and held.nbytes <= held.untyped_storage().nbytes()


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
        file = SafeFile.open(path, CheckpointError)
        files |= dict.fromkeys(file.entries, file)
    for name in sorted(files):
        yield name, files[name].read(name)


def _with_variant(name: str, variant: str | None) -> str:
    """model.safetensors -> model.fp16.safetensors."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    named = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(named, dict):
        raise _unreadable(index, "it has no weight_map")
    for name in named.values():
        _check_inside(index, name)
    files = [index.parent / name for name in sorted(set(named.values()))]
    if missing := [path.name for path in files if not path.is_file()]:
        raise _unreadable(index, f"{len(missing)} of its files, {missing[0]} first, are not there")
    return files


def _check_inside(source: Path, name: object) -> None:
    """Refuse the name of a file that leads out of the folder."""
    path = PurePath(name) if isinstance(name, str) else None
    if path is None or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise _unreadable(source, f"it names {name!r:.80} as a file, which is none of the folder")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _unreadable(path: Path, why: object) -> CheckpointError:
    said = first_line(why)
    return CheckpointError(f"The base file {path} cannot be read: {said:.200}.")
