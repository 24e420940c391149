"""Merge the experts of a converted model where the mathematics allows it.

    exact      single experts whose update is linear become part of the dense weights; networks
               that were split are put together again, where all of their parts run
    fixed      the routing is frozen to given weights; then mixtures of updates and of vectors are
               linear too, and E adapters are one adapter of E times the width
    average    the experts' parameters are averaged to one expert (AdaMix, Wang et al. 2022): an
               approximation, reported with what it changes

Shapes: E experts, B sequences, S positions, V classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.checkpoint.pretrained import writes_ours
from sparsecraft.checkpoint.wide import wide_outputs
from sparsecraft.conversion.merging.change import Change, HeldOut, mean_kl, predicts_classes
from sparsecraft.conversion.merging.frozen import frozen_routing
from sparsecraft.conversion.merging.mergeable import (
    How,
    Step,
    check_steps,
    held,
    plan_steps,
    to_rectify,
)
from sparsecraft.dense import memory
from sparsecraft.dense.digests import digest
from sparsecraft.dense.probes import random_probe
from sparsecraft.dense.sound import check_weights
from sparsecraft.errors import CertificateError, MergeError, did_you_mean
from sparsecraft.evaluation.certificate import MAX_DATA_PROBES, Certificate, compare
from sparsecraft.evaluation.history import arrived_lines
from sparsecraft.evaluation.whole import arithmetic, compared
from sparsecraft.moe import cost
from sparsecraft.moe.cost import Cost
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import dense_tensors
from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.stages import Stage
from sparsecraft.surgery.elsewhere import remember
from sparsecraft.surgery.fold import Ledger, fold, scales_the_next
from sparsecraft.surgery.install import apply
from sparsecraft.surgery.plan import plan, rewritten
from sparsecraft.surgery.record import Conversion, check_stands, conversion_of, is_converted
from sparsecraft.surgery.rectify import Setting, holders, setting_of
from sparsecraft.surgery.revert import take_out
from sparsecraft.surgery.rollback import atomic
from sparsecraft.surgery.trainable import set_trainable

HOWS = ("exact", "fixed", "average")

# What the record of a conversion says of the dense model and of the past.
REMEMBERED = "digests shapes vocabulary masters came_from folder base_card report running".split()


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did.

    Attributes:
        how: `exact`, `fixed` or `average`.
        recipe: of the model that was given.
        result: `dense`, or the name of the recipe that is left.
        folded: layer name -> kind of the experts that are dense weights now.
        joined: layer name -> kind of the experts that are one expert now.
        kept: layer name -> kind of the experts that stay as they were.
        certificate: against the given model with the same constant routing; None for `average`.
        change: against the given model.
        cost: parameter counts of the result.
        activation: the field of the dense model's configuration that says ReLU now, if one does.
        arrived: how many dense tensors were to change, how many have, and which have not.
    """

    how: How
    recipe: str
    result: str
    folded: dict[str, str]
    joined: dict[str, str]
    kept: dict[str, str]
    certificate: Certificate | None
    change: Change
    cost: Cost
    activation: str | None = None
    arrived: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        result = "a dense model" if self.result == "dense" else f"recipe {self.result!r}"
        approximate = ", an approximation" if self.how == "average" else ""
        lines = [
            f"Merged ({self.how}{approximate}): {len(self.folded)} layers into dense weights, "
            f"{len(self.joined)} into one adapter each, {len(self.kept)} kept. The result is "
            f"{result} with {self.cost.total:,} parameters.",
            f"Change to the model before: {self.change}.",
        ]
        lines += arrived_lines({"what the experts change": self.arrived})
        if self.certificate:
            same = "the model before" if self.how == "exact" else "it with that fixed routing"
            lines.append(f"Certificate against {same}: {self.certificate}.")
        if self.activation:
            lines.append(f"Training put ReLU into the networks: {self.activation} is 'relu' now.")
        return "\n".join(lines)


@atomic
@memory.enough_memory("Merging", "load the model in bfloat16, or merge where there is more")
def merge(
    model: nn.Module,
    how: How = "exact",
    *,
    weights: Any = None,
    data: Any = None,
    tokenizer: Any = None,
    partial: bool = False,
) -> MergeReport:
    """Merge the experts of a converted model, in place.

    Where no layer is left the model is a plain transformers model again, which its own
    `save_pretrained` writes. Adapters are left: as one adapter after each network, for `sc.save`.

    Args:
        how: `exact`, `fixed` or `average`; see the module.
        weights: for `fixed`: one for each expert; a dict layer name (as of `sc.trace`) -> weights;
            or "measured", the mean routing weights on `data`.
        data: held-out files or batches with labels; the report says the loss before and after.
        tokenizer: for files; by default the one that the model came with.
        partial: merge the layers that can be merged and keep the others, instead of refusing.

    Raises:
        MergeError: a layer has no such form, or the weights do not fit; nothing has been changed.
        CertificateError: the merged model does not compute what it should, as when bfloat16 cannot
            hold the update; the model has been given back.
    """
    record = conversion_of(model)
    _check(model, how, weights, data)
    heldout = HeldOut.read(model, data, tokenizer)
    steps = plan_steps(model, how, weights, heldout.batches)
    check_steps(model, steps, how, partial)
    probes = [random_probe(model), *heldout.probes(MAX_DATA_PROBES)]
    ledger = Ledger(wide=arithmetic(model))
    before, losses = wide_outputs(model, probes, ledger.wide), heldout.losses(model)
    wanted = before
    if frozen := held(steps):
        with frozen_routing(frozen):
            wanted = wide_outputs(model, probes, ledger.wide)
    setting = _rebuild(model, record, steps, how, ledger)
    check_weights(model, MergeError)
    arrived = ledger.arrived(model)
    after = wide_outputs(model, probes, ledger.wide)
    certificate = None if how == "average" else _certify(model, probes, wanted, after, ledger)
    now = heldout.losses(model)
    change = Change(
        max_difference=compare(before, after).max_difference,
        mean_kl=mean_kl(before, after, probes) if predicts_classes(model) else None,
        loss={name: (losses[name], now[name]) for name in losses},
    )
    report = _report(model, record, steps, how, certificate, change, bool(ledger.old))
    return _noted(model, replace(report, activation=setting and str(setting), arrived=arrived))


def _noted(model: nn.Module, report: MergeReport) -> MergeReport:
    """The report, remembered on what is still converted."""
    if is_converted(model):
        conversion_of(model).report["merge"] = report.to_dict()
        remember(model, "the merge")
    return report


def _certify(
    model: nn.Module,
    probes: list[dict[str, Any]],
    wanted: list[Tensor],
    after: list[Tensor],
    ledger: Ledger,
) -> Certificate:
    """Compare the merged model with what it should give: with its weights as they were before they
    were rounded to their type, and as they are.

    Args:
        after: what it gives.
    """
    exact = None
    if ledger.exact:
        exact = wide_outputs(model, probes, ledger.wide, ledger.exact)
    found = compared(wanted, after, exact, model.dtype)
    if not found.exact:
        low = model.dtype in (torch.bfloat16, torch.float16)
        raise CertificateError(
            f"The merged model should compute the same function and does not: {found}. "
            f"The model was given back{'; load it in float32 to merge it' if low else ''}."
        )
    return found


def _report(
    model: nn.Module,
    record: Conversion,
    steps: list[Step],
    how: How,
    certificate: Certificate | None,
    change: Change,
    new_base: bool,
) -> MergeReport:
    """Say what was done, and write it into the record of what is still converted."""
    left = is_converted(model)
    report = MergeReport(
        how=how,
        recipe=record.recipe.name,
        result=conversion_of(model).recipe.name if left else "dense",
        certificate=certificate,
        change=change,
        cost=cost.count(model),
        **{
            word: {s.name: s.item.edit.experts.kind for s in steps if s.action == action}
            for word, action in (("folded", "fold"), ("joined", "join"), ("kept", "keep"))
        },
    )
    if left:
        new = conversion_of(model)
        for name in ("base_card", "folder", "running") if new_base else REMEMBERED:
            setattr(new, name, getattr(record, name))
        new.report = {**record.report}
        if new_base:  # no folder holds the merged weights: a checkpoint will
            new.digests = {n: (t.dtype, digest(t)) for n, t in dense_tensors(model).items()}
            new.folder = record.settings
    return report


def read_weights(text: str | None) -> str | list[float] | None:
    """What a command line says of `weights`: nothing, "measured", or numbers between commas.

    Raises:
        MergeError: it is none of these.
    """
    if text in (None, "measured"):
        return text
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise MergeError(
            f"weights is {text!r}; give numbers such as 0.5,0.3,0.2, or the word 'measured'."
        ) from None


def _check(model: nn.Module, how: str, weights: Any, data: Any) -> None:
    """Refuse a model that is not as it was converted, and arguments that make no sense."""
    check_stands(model)
    check_weights(model, MergeError)
    if how not in HOWS:
        raise MergeError(f"Unknown way to merge {how!r}." + did_you_mean(how, HOWS))
    if (weights is not None) != (how == "fixed"):
        raise MergeError(
            f"how={how!r} with weights={weights!r}: 'fixed' needs weights, such as 'measured', "
            "and the other ways take none."
        )
    if isinstance(weights, str) and weights != "measured":
        raise MergeError(f"weights is {weights!r}; give numbers, or the word 'measured'.")
    if isinstance(weights, str) and data is None:
        raise MergeError("weights='measured' needs held-out data to measure on; pass data=...")


def _rebuild(
    model: nn.Module, record: Conversion, steps: list[Step], how: How, ledger: Ledger
) -> Setting | None:
    """Take all layers out, write those that fold into dense weights, and put the others back."""
    take_out(model)
    ledger.guard(model)
    one = torch.ones(1, dtype=torch.float64)
    left = {}
    # A LoRA on the next module reads what the vector has scaled: it goes in first, or its columns
    # would not be scaled with the others.
    for step in sorted(steps, key=lambda s: scales_the_next(s.item, s.layer.experts)):
        bank = step.layer.experts
        weights_E = one if step.weights_E is None else step.weights_E
        weights_E = weights_E.to(next(bank.parameters()).device)
        if step.action == "keep":
            left[step.item.claim] = (step.layer, None)
            continue
        if how == "average" and bank.num_experts > 1:
            bank = bank.averaged()
        if step.action == "join":
            left[step.item.claim] = (step.layer, bank.joined(weights_E))
        elif step.layer.runs_experts:  # else what runs is the dense module still
            fold(model, step.item, bank, weights_E, ledger)
    setting = None
    if changed := to_rectify(steps):
        setting, _ = setting_of(model, [step.item for step in changed])
        for holder in holders(model, setting):
            for name, value in setting.values(holder).items():
                setattr(holder, name, value)
    if left:
        _install(model, _recipe_left(record.recipe, steps, how), left)
    return setting


def _recipe_left(recipe: Recipe, steps: list[Step], how: How) -> Recipe:
    """The recipe of the layers that stay."""
    left = [step for step in steps if step.action != "fold"]
    edits = rewritten(recipe, [(step.item, _left(step, how)) for step in left]).values()
    recipe = replace(recipe, edits=tuple(edits))
    if not any(edit.experts.parts for edit in edits):
        stages = [s for s in recipe.stages if isinstance(s, Stage)] or [Stage(losses={})]
        stages = tuple(replace(s, runs="sparse", activation=None) for s in stages)
        recipe = replace(recipe, stages=stages)
    if any(edit.router for edit in edits):
        return recipe
    stages = tuple(
        replace(s, losses={}, trains=tuple(w for w in s.trains if w != "router") or ("experts",))
        for s in recipe.stages
        if isinstance(s, Stage)
    )
    recipe = replace(recipe, stages=stages)
    names = {edit.experts.joins for edit in edits}
    name = names.pop() if len(names) == 1 else None
    if name not in (None, recipe.name):
        title = f"One {name} after every FFN, merged from {recipe.name}"
        recipe = replace(recipe, name=name, variant=how, title=title)
    return recipe


def _left(step: Step, how: How) -> Edit:
    """The edit of a layer that stays."""
    edit = step.item.edit
    if step.action == "keep":
        return edit
    single = edit.experts.joined(edit.experts.num_experts if how == "fixed" else 1)
    return replace(edit, experts=single, router=None)


def _install(
    model: nn.Module,
    recipe: Recipe,
    parts: dict[tuple, tuple[MoELayer, dict[str, Tensor] | None]],
) -> None:
    """Convert the dense model, with the experts of other layers or with given tensors."""
    record = apply(model, recipe, plan(model, recipe), on_meta=True)
    for item, layer in zip(record.plan, record.layers, strict=True):
        old, tensors = parts[item.claim]
        if tensors is None:
            layer.experts, layer.router = old.experts, old.router
        for name, value in (tensors or {}).items():
            like = getattr(old.experts, name)
            value = value.to(like.device, like.dtype, copy=True)
            setattr(layer.experts, name, nn.Parameter(value))
        layer.experts.dispatch = old.experts.dispatch
        layer.train(old.training)
    set_trainable(model, recipe.stages[0].trains)
    writes_ours(model)
