"""Which layers of a converted model can be merged, into what, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from sparsecraft.conversion.merging.frozen import SUM_TOLERANCE, given_weights, measured_weights
from sparsecraft.errors import MergeError
from sparsecraft.moe.layer import MoELayer
from sparsecraft.recipe.edits import Edit
from sparsecraft.surgery.fold import why_no_fold, written
from sparsecraft.surgery.plan import PlannedEdit
from sparsecraft.surgery.record import conversion_of
from sparsecraft.surgery.rectify import setting_of

How = Literal["exact", "fixed", "average"]


@dataclass(frozen=True, slots=True)
class Step:
    """What becomes of one layer: `fold`, `join` or `keep`, and why it is kept if it is."""

    name: str
    item: PlannedEdit
    layer: MoELayer
    weights_E: Tensor | None
    action: Literal["fold", "join", "keep"]
    reason: str | None = None


def plan_steps(
    model: nn.Module, how: How, weights: Any = None, batches: list[dict] | None = None
) -> list[Step]:
    """What `how` makes of every layer, in the order in which the layers were installed.

    Args:
        weights: as `merge` takes them.
        batches: what "measured" weights are measured on.

    Raises:
        MergeError: the weights do not fit the layers.
    """
    record = conversion_of(model)
    names = {module: name for name, module in model.named_modules()}
    mixed = {
        names[layer]: layer
        for item, layer in zip(record.plan, record.layers, strict=True)
        if item.edit.experts.num_experts > 1 and _freezes(item.edit)
    }
    several = any(item.edit.experts.num_experts > 1 for item in record.plan)
    fixed: dict[str, Tensor] = {}
    if how == "fixed" and (mixed or not several):
        if isinstance(weights, str):
            measured = measured_weights(model, batches or [])
            weights = {name: measured[name] for name in mixed}
        fixed = given_weights(mixed, weights)
    steps = []
    for item, layer in zip(record.plan, record.layers, strict=True):
        name = names[layer]
        weights_E = fixed.get(name)
        if item.edit.experts.parts:
            decision = _decide_parts(item, layer, how)
        else:
            decision = _decide(item, layer, how, weights_E)
        steps.append(Step(name, item, layer, weights_E, *decision))
    return steps


def _freezes(edit: Edit) -> bool:
    mixes = not edit.router.mixes_tokens and not edit.router.splits
    return mixes and edit.modality is None


def _decide_parts(item: PlannedEdit, layer: MoELayer, how: How) -> tuple[str, str | None]:
    """A split network is the dense one again where all of its experts run with weight one."""
    if layer.is_imitation:
        if not layer.runs_experts:
            return "fold", None  # what runs is the dense module still
        return "keep", "it is a network that imitates a Linear, and no dense Linear computes that"
    if how != "exact":
        return "keep", (
            "its experts are the parts of one network, which is their plain sum; frozen weights or "
            "an average are none of it; use how='exact'"
        )
    if layer.router is not None and layer.router.runs != "every":
        return "keep", (
            "its router leaves out experts by token; only the dense function can be merged, that "
            "of sc.set_budget(model, 1.0) (--budget 1.0)"
        )
    reason = layer.experts.why_no_fold(item.edit, item.site, single=False)
    return ("keep", reason) if reason else ("fold", None)


def _decide(
    item: PlannedEdit, layer: MoELayer, how: How, weights_E: Tensor | None
) -> tuple[str, str | None]:
    edit, E = item.edit, item.edit.experts.num_experts
    if edit.modality:
        return "keep", f"it acts on {edit.modality} tokens alone, and dense weights act on all"
    if edit.router and edit.router.mixes_tokens and how != "average":
        return "keep", "its slots mix the tokens of a sequence; use how='average'"
    if how == "exact" and E > 1:
        return "keep", (
            f"the weights of its {E} experts depend on the token; use how='fixed', which freezes "
            "them, or how='average'"
        )
    total = 1.0 if weights_E is None else weights_E.sum().item()
    if edit.experts.joins and how != "exact":
        if E == 1 and edit.router is None:
            return "keep", None  # it is one expert already
        if abs(total - 1) > SUM_TOLERANCE:
            return "keep", f"its weights sum to {total:.6f}, which would scale what it passes on"
        return "join", None
    single = weights_E is None or (weights_E.max() == total == 1)
    reason = why_no_fold(item, layer.experts, single)
    return ("keep", reason) if reason else ("fold", None)


def check_steps(model: nn.Module, steps: list[Step], how: How, partial: bool) -> None:
    """Refuse what cannot be done, before anything is changed."""
    refused = [step for step in steps if step.reason]
    done = [step for step in steps if step.action != "keep"]
    if refused and not (partial and done):
        first = refused[0]
        other = f"; partial=True (--partial) merges the other {len(done)} layers and keeps these"
        rest = other if done else ""
        raise MergeError(
            f"how={how!r} cannot merge {len(refused)} of {len(steps)} layers. "
            f"{first.name!r} ({first.item.edit.experts.kind} experts): {first.reason}{rest}."
        )
    if not done:
        raise MergeError("There is nothing to merge: every layer is a single adapter already.")
    for edit in dict.fromkeys(step.item.source for step in steps):
        actions = {step.action for step in steps if step.item.source == edit}
        if len(actions) > 1:
            raise MergeError(
                f"With these weights some {edit.experts.kind} experts of site {edit.site!r} can be "
                "merged and others cannot, which one recipe does not hold; give weights that sum "
                "to one everywhere, or name one expert everywhere."
            )
    _check_activations(model, steps)
    for kept in (step for step in steps if step.action != "fold"):
        for step in (step for step in steps if step.action == "fold"):
            _check_apart(kept, step)


def to_rectify(steps: Iterable[Step]) -> list[Step]:
    """The layers whose dense form needs ReLU in the place of another activation."""
    return [
        step
        for step in steps
        if step.action == "fold" and step.layer.runs_experts and step.layer.experts.rectified
    ]


def _check_activations(model: nn.Module, steps: list[Step]) -> None:
    """Refuse a dense form that no configuration of the model's class describes."""
    found = to_rectify(steps)
    if not found:
        return
    setting, reason = setting_of(model, [step.item for step in found])
    if setting is None:
        raise MergeError(
            f"{len(found)} split networks have ReLU now, {found[0].name!r} among them, and the "
            f"configuration of a dense {type(model).__name__} cannot say so: {reason}. sc.save "
            "keeps the model as it is."
        )
    if stays := [step for step in steps if step.action != "fold"]:
        raise MergeError(
            f"{found[0].name!r} has ReLU now, which changes the dense model's configuration, and "
            f"{stays[0].name!r} would stay on a base of another one; this model merges whole or "
            "not at all."
        )


def _check_apart(kept: Step, folded: Step) -> None:
    """Refuse to change weights under a layer that reads or scales what they give."""
    if kept.item.site.contains(folded.item.site):
        return
    both_add = folded.item.edit.adds and kept.item.edit.adds
    changed = written(folded.item, folded.layer.experts) if folded.layer.runs_experts else ()
    shared = set(kept.item.site.members) & set(changed)
    if shared and not both_add:
        raise MergeError(
            f"{folded.name!r} would change the weights of {sorted(shared)[0]!r}, on which "
            f"{kept.name!r} stays; merge both, or neither."
        )


def held(steps: list[Step]) -> dict[MoELayer, Tensor]:
    """The layers whose routing the merge freezes, and to which weights."""
    return {s.layer: s.weights_E for s in steps if s.action != "keep" and s.weights_E is not None}
