"""`merge_and_unload`: adapters that are linear and have no router become dense weights.

The folding is that of `sc.merge(model, "exact")`; here several adapters may stand on each other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sparsecraft.checkpoint.adapter_names import Standing, standings
from sparsecraft.dense.sound import is_finite
from sparsecraft.errors import MergeError, did_you_mean
from sparsecraft.interop.peft.configs import SparsecraftConfig
from sparsecraft.interop.peft.layer import ExpertsTunerLayer
from sparsecraft.moe.experts.base import Experts
from sparsecraft.surgery.fold import Ledger, fold, scales_the_next, why_no_fold
from sparsecraft.surgery.plan import PlannedEdit, plan
from sparsecraft.surgery.rollback import all_or_nothing


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
        found = dict(zip(standings([item.site for item in items]), items, strict=True))
        planned |= {(name, place): item for place, item in found.items()}
        own = [layer for layer in layers if name in layer.sparsecraft_moe]
        banks = {layer.standing: layer.sparsecraft_moe[name].experts for layer in own}
        _check(name, [(item, banks[place]) for place, item in found.items()])
    parts = [
        (planned[name, layer.standing], layer.sparsecraft_moe[name].experts)
        for layer in layers
        for name in dict.fromkeys(names)
        if name in layer.sparsecraft_moe
    ]
    ledger = Ledger()
    ledger.guard(model)
    with all_or_nothing(model):
        # What scales a Linear's input goes in last: what else is added to it reads that input too.
        for item, bank in sorted(parts, key=lambda part: scales_the_next(*part)):
            one = next(bank.parameters()).new_ones(1, dtype=torch.float64)
            fold(model, item, bank, one, ledger)
        if not all(is_finite(parameter) for parameter in ledger.old):
            raise MergeError(
                f"Merging {names} gives weights that are not finite; nothing was merged. Load the "
                "base in float32, or keep the adapter."
            )


def _check(name: str, parts: list[tuple[PlannedEdit, Experts]]) -> None:
    reasons = [_why_not(item, bank) for item, bank in parts]
    refused = [(item, *why) for (item, _), why in zip(parts, reasons, strict=True) if why]
    if not refused:
        return
    (item, reason, hows), others = refused[0], len(parts) - len(refused)
    if others:
        hows = [*hows, f"how='exact', partial=True merges the other {others} layers"]
    ways = f", or save it and call sc.merge(sc.load(folder), how=...): {'; '.join(hows)}"
    raise MergeError(
        f"merge_and_unload cannot merge {len(refused)} of the {len(parts)} layers of adapter "
        f"{name!r}. {item.site.path!r} ({item.edit.experts.kind} experts): {reason}. Keep the "
        f"adapter{ways if hows else ''}."
    )


def _why_not(item: PlannedEdit, bank: Experts) -> tuple[str, list[str]] | None:
    """Why a part of an adapter is no change of dense weights, and what `sc.merge` makes of it."""
    edit = item.edit
    if edit.modality:
        return f"it acts on {edit.modality} tokens alone, and dense weights act on all", []
    average = "how='average' averages the experts"
    if edit.router and edit.router.mixes_tokens:
        return "its slots mix the tokens of a sequence", [average]
    if edit.router and edit.experts.num_experts == 1:
        return "its one expert stands behind a router", ["how='exact'"]
    if edit.router:
        number = edit.experts.num_experts
        reason = f"its router weighs {number} experts, and how depends on the token"
        sums, one = (bank.why_no_fold(edit, item.site, single) for single in (False, True))
        single = " that name one expert" if sums and not one else ""
        return reason, [f"how='fixed' freezes the routing to given weights{single}", average]
    reason = why_no_fold(item, bank, single=True)
    return (reason, []) if reason else None
