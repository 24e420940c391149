"""`merge_and_unload`: adapters that are linear and have no router become dense weights.

The folding is that of `sc.merge(model, "exact")`; here several adapters may stand on each other.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsecraft.checkpoint.adapter_names import Standing, standings
from sparsecraft.errors import MergeError, did_you_mean
from sparsecraft.interop.peft.configs import SparsecraftConfig
from sparsecraft.interop.peft.layer import ExpertsTunerLayer
from sparsecraft.surgery.fold import Ledger, fold, has_dense_form, parameters, scales_the_next
from sparsecraft.surgery.plan import PlannedEdit, plan


def fold_adapters(
    model: nn.Module,
    configs: Mapping[str, SparsecraftConfig],
    names: list[str],
    layers: list[ExpertsTunerLayer],
) -> None:
    """Write adapters into the weights of the dense model, as if they stood on each other.

    Args:
        model: the dense model, without our layers.
        configs: adapter name -> its configuration.
        names: the adapters, in the order in which they stand.
        layers: of all adapters, inner ones first.

    Raises:
        MergeError: an adapter is no change of dense weights; nothing has been changed.
    """
    planned: dict[tuple[str, Standing], PlannedEdit] = {}
    for name in dict.fromkeys(names):
        if name not in configs:
            hint = did_you_mean(name, list(configs))
            raise MergeError(f"There is no adapter {name!r} to merge." + hint)
        items = plan(model, configs[name].checked_recipe())
        _check(name, items)
        for place, item in zip(standings([item.site for item in items]), items, strict=True):
            planned[name, place] = item
    parts = [
        (planned[name, layer.standing], layer.sparsecraft_moe[name].experts)
        for layer in layers
        for name in dict.fromkeys(names)
        if name in layer.sparsecraft_moe
    ]
    ledger = Ledger()
    ledger.guard(model)
    try:
        # What scales a Linear's input goes in last: what else is added to it reads that input too.
        for item, bank in sorted(parts, key=lambda part: scales_the_next(part[0])):
            tensors = parameters(bank)
            one = next(iter(tensors.values())).new_ones(1).double()
            fold(model, item, bank, tensors, one, ledger)
        if not all(parameter.isfinite().all() for parameter in ledger.old):
            raise MergeError(
                f"Merging {names} gives weights that are not finite; nothing was merged. Load the "
                "base in float32, or keep the adapter."
            )
    except BaseException:
        ledger.undo()
        raise


def _check(name: str, items: list[PlannedEdit]) -> None:
    reasons = [_why_not(item) for item in items]
    refused = [(item, *why) for item, why in zip(items, reasons, strict=True) if why]
    if not refused:
        return
    (item, reason, hows), others = refused[0], len(items) - len(refused)
    if others:
        hows = [*hows, f"how='exact', partial=True merges the other {others} layers"]
    ways = f", or save it and call sc.merge(sc.load(folder), how=...): {'; '.join(hows)}"
    raise MergeError(
        f"merge_and_unload cannot merge {len(refused)} of the {len(items)} layers of adapter "
        f"{name!r}. {item.site.path!r} ({item.edit.experts.kind} experts): {reason}. Keep the "
        f"adapter{ways if hows else ''}."
    )


def _why_not(item: PlannedEdit) -> tuple[str, list[str]] | None:
    """Why a part of an adapter is no change of dense weights, and what `sc.merge` makes of it."""
    edit = item.edit
    if edit.modality:
        return f"it acts on {edit.modality} tokens alone, and dense weights act on all", []
    average = "how='average' averages the experts"
    if edit.router and edit.router.select == "slots":
        return "its slots mix the tokens of a sequence", [average]
    if edit.router and edit.experts.num_experts == 1:
        return "its one expert stands behind a router", ["how='exact'"]
    if edit.router:
        number = edit.experts.num_experts
        reason = f"its router weighs {number} experts, and how depends on the token"
        single = " that name one expert" if edit.experts.kind == "ffn_lora" else ""
        return reason, [f"how='fixed' freezes the routing to given weights{single}", average]
    reason = has_dense_form(item, single=True)
    return (reason, []) if reason else None
