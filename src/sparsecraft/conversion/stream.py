"""Conversion of models that do not fit into memory: tensor by tensor, from file to file.

The dense model is built without memory (on the meta device) and converted there, which gives every
name, shape and dtype. Each tensor is then made from the files of the base and the sources while it
is written, one expert at a time. The folder is the one that `convert` and `save` write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.checkpoint import shards
from sparsecraft.checkpoint.base import usable_base
from sparsecraft.checkpoint.companions import check_settings
from sparsecraft.checkpoint.progress import Progress, bytes_left, continued
from sparsecraft.checkpoint.replacing import claimed
from sparsecraft.checkpoint.save import write_manifest, write_settings
from sparsecraft.checkpoint.shards import SHARD_SIZE
from sparsecraft.checkpoint.space import require
from sparsecraft.checkpoint.tensorfile import Lazy, size_of
from sparsecraft.checkpoint.tensors import WEIGHTS
from sparsecraft.conversion.bar import bytes_bar
from sparsecraft.conversion.convert import Report, check_claim, remember_origin
from sparsecraft.conversion.sources.arrival import arrivals
from sparsecraft.conversion.sources.expansion import expand
from sparsecraft.conversion.sources.gather import donor_tensors, opened
from sparsecraft.conversion.sources.lora_experts import fill
from sparsecraft.conversion.sources.lora_folder import CONFIG
from sparsecraft.conversion.sources.lora_folder import WEIGHTS as WEIGHTS_OF_LORA
from sparsecraft.conversion.sources.source import Source, mean
from sparsecraft.dense import hub
from sparsecraft.dense.digests import digest
from sparsecraft.dense.loading import load_model
from sparsecraft.dense.memory import enough_memory
from sparsecraft.dense.origin import Origin
from sparsecraft.dense.sound import check_weight
from sparsecraft.dense.weights import Weights
from sparsecraft.errors import CheckpointError, RecipeError, check_seed
from sparsecraft.evaluation.certificate import Certificate
from sparsecraft.evaluation.streamed import CannotCompareError, certify_files
from sparsecraft.moe import cost
from sparsecraft.moe.experts.base import Experts
from sparsecraft.moe.names import dense_name, dense_tensors, unique_tensors
from sparsecraft.recipe.formats import VERSION, to_json
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.build import build_parts
from sparsecraft.surgery.install import apply
from sparsecraft.surgery.plan import PlannedEdit, plan

Say = Callable[[str], None]


@enough_memory(
    "Conversion, tensor by tensor,",
    "leave the certificate out (certify=False), which holds a block at a time",
)
def convert_files(
    model: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    sources: Sequence[str | Path] = (),
    unrelated: bool = False,
    dtype: torch.dtype | None = None,
    standalone: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    certify: bool = True,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    progress: bool = False,
    say: Say = lambda line: None,
) -> Report:
    """What `convert` and `save` do, with a few tensors in memory at a time.

    Args:
        model: folder, hub id or alias of the dense model.
        sources: folders, hub ids or aliases of the dense models that give the experts.
        unrelated: let sources without a common ancestor pass.
        dtype: of the converted model; None keeps the dense one's.
        standalone: hold the base's tensors too, so that the folder needs nothing else.
        overwrite: replace an existing folder once the new one is complete.
        resume: go on from the shards that a kill left beside `out`; what differs is an error.
        certify: compare each converted layer with the dense module it stands for, one by one.
        seed: of the new parameters, which are those that `convert` draws with it.
        shard_size: bytes beyond which the tensors are split over several files.
        progress: show a bar on standard error.
        say: called with what a user wants to know beside the report.

    Raises:
        RecipeError: experts that need the dense weights as a whole, such as split networks.
        SurgeryError, DonorError, SourceError, HubError: as of `convert`.
        CertificateError: the recipe claims to start exactly as the dense model and does not.
        CheckpointError: the folder cannot be written, or not be resumed.
    """
    check_seed(seed)
    with claimed(out, overwrite, keep_partial=True) as out:
        _check_recipe(recipe)
        stream = _Stream(model, recipe, sources, dtype=dtype, unrelated=unrelated, seed=seed)
        check_settings(stream.model)
        tensors = stream.tensors(out, standalone)
        say(_require(out, tensors, stream.memory(certify)))
        task = stream.task(seed=seed, standalone=standalone, shard_size=shard_size)
        with continued(out, task, overwrite=overwrite, resume=resume) as begun:
            _write(begun, tensors, shard_size, progress, say)
            certificate = stream.certificate(begun.folder, seed, say) if certify else None
            report = stream.report(certificate)
            write_settings(stream.model, begun.folder, stream.base, None)
            write_manifest(stream.model, begun.folder, stream.base, begun.finished)
    return report


def _check_recipe(recipe: Recipe) -> None:
    """Refuse what is not made from copies and random numbers alone."""
    for edit in recipe.edits:
        if edit.router and edit.router.starts_from:
            raise RecipeError(
                f"Recipe {recipe.name!r} starts its routers by {edit.router.scorer.start.kind!r}, "
                "which needs the model to run; convert in memory (sc.convert, or without --stream)."
            )
        what = "a quantized base" if recipe.quantization else edit.experts.needs_memory
        if what:
            raise RecipeError(
                f"Recipe {recipe.name!r} has {what}, which tensor by tensor cannot be made; "
                "convert in memory (sc.convert, or without --stream)."
            )
        if edit.router and edit.router.of_domains:
            raise RecipeError(
                f"The routers of recipe {recipe.name!r} start from domains or data, which the "
                "whole model reads; convert in memory (sc.convert, or without --stream)."
            )


def _require(out: Path, tensors: dict[str, Lazy], memory: int) -> str:
    """One line on the disk and memory that the conversion needs and that are free.

    Raises:
        ResourceError: not enough disk.
    """
    disk = sum(map(size_of, tensors.values())) - bytes_left(out)
    return require(out, disk=disk, memory=memory, task="Conversion, tensor by tensor,")


class _Stream:
    """A conversion of which only names and shapes are in memory."""

    def __init__(
        self,
        name: str | Path,
        recipe: Recipe,
        given: Sequence,
        *,
        dtype: torch.dtype | None,
        unrelated: bool,
        seed: int,
    ):
        self.origin = Origin.at(hub.resolve(name))
        # By transformers, which says what is missing; without memory otherwise as load_dense does.
        self.model = model = load_model(self.origin.folder, dtype, "meta")
        self.recipe, self.dtype = recipe, model.dtype
        self.weights = {name for name, _ in model.named_parameters()}
        self.given = [str(source) for source in given]
        self.edits = plan(model, recipe)
        self.sources = opened(model, recipe, self.edits, self.given, unrelated=unrelated)
        self.networks, self.children = expand(recipe, self.edits, self.sources, self._base, seed)
        self.own = set(donor_tensors(self.edits)) if self.sources else set()
        self.drawn = _Drawn(model, self.edits, seed, self.sources)
        self.dense_names = list(unique_tensors(model))
        self.record = apply(model, recipe, self.edits, on_meta=True)
        remember_origin(self.record, self.origin)
        self.base: Origin | None = None

    def tensors(self, out: Path, standalone: bool) -> dict[str, Lazy]:
        """Name -> tensor of all that the checkpoint `out` holds."""
        self._check_weights()
        self.base = usable_base(self.model, out, standalone)
        if self.base is None:
            found = ((name, self._base(name)) for name in self.dense_names)
            self.record.digests = {name: (t.dtype, digest(t)) for name, t in found}
        made, new = {}, self._new()
        for name, tensor in unique_tensors(self.model).items():
            dense = dense_name(self.model, name)
            make = new[name] if dense is None else self._dense(dense, tensor)
            if make is not None:
                made[name] = Lazy(tensor.dtype, tuple(tensor.shape), make)
        return made

    def _base(self, name: str) -> Tensor:
        """The dense model's tensor, as it would be loaded."""
        tensor = self.origin.tensor(self.model, name)
        if tensor is None:
            raise CheckpointError(
                f"{self.origin.folder} has no tensor {name!r}; convert the model in memory."
            )
        if name in self.weights:
            check_weight(name, tensor, self.origin.folder, CheckpointError)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _check_weights(self) -> None:
        """Refuse a base or a source with something that is no weight, before a file is begun."""
        means = self.recipe.others == "mean"
        for name in self.dense_names:
            self._base(name)
            for source in self.sources:
                if name in self.own or (means and name in self.weights):
                    source.tensor(name)
        self.arrived = arrivals(self.sources, self.weights)

    def _dense(self, name: str, tensor: Tensor) -> Callable[[], Iterable[Tensor]] | None:
        """What makes a dense tensor; None if the base holds it."""
        kept = self.base is None
        means = self.sources and self.recipe.others == "mean" and tensor.is_floating_point()
        if means and name not in self.own:
            read = lambda: mean(self.sources, name).to(tensor.dtype)  # noqa: E731
            kept = kept or digest(read()) != digest(self._base(name))
        else:
            read = partial(self._base, name)
        return (lambda: (read(),)) if kept else None

    def _new(self) -> dict[str, Callable[[], Iterable[Tensor]]]:
        paths = {module: path for path, module in self.model.named_modules()}
        makers = {}
        for number, (item, layer) in enumerate(zip(self.edits, self.record.layers, strict=True)):
            copied = layer.experts.copied(item.donor) or ()
            for name in unique_tensors(layer):
                part, _, leaf = name.partition(".")
                if part == "experts" and leaf in copied:
                    make = partial(self._bank, item, layer.experts, leaf)
                elif part in ("experts", "router"):
                    make = partial(self.drawn.tensor, number, name)
                else:
                    continue
                makers[f"{paths[layer]}.{name}"] = make
        return makers

    def _bank(self, item: PlannedEdit, bank: Experts, leaf: str) -> Iterator[Tensor]:
        """The experts of one bank, one after the other."""
        readers = [network.tensor for network in self.networks] or [self._base]
        last, tensor, dtype = None, None, unique_tensors(bank)[leaf].dtype
        for e in range(bank.num_experts):
            chosen = e * len(readers) // bank.num_experts
            if chosen != last:
                last, donor = chosen, item.donor.of(readers[chosen])
                tensor = bank.copied(donor)[leaf].detach().to(dtype)
            yield tensor

    def memory(self, certify: bool) -> int:
        """Bytes in memory at a time: the largest tensor or expert and what it is made from; for the
        certificate the largest layer and its dense module."""
        tensors = [t.numel() * t.element_size() for t in dense_tensors(self.model).values()]
        layers = [cost.bytes_of(layer) for layer in self.record.layers]
        wide = max(1, 4 // self.dtype.itemsize)  # the certificate computes in float32
        counts = [item.edit.experts.num_experts for item in self.edits]
        made = max(n // count for n, count in zip(layers, counts, strict=True))
        made = wide * max(layers) if certify else made
        if self.children:  # in float32, beside one tensor of each of its ancestors
            expert = 4 * max(layers) // len(self.networks) // self.dtype.itemsize
            made = max(made, expert * (1 + len(self.networks) // 4))
        return 2 * max(*tensors, made)

    def task(self, **options: Any) -> dict[str, Any]:
        """All that the files depend on, as JSON data."""
        return {
            "options": {"dtype": str(self.dtype), **options},
            "recipe": to_json(self.recipe),
            "base": _stamps(self.origin.folder),
            "sources": {f"{i}: {s.name}": _stamps(s.folder) for i, s in enumerate(self.sources)},
            "versions": {"sparsecraft": VERSION, "torch": str(torch.__version__)},
        }

    def certificate(self, folder: Path, seed: int, say: Say) -> Certificate | None:
        """Of the tensors in `folder`, layer by layer.

        Raises:
            CertificateError: the recipe claims to start exactly as the dense model and does not.
        """
        # A claim is about copies of one model.
        claims = self.recipe.exact_at_start and not self.sources
        try:
            written = shards.readers(folder / WEIGHTS)
            certificate = certify_files(self.model, self._base, written, seed, claims=claims)
        except CannotCompareError as error:
            say(f"No certificate layer by layer of this model: {error}.")
            return None
        if claims:
            check_claim(self.recipe, certificate)
        return certificate

    def report(self, certificate: Certificate | None) -> Report:
        """Also remembered for report.json."""
        report = Report(
            recipe=self.recipe.name,
            variant=self.recipe.variant,
            exact_at_start=self.recipe.exact_at_start,
            certificate=certificate,
            layers={item.site.path: item.edit.experts.kind for item in self.edits},
            cost=cost.count(self.model),
            sources=tuple(source.title for source in self.sources),
            children=self.children,
            arrived=self.arrived,
            left_out=self.record.left_out,
        )
        self.record.report = {"conversion": report.to_dict()}
        return report


class _Drawn:
    """What a recipe draws at random, as `convert` draws it, and LoRAs that sources bring; one layer
    in memory at a time."""

    def __init__(
        self, model: nn.Module, edits: Sequence[PlannedEdit], seed: int, sources: Sequence[Source]
    ):
        self.model, self.edits, self.sources, self.states = model, edits, sources, []
        self.number, self.tensors = -1, {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for number in range(len(edits)):
                self.states.append(torch.get_rng_state())
                self._build(number)

    def _build(self, number: int) -> dict[str, Tensor]:
        item = self.edits[number]
        parts = build_parts(self.model, item, number=number, device="cpu")
        if self.sources and item.edit.experts.comes_from == "lora":
            fill(parts[0], item, self.sources)
        return {
            f"{name}.{leaf}": tensor
            for name, part in zip(("experts", "router"), parts, strict=True)
            if part is not None
            for leaf, tensor in unique_tensors(part).items()
        }

    def tensor(self, number: int, name: str) -> Iterable[Tensor]:
        """A tensor of the layer of one planned edit, by its name in the layer."""
        if self.number != number:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self.states[number])
                self.number, self.tensors = number, self._build(number)
        yield self.tensors[name]


def _stamps(folder: Path) -> dict[str, Any]:
    """File name -> size and time of change of what a dense model is read from."""
    configs = (folder / name for name in ("config.json", CONFIG, WEIGHTS_OF_LORA))
    paths = [*filter(Path.is_file, configs), *Weights(folder).paths]
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in paths}


def _write(
    begun: Progress, tensors: dict[str, Lazy], shard_size: int, progress: bool, say: Say
) -> None:
    """Write the shards that are not finished."""
    if begun.finished:
        say(f"Going on: {len(begun.finished)} finished file(s) were left and are kept.")
    with bytes_bar(sum(map(size_of, tensors.values())), progress) as advance:
        counted = {n: Lazy(t.dtype, t.shape, _counted(t, advance)) for n, t in tensors.items()}
        path = begun.folder / WEIGHTS
        for digests in begun.finished.values():
            advance(sum(size_of(tensors[name]) for name in digests))
        shards.write(path, counted, shard_size, dict(begun.finished), begun.finish)


def _counted(tensor: Lazy, advance: Callable[[int], None]) -> Callable[[], Iterator[Tensor]]:
    def make() -> Iterator[Tensor]:
        for piece in tensor.make():
            yield piece
            advance(piece.numel() * piece.element_size())

    return make
