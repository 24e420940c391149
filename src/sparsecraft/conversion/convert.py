"""convert(): plan, sources, domains, install, certify, report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecraft.checkpoint.base import card_of
from sparsecraft.checkpoint.pretrained import writes_ours
from sparsecraft.conversion.domains.router_starts import check_given, find_starts
from sparsecraft.conversion.sources.arrival import arrivals
from sparsecraft.conversion.sources.expansion import Child, expand
from sparsecraft.conversion.sources.gather import gather, opened
from sparsecraft.conversion.sources.source import Source
from sparsecraft.dense.digests import digest
from sparsecraft.dense.foreign import check_own
from sparsecraft.dense.memory import (
    check_can_train,
    check_in_memory,
    check_new_in_memory,
    enough_memory,
)
from sparsecraft.dense.once import looked_at_once
from sparsecraft.dense.origin import Origin
from sparsecraft.dense.probes import UNREADABLE
from sparsecraft.dense.sound import check_files, check_weights
from sparsecraft.errors import CertificateError, SurgeryError, check_seed
from sparsecraft.evaluation.certificate import Certificate, probes
from sparsecraft.evaluation.layerwise import certify as certify_layers
from sparsecraft.moe import cost
from sparsecraft.moe.cost import Cost
from sparsecraft.moe.losses import check_names
from sparsecraft.moe.names import dense_tensors, unique_tensors
from sparsecraft.moe.outputs import outputs
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.elsewhere import remember
from sparsecraft.surgery.install import apply, on_packed
from sparsecraft.surgery.left_out import UNTIED
from sparsecraft.surgery.plan import PlannedEdit, plan
from sparsecraft.surgery.record import Conversion, check_not_fast, conversion_of, is_converted
from sparsecraft.surgery.rollback import atomic

log = logging.getLogger("sparsecraft")


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
        arrived: source -> how many of its tensors were used, and which were not; see
            `sparsecraft.conversion.sources.arrival`.
        left_out: reason -> modules of the nature that the recipe asks for which it does not reach,
            those of like paths together; see `sparsecraft.surgery.left_out`.
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
    arrived: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        certificate: Certificate | None,
        sources: Sequence[Source],
        domains: tuple[str, ...],
        children: tuple[Child, ...],
    ) -> Report:
        """The report of a model that has just been converted."""
        record = conversion_of(model)
        return cls(
            recipe=record.recipe.name,
            variant=record.recipe.variant,
            exact_at_start=record.recipe.exact_at_start,
            certificate=certificate,
            layers={item.site.path: item.edit.experts.kind for item in record.plan},
            cost=cost.count(model),
            sources=tuple(source.title for source in sources),
            domains=domains,
            children=children,
            left_out=record.left_out,
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@atomic
@enough_memory(
    "Conversion",
    "load the model in bfloat16 (--dtype bfloat16), leave the certificate out (certify=False), or "
    "convert tensor by tensor (--stream)",
)
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
        certify: measure how far each layer is from the dense module that it stands for.
        seed: of the new parameters. The global random state is left as it was.
        sources: dense models of one ancestor with `model` (of LoRA experts: PEFT LoRAs), for the
            experts, see `Recipe.expansion`, and `Recipe.others`; without them `model` gives both.
        unrelated: let sources without a common ancestor pass.
        domains: for routers that start from them, one for each expert, in their order: a data set,
            a list of texts or batches; or their embeddings (E, M). See
            `sparsecraft.conversion.domains.router_starts`.

    Raises:
        SurgeryError, DonorError, RecipeError: the plan is impossible; nothing has been changed.
        SourceError: the sources do not fit; nothing has been changed.
        CertificateError: the recipe claims to start exactly as the dense model and does not; the
            model has been given back.
    """
    _check_arguments(model, recipe, seed)
    check_given(recipe, domains, data, certify)
    recipe = on_packed(model, recipe)
    check_weights(model, SurgeryError)
    names = [name for name, _ in model.named_parameters()]
    origin = _origin_of(model)
    with looked_at_once():
        edits = plan(model, recipe)
        given = opened(model, recipe, edits, sources, unrelated=unrelated)
        networks, children = expand(recipe, edits, given, unique_tensors(model).__getitem__, seed)
        probing = probes(model, data, tokenizer, seed) if certify else []
        starts = find_starts(model, edits, domains, data, tokenizer=tokenizer, seed=seed)
        probing, before = _dense_outputs(model, probing)
        digests = {name: (t.dtype, digest(t)) for name, t in dense_tensors(model).items()}
        record = _made(model, recipe, edits, given, networks, seed)
    record.digests = digests
    starts.put(record.layers)
    remember_origin(record, origin)
    claims = recipe.exact_at_start and not given  # a claim is about copies of one model
    certificate = certify_layers(model, probing, before, claims=claims) if certify else None
    if claims:
        check_claim(recipe, certificate)
    report = Report.of(model, certificate, given, starts.names, children)
    report = dataclasses.replace(report, arrived=arrivals(given, names))
    record.report = {"conversion": report.to_dict()}
    remember(model, "the conversion")
    writes_ours(model)
    return report


def _origin_of(model: nn.Module) -> Origin | None:
    """Where the dense model came from; refused if its weights are integers there."""
    origin = Origin.of(model)
    if origin is not None:
        check_files(model, origin.weights, SurgeryError)
        _ = origin.seen  # what a save compares with
    return origin


def _dense_outputs(
    model: nn.Module, probing: list[dict[str, Tensor]]
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """The probes, without the random one if the family cannot read it, and what the dense model
    gives for them."""
    try:
        found = outputs(model, probing[:1])
    except UNREADABLE as error:
        why = f"{type(model).__name__} does not run on random inputs ({error})"
        log.warning("%s; its layers are compared on other hidden states.", why)
        probing, found = probing[1:], []
    return probing, found + outputs(model, probing[len(found) :])


def _made(
    model: nn.Module,
    recipe: Recipe,
    edits: list[PlannedEdit],
    given: Sequence[Source],
    networks: Sequence[Source],
    seed: int,
) -> Conversion:
    """The edits, with what their experts start from, by random numbers of this seed alone."""
    cuda = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(cuda)):
        torch.manual_seed(seed)
        record = apply(model, recipe, edits)
        gather(model, recipe, edits, record.layers, given, networks)
    if untied := record.left_out.get(UNTIED):
        log.warning(f"Left out, {UNTIED}: {', '.join(untied)}.")
    return record


def check_claim(recipe: Recipe, certificate: Certificate | None) -> None:
    if certificate and recipe.exact_at_start and not certificate.exact:
        raise CertificateError(
            f"Recipe {recipe.name!r} should start exactly as the dense model, and does not: "
            f"{certificate}. The dense model was given back."
        )


def remember_origin(record: Conversion, origin: Origin | None) -> None:
    if origin is not None:
        record.came_from = origin
        record.base_card = card_of(origin)


def _check_arguments(model: Any, recipe: Any, seed: Any) -> None:
    check_seed(seed)
    if not (isinstance(model, PreTrainedModel) and isinstance(recipe, Recipe)):
        raise SurgeryError(
            f"convert takes a transformers model and a recipe such as sc.recipes.camelidae(); it "
            f"got {type(model).__name__} and {type(recipe).__name__}."
        )
    if is_converted(model):
        check_not_fast(model)
        raise SurgeryError(
            f"This model is already converted by {conversion_of(model).recipe.name!r}; "
            "call sc.revert first."
        )
    check_in_memory(model, "convert it")
    check_new_in_memory("sc.convert")
    check_can_train(model)
    check_own(model)
    check_names({name: 0.0 for stage in recipe.stages for name in stage.losses})
