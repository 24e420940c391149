"""The folder that a dense model came from: its files, tensor by tensor, and its fingerprint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsecraft.dense.cache import snapshot_in, snapshot_of, snapshots
from sparsecraft.dense.digests import combine, digest
from sparsecraft.dense.door import read_config
from sparsecraft.dense.loading import class_of, model_class
from sparsecraft.dense.packaged import ALIASES, alias_folder, is_alias
from sparsecraft.dense.safefile import stamp_of
from sparsecraft.dense.weights import Weights, every_safetensors, variants
from sparsecraft.errors import CheckpointError


@dataclass(frozen=True)
class Origin:
    """Where the dense model came from.

    Attributes:
        name: a folder, a hub id or an alias.
        folder: its local folder, with config.json and weights.
        revision: the hub's commit, if it came from there.
        subfolder: of the hub's repository, in which the model is; "" for the whole.
        variant: of the weights' file names; None for the plain ones.
    """

    name: str
    folder: Path
    revision: str | None = None
    subfolder: str = ""
    variant: str | None = None

    @classmethod
    def find(cls, name: str | Path | None, revision: str | None = None) -> Origin | None:
        """The origin called `name`, if it exists on disk and holds weights; else None."""
        if not name:
            return None
        aliases = {str(alias_folder(alias)): alias for alias in ALIASES}
        name = aliases.get(str(name), str(name))
        if is_alias(name):
            origin = cls(name, alias_folder(name))
        elif os.path.isdir(name):  # False for a name that is too long for one
            origin = cls.at(Path(name))
        else:
            folder = snapshot_of(name, revision)
            origin = folder and cls.at(folder)
        return origin if origin and origin.is_there else None

    @classmethod
    def at(cls, folder: Path, variant: str | None = None) -> Origin:
        """The origin at a folder, by the name under which others find it: a folder of the hub's
        cache is a commit of a hub id."""
        folder = folder.resolve()
        if snapshot := snapshot_in(folder):
            return cls(snapshot.id, folder, snapshot.commit, snapshot.subfolder, variant)
        aliases = {str(alias_folder(alias)): alias for alias in ALIASES}
        return cls(aliases.get(str(folder), str(folder)), folder, variant=variant)

    @classmethod
    def of(cls, model: nn.Module) -> Origin | None:
        """The origin of a dense model that transformers loaded; None for one built in memory.

        The model knows the name that it was loaded by, and neither revision, subfolder nor
        variant: where there are several on disk, it is the one whose tensors and settings are the
        model's, or most of them.
        """
        name, config = getattr(model, "name_or_path", None), getattr(model, "config", None)
        commit = getattr(config, "_commit_hash", None)  # transformers below 5.24 knows it
        likeliest = cls.find(name, commit)
        found = list(dict.fromkeys([*filter(None, [likeliest]), *cls.named(name)]))
        if commit:
            found = [origin for origin in found if origin.revision == commit] or found
        if len(found) < 2 or next(model.parameters()).is_meta:
            return found[0] if found else None
        best, fewest = found[0], None
        for origin in found:
            count = origin.differences(model)
            if count == (0, 0):
                return origin
            if fewest is None or count < fewest:
                best, fewest = origin, count
        return best

    @classmethod
    def named(cls, name: str | None) -> Iterator[Origin]:
        """All that may have been loaded by a name: its commits, their subfolders and variants."""
        if not name or is_alias(name):
            return
        roots = [Path(name)] if os.path.isdir(name) else snapshots(name)
        for root in roots:
            configs = [root / "config.json", *sorted(root.glob("*/config.json"))]
            for folder in (config.parent for config in configs if config.is_file()):
                for variant in (None, *variants(folder)):
                    origin = cls.at(folder, variant)
                    with suppress(CheckpointError):  # not all of it was fetched
                        if origin.is_there:
                            yield origin

    @property
    def is_there(self) -> bool:
        """Whether it is on disk still, with weights."""
        return bool(self.weights.paths) and all(path.is_file() for path in self.weights.paths)

    @cached_property
    def weights(self) -> Weights:
        return Weights(self.folder, self.variant)

    @cached_property
    def seen(self) -> dict[Path, tuple[int, ...]]:
        """The state of the files when this was first asked: when a model was made of them."""
        return self.stamps()

    def has_changed(self) -> bool:
        """Whether a file was written, exchanged or cut short since `seen`."""
        return self.stamps() != self.seen

    def stamps(self) -> dict[Path, tuple[int, ...]]:
        """The state of the files now."""
        return {path: stamp_of(path) for path in self.weights.paths}

    @property
    def loading(self) -> dict[str, str]:
        """The arguments of `from_pretrained` beside the folder."""
        return {} if self.variant is None else {"variant": self.variant}

    def tensor(self, model: nn.Module, name: str) -> Tensor | None:
        """The folder's tensor for a dense tensor of `model`; None if the folder has none."""
        return self.weights.tensor_of(model, name)

    def shape(self, model: nn.Module, name: str) -> tuple[int, ...] | None:
        """The shape of what `tensor` gives, from the file's header; None if the folder has none."""
        return self.weights.shape_of(model, name)

    def holds(self, model: nn.Module, shapes: dict[str, torch.Size]) -> bool:
        """Whether the dense `model` can be built from this folder: its class and its shapes."""
        if model_class(self.folder) is not class_of(model):
            return False
        return all(self.shape(model, name) == tuple(shape) for name, shape in shapes.items())

    def differences(self, model: nn.Module) -> tuple[int, int]:
        """How many tensors and settings of a dense model are not as this folder has them."""
        tensors = 0
        for name, tensor in model.named_parameters():
            if tensor.is_floating_point():
                found = self.tensor(model, name)
                same = found is not None and found.shape == tensor.shape
                tensors += not (same and torch.equal(found.to(tensor.dtype), tensor.detach().cpu()))
        ours, theirs = model.config.to_dict(), read_config(self.folder).to_dict()
        free = {"_name_or_path", "dtype", "quantization_config", "transformers_version"}
        keys = (ours.keys() | theirs.keys()) - free
        return tensors, sum(ours.get(key) != theirs.get(key) for key in keys)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the folder in the order of its name, one in memory at a time."""
        return iter(self.weights)

    def fingerprint(self) -> str:
        """One hash over the names and bytes of every tensor that transformers reads."""
        return combine({name: digest(tensor) for name, tensor in self.tensors()})

    def has_fingerprint(self, wanted: str) -> bool:
        """Whether the folder has this fingerprint, or had it by an older rule: over all
        *.safetensors, whether transformers reads them or not."""
        if self.fingerprint() == wanted:
            return True
        everything = {name: digest(tensor) for name, tensor in every_safetensors(self.folder)}
        return bool(everything) and combine(everything) == wanted
