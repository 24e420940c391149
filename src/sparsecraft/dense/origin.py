"""The folder that a dense model came from: its files, tensor by tensor, and its fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from sparsecraft.dense.digests import combine, digest
from sparsecraft.dense.loading import class_of, model_class
from sparsecraft.dense.packaged import ALIASES, alias_folder, is_alias
from sparsecraft.errors import CheckpointError


@dataclass(frozen=True)
class Origin:
    """Where the dense model came from.

    Attributes:
        name: what the user called it: a folder, a hub id or an alias.
        folder: its local folder, with config.json and safetensors.
        revision: the hub's commit, if it came from there.
    """

    name: str
    folder: Path
    revision: str | None = None

    @classmethod
    def find(cls, name: str | None, revision: str | None = None) -> Origin | None:
        """The origin called `name`, if it exists on disk and holds safetensors; else None."""
        if not name:
            return None
        aliases = {str(alias_folder(alias)): alias for alias in ALIASES}
        name = aliases.get(str(name), str(name))
        if is_alias(name):
            folder = alias_folder(name)
        elif Path(name).is_dir():
            folder = Path(name).resolve()
            name = aliases.get(str(folder), str(folder))
        else:
            cached = try_to_load_from_cache(name, "config.json", revision=revision)
            if not isinstance(cached, str):
                return None
            folder = Path(cached).parent
        origin = cls(name, folder, revision)
        return origin if origin._files else None

    @classmethod
    def of(cls, model: nn.Module) -> Origin | None:
        """The origin of a dense model that transformers loaded; None for one built in memory."""
        config = getattr(model, "config", None)
        return cls.find(getattr(model, "name_or_path", None), getattr(config, "_commit_hash", None))

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it."""
        names = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    names |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"The base file {path} cannot be read: {error}.") from None
        return names

    def tensor(self, model: nn.Module, name: str) -> Tensor | None:
        """The folder's tensor for a dense tensor of `model`; None if the folder has none."""
        if (found := self._find(model, name)) is None:
            return None
        with safe_open(self._files[found], "pt") as file:
            return file.get_tensor(found)

    def shape(self, model: nn.Module, name: str) -> tuple[int, ...] | None:
        """The shape of what `tensor` gives, from the file's header; None if the folder has none."""
        if (found := self._find(model, name)) is None:
            return None
        with safe_open(self._files[found], "pt") as file:
            return tuple(file.get_slice(found).get_shape())

    def holds(self, model: nn.Module, shapes: dict[str, torch.Size]) -> bool:
        """Whether the dense `model` can be built from this folder: its class and its shapes."""
        if model_class(self.folder) is not class_of(model):
            return False
        return all(self.shape(model, name) == tuple(shape) for name, shape in shapes.items())

    def _find(self, model: nn.Module, name: str) -> str | None:
        """What the folder's files call a dense tensor of `model`.

        Hub files are written with or without the prefix of the base model (GPT-2, BERT), and
        under the names of older versions of transformers (ViT).
        """
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        written = name if name in self._files else _name_in_files(model, name)
        for candidate in (written, written.removeprefix(prefix), prefix + written):
            if candidate in self._files:
                return candidate
        return None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the folder in the order of its name, one in memory at a time."""
        for name in sorted(self._files):
            with safe_open(self._files[name], "pt") as file:
                yield name, file.get_tensor(name)

    def fingerprint(self) -> str:
        """One hash over the names and bytes of every tensor in the folder."""
        try:
            return combine({name: digest(tensor) for name, tensor in self.tensors()})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"The base in {self.folder} cannot be read: {error}.") from None


def _name_in_files(model: nn.Module, name: str) -> str:
    """What transformers calls the model's tensor `name` when it saves it."""
    names = revert_weight_conversion(model, {name: torch.empty(0, device="meta")})
    return next(iter(names), name)
