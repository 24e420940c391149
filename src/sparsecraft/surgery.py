"""Make the planned edits of a recipe in place, certify them, and take them back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecraft import cost, hub
from sparsecraft.batch import Batch, asks_for_batch, attach
from sparsecraft.budget import Running, run
from sparsecraft.certificate import Certificate, compare, outputs, probes
from sparsecraft.cost import Cost
from sparsecraft.domains import find_starts
from sparsecraft.donor import FFNSpan
from sparsecraft.errors import CertificateError, RecipeError, SurgeryError
from sparsecraft.expansion import Child, expand
from sparsecraft.gathering import gather, opened
from sparsecraft.layer import MoELayer, dense_tensors, matches, unique_tensors
from sparsecraft.losses import check_names
from sparsecraft.origin import Origin, digest
from sparsecraft.planning import PlannedEdit, build_layer, plan, reference_tensor
from sparsecraft.recipe import Recipe
from sparsecraft.sources import Source


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
        origin: the folder, hub id or alias that the dense model came from, if any.
        base_card: name and license of the base, for the checkpoint's README.
        folder: the checkpoint that the model was loaded from, if it was.
        report: what `convert` and `train` measured, as written to report.json.
        hooks: handles of what tells the layers about each batch.
        running: what of its split networks the model runs.
    """

    recipe: Recipe
    plan: list[PlannedEdit]
    layers: list[MoELayer] = field(default_factory=list)
    devices: list[torch.device] = field(default_factory=list)
    dense: dict[str, nn.Module] = field(default_factory=dict)
    digests: dict[str, tuple[torch.dtype, str]] = field(default_factory=dict)
    trainable: frozenset[str] = frozenset()
    origin: str | None = None
    revision: str | None = None
    folder: Path | None = None
    base_card: tuple[str, str | None] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)
    running: Running = field(default_factory=Running)


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did.

    Attributes:
        recipe: name and variant.
        exact_at_start: what the recipe claims.
        certificate: what was measured; None if `certify=False`.
        layers: module path -> kind of experts installed there.
        cost: parameter counts.
        sources: names of the dense models that the experts came from; none if from the converted.
        domains: names of what the routers started from, one for each expert, if anything.
        children: the experts beyond the sources, and what they were mixed from.
    """

    recipe: str
    variant: str
    exact_at_start: bool
    certificate: Certificate | None
    layers: dict[str, str]
    cost: Cost
    sources: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    children: tuple[Child, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def convert(
    model: nn.Module,
    recipe: Recipe,
    data: Any = None,
    *,
    tokenizer: Any = None,
    certify: bool = True,
    seed: int = 0,
    sources: Sequence[str | Path | PreTrainedModel] = (),
    unrelated: bool = False,
    domains: Sequence | Tensor = (),
) -> Report:
    """Turn a dense transformers model into the MoE model of `recipe`, in place.

    Args:
        data: batches to compare on beside a random one: a dataset path (needs `tokenizer`), or
            an iterable of (B, S) token ids or of dicts of model inputs.
        certify: measure the largest output difference to the dense model.
        seed: of the new parameters. The global random state is left as it was.
        sources: dense models of one ancestor with `model` (of LoRA experts: PEFT LoRAs), for the
            experts, see `Recipe.expansion`, and `Recipe.others`; without them `model` gives both.
        unrelated: let sources without a common ancestor pass.
        domains: for routers that start from them, one for each expert, in their order: a data set,
            a list of texts or batches; or their embeddings (E, M). See `sparsecraft.domains`.

    Raises:
        SurgeryError, DonorError, RecipeError: the plan is impossible; nothing has been changed.
        SourceError: the sources do not fit; nothing has been changed.
        CertificateError: the recipe claims to start exactly as the dense model and does not; the
            model has been given back.
    """
    _check_arguments(model, recipe)
    edits = plan(model, recipe)
    given = opened(model, recipe, edits, sources, unrelated=unrelated)
    givers, children = expand(recipe, edits, given, unique_tensors(model).__getitem__, seed)
    probing = probes(model, data, tokenizer, seed) if certify else []
    starts = find_starts(model, recipe, edits, domains, data, tokenizer=tokenizer, seed=seed)
    before = outputs(model, probing)
    digests = {name: (t.dtype, digest(t)) for name, t in dense_tensors(model).items()}
    with _dense_on_failure(model):
        record = _made(model, recipe, edits, given, givers, seed)
        record.digests = digests
        starts.put(record.layers)
        remember_origin(model, record)
        certificate = compare(before, outputs(model, probing)) if certify else None
        if not given:  # a claim is about copies of one model
            check_claim(recipe, certificate)
    report = Report(
        recipe=recipe.name,
        variant=recipe.variant,
        exact_at_start=recipe.exact_at_start,
        certificate=certificate,
        layers={item.site.path: item.edit.experts.kind for item in edits},
        cost=cost.count(model),
        sources=tuple(source.name for source in given),
        domains=starts.names,
        children=children,
    )
    record.report = {"conversion": report.to_dict()}
    return report


def _made(
    model: nn.Module,
    recipe: Recipe,
    edits: list[PlannedEdit],
    given: Sequence[Source],
    givers: Sequence[Source],
    seed: int,
) -> Conversion:
    """The edits, with what their experts start from, by random numbers of this seed alone."""
    cuda = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(cuda)):
        torch.manual_seed(seed)
        record = apply(model, recipe, edits)
        gather(model, recipe, edits, record.layers, given, givers)
    return record


def check_claim(recipe: Recipe, certificate: Certificate | None) -> None:
    if certificate and recipe.exact_at_start and not certificate.exact:
        raise CertificateError(
            f"Recipe {recipe.name!r} should start exactly as the dense model, and does not: "
            f"{certificate}. The dense model was given back."
        )


def remember_origin(model: nn.Module, record: Conversion) -> None:
    if origin := Origin.of(model):
        record.origin, record.revision = origin.name, origin.revision
        record.base_card = (origin.name, hub.license_of(origin.folder))


def _check_arguments(model: Any, recipe: Any) -> None:
    if not (isinstance(model, PreTrainedModel) and isinstance(recipe, Recipe)):
        raise SurgeryError(
            f"convert takes a transformers model and a recipe such as sc.recipes.camelidae(); it "
            f"got {type(model).__name__} and {type(recipe).__name__}."
        )
    if is_converted(model):
        raise SurgeryError(
            f"This model is already converted by {model.sparsecraft.recipe.name!r}; "
            "call sc.revert first."
        )
    check_names({name: 0.0 for stage in recipe.stages for name in stage.losses})


@contextmanager
def _dense_on_failure(model: nn.Module) -> Iterator[None]:
    """Give the dense model back when the block fails, however far it came."""
    try:
        yield
    except BaseException:
        if is_converted(model):
            take_out(model)
        raise


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


def apply(
    model: nn.Module, recipe: Recipe, edits: list[PlannedEdit], *, on_meta: bool = False
) -> Conversion:
    """Install the planned layers in place and freeze what the first stage does not train.

    Args:
        on_meta: leave the new tensors without memory, for a loader that brings their values.
    """
    check_quantization(model, recipe)
    trainable = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
    record = Conversion(recipe, edits, trainable=trainable)
    # All layers are built before the first change, so that a failure leaves the model whole.
    device = "meta" if on_meta else None
    record.layers = [
        build_layer(model, item, number=number, device=device) for number, item in enumerate(edits)
    ]
    record.devices = [reference_tensor(item.donor).device for item in edits]
    model.sparsecraft = record
    for item, layer in zip(edits, record.layers, strict=True):
        _install(model, item, layer, record.dense)
    run(model, "every")  # until a stage has made their routers
    from sparsecraft.checkpoint import save_pretrained

    model.save_pretrained = functools.partial(save_pretrained, model)
    if any(asks_for_batch(item.edit) for item in edits):
        batch = Batch()
        record.hooks = attach(model, batch)
        for layer in record.layers:
            layer.batch = batch
    set_trainable(model, recipe.stages[0].trains)
    return record


def check_quantization(model: nn.Module, recipe: Recipe) -> None:
    found = "nf4" if getattr(model, "is_loaded_in_4bit", False) else None
    if recipe.base_quantization != found:
        raise RecipeError(
            f"Recipe {recipe.name!r} asks for base_quantization={recipe.base_quantization!r} and "
            f"the model was loaded with {found!r}; load it with "
            f"sparsecraft.hub.load_dense(name, quantize={recipe.base_quantization!r})."
        )


def _install(
    model: nn.Module, item: PlannedEdit, layer: MoELayer, dense: dict[str, nn.Module]
) -> None:
    site = item.site
    training = model.get_submodule(site.path).training
    base = FFNSpan(model, site) if site.spans_siblings else model.get_submodule(site.path)
    if item.edit.place != "replace":
        layer.base = base
    layer.train(training)
    if site.spans_siblings:
        for path in base.paths.values():
            dense[path] = dense.get(path, model.get_submodule(path))
            model.set_submodule(path, nn.Identity())
        base.train(training)
    else:
        dense[site.path] = dense.get(site.path, base)
    model.set_submodule(site.path, layer)


def set_trainable(model: nn.Module, trains: tuple[str, ...]) -> list[str]:
    """Let exactly the parameters that `trains` names require gradients; return their names.

    Args:
        trains: `experts`, `router`, `all`, or globs over parameter names.

    Raises:
        RecipeError: a word that names no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = {word: {n for n in names if matches(n, word)} for word in trains}
    routers = [e.router for e in conversion_of(model).recipe.edits if e.router is not None]
    learned = any(not router.splits for router in routers)  # a split network's may have no weights
    for word, found in chosen.items():
        if not found and not (word == "router" and not learned):
            raise RecipeError(f"The stage trains {word!r}, which names no parameter of the model.")
    wanted = set().union(*chosen.values())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in wanted)
    return sorted(wanted)


def revert(model: nn.Module) -> nn.Module:
    """Give the dense model back, bit for bit.

    Shared tensors that have been trained since the conversion are read again from the base
    folder.

    Raises:
        SurgeryError: the model is dense, or shared tensors have changed and no base folder holds
            the original ones. The model is then left converted.
    """
    record = conversion_of(model)
    tensors = dense_tensors(model) | replaced_tensors(record)
    known = {name: wanted for name, (_, wanted) in record.digests.items()}
    changed = [name for name, tensor in tensors.items() if digest(tensor) != known.get(name)]
    originals = _originals(model, record, changed)
    take_out(model)
    with torch.no_grad():
        for name in changed:
            tensors[name].copy_(originals[name])
    return model


def replaced_tensors(record: Conversion) -> dict[str, Tensor]:
    """Dense name -> tensor of the modules that experts took the place of."""
    replaced = [path for i in record.plan if i.edit.place == "replace" for path in i.site.members]
    modules = {path: record.dense[path] for path in replaced if path in record.dense}
    return {
        f"{path}.{name}": tensor
        for path, module in modules.items()
        for name, tensor in module.named_parameters()
    }


def _originals(model: nn.Module, record: Conversion, names: list[str]) -> dict[str, Tensor]:
    """The tensors as they were before the conversion, read from the base folder."""
    origin = Origin.find(record.origin, record.revision) if names else None
    found = {}
    for name in names:
        dtype, wanted = record.digests.get(name, (None, None))
        tensor = origin.tensor(model, name) if origin else None
        if tensor is None or digest(tensor.to(dtype)) != wanted:
            where = f"its base {record.origin!r} no longer" if origin else "no base folder"
            raise SurgeryError(
                f"{len(names)} tensors of the dense model are not as they were before the "
                f"conversion, {name} among them, and {where} holds the original; "
                "load the dense model again instead of reverting."
            )
        found[name] = tensor
    return found


def take_out(model: nn.Module) -> None:
    """Put the dense modules back where they stood; their tensors are not touched."""
    record = conversion_of(model)
    _follow(model, record)
    # In the reverse order of installation: an outer module has to be back before its parts.
    for path, module in reversed(record.dense.items()):
        model.set_submodule(path, module)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in record.trainable)
    for handle in record.hooks:
        handle.remove()
    del model.sparsecraft
    vars(model).pop("save_pretrained", None)


def _follow(model: nn.Module, record: Conversion) -> None:
    """Move and cast the replaced modules, which were out of sight when the model was."""
    shared = dense_tensors(model)
    now = {d: shared[name].dtype for name, (d, _) in record.digests.items() if name in shared}
    for item, layer in zip(record.plan, record.layers, strict=True):
        if item.edit.place != "replace":
            continue
        device = next(layer.experts.parameters()).device
        for module in (record.dense[path] for path in item.site.members if path in record.dense):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.to(device, now.get(tensor.dtype, tensor.dtype))
