"""Which threshold, or how many experts, bring a split model to a share of its FLOPs, on data.

The threshold is one number for all layers; `analysis.thresholds` finds it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparsecraft.checkpoint.load import load_any
from sparsecraft.checkpoint.save import save
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.budget.loads import (
    Batch,
    Observed,
    Source,
    ffn_flops,
    model_flops,
    observe,
)
from sparsecraft.evaluation.budget.thresholds import Search, Trial
from sparsecraft.moe.layer import MoELayer
from sparsecraft.surgery.budget import run, set_budget, split_layers, unchanged, untrained
from sparsecraft.surgery.record import conversion_of, tokenizer_of
from sparsecraft.surgery.rollback import atomic

MAX_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Setting:
    """What reaches one target.

    Attributes:
        target_flops: as asked.
        share: of the experts that run, mean over layers and real tokens: what `set_budget` takes.
        threshold: of the rule; None for top-k.
        k: experts that top-k selects beside the shared ones; None for the other rules.
        ffn_flops: of the split networks, routers included, over those of the dense networks.
        model_flops: of the whole model over those of the dense one.
        loss: on the data, in nats per label; None for models without one.
        layers: layer -> share of its experts that run.
    """

    target_flops: float
    share: float
    threshold: float | None
    k: int | None
    ffn_flops: float
    model_flops: float
    loss: float | None
    layers: dict[str, float]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        settings: one for each target; the model is left at the first.
        points: (share, threshold) as stored with the model; empty for top-k.
        loss_dense: on the same data with every expert on.
        select: the rule.
    """

    settings: tuple[Setting, ...]
    points: tuple[tuple[float, float], ...]
    loss_dense: float | None
    select: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = []
        for found in self.settings:
            how = f"k {found.k}" if self.select == "top_k" else f"threshold {found.threshold:.4g}"
            lines.append(
                f"target {found.target_flops:g}: {how}, {found.share:.1%} of the experts, FFN "
                f"FLOPs {found.ffn_flops:.3f} of dense (routers included), model FLOPs "
                f"{found.model_flops:.3f}"
            )
            if found.loss is not None:
                lines[-1] += f", loss {found.loss:.4f} (dense {self.loss_dense:.4f})"
        return "\n".join(lines)


@atomic
def calibrate(
    model: nn.Module | str | Path,
    data: Any,
    *,
    target_flops: float | Sequence[float] = 0.5,
    tokenizer: Any = None,
    max_tokens: int | None = MAX_TOKENS,
    max_length: int | None = None,
) -> Calibration:
    """Find what brings the split networks of a model to a share of their FLOPs, and set it.

    For rules by threshold: search for the threshold at which the FLOPs, measured on the data with
    the model running sparse, are at most the target and at most 0.01 below it, if such a threshold
    exists. What was measured replaces an earlier calibration, and `set_budget` takes any share
    between. For top-k, k follows from the sizes; the data gives the losses.

    Args:
        model: a converted model, changed in place, or a checkpoint folder, which is saved again.
        data: files, folders or hub datasets; or an iterable of dicts of model inputs, or of
            (B, S) token ids.
        target_flops: FLOPs of the split networks per token, their routers included, over those of
            the dense networks; mean over the real tokens and over the layers by their FLOPs. Of
            several the first is the one that is set.
        max_tokens: tokens of the data that are read at most; None reads all.
        max_length: longer rows are dropped; None is as in `evaluate`.

    Raises:
        SparsecraftError: no split networks, untrained routers, or a target out of reach. The model
            is then as it was.
        DataError: no data.
    """
    targets = [target_flops] if isinstance(target_flops, (int, float)) else list(target_flops)
    folder = Path(model) if isinstance(model, (str, Path)) else None
    if folder is not None:
        model, own = load_any(str(folder))
        tokenizer = tokenizer or own
    select = rule_of(model)
    _check_targets(model, targets)
    source = Source(model, data, tokenizer or tokenizer_of(model), max_length, split="train")
    batches = source.batches(max_tokens)
    if not batches:
        raise DataError("The data holds no batch to calibrate on.")
    with unchanged(model):
        dense, settings, points = _found(model, batches, targets, select)
    _check_finite(dense, settings, points)
    conversion_of(model).running.calibration = points
    set_budget(model, settings[0].share)
    result = Calibration(tuple(settings), tuple(points), dense.loss, select)
    conversion_of(model).report["calibration"] = result.to_dict()
    if folder is not None:
        save(model, folder, overwrite=True)
    return result


def _found(
    model: nn.Module, batches: Sequence[Batch], targets: list[float], select: str
) -> tuple[Observed, list[Setting], list[tuple[float, float]]]:
    """The pass with every expert on, what reaches each target, and what to interpolate between."""
    if select == "top_k":
        run(model, "every")
        dense = observe(model, batches)
        return dense, [_by_formula(model, batches, target) for target in targets], []
    search = Search(model, batches, select)
    chosen = [search.below(target, of=lambda t: t.ffn_flops) for target in targets]
    settings = [
        _setting(model, target, trial, trial.threshold)
        for target, trial in zip(targets, chosen, strict=True)
    ]
    return search.dense, settings, search.points(keep=chosen[0])


def _check_finite(
    dense: Observed, settings: list[Setting], points: list[tuple[float, float]]
) -> None:
    """Refuse what was measured on a model that does not compute numbers."""
    found = [dense.loss, *(s.loss for s in settings), *(n for point in points for n in point)]
    if not all(number is None or math.isfinite(number) for number in found):
        raise SparsecraftError(
            "The model's loss or scores on this data are not finite, so that nothing can be "
            "measured; evaluate the model (sc.evaluate) and train it again."
        )


def rule_of(model: nn.Module) -> str:
    """The one rule of a model's split networks.

    Raises:
        SparsecraftError: none, several, or routers that nothing has made yet.
    """
    layers = split_layers(model)
    if not layers:
        raise SparsecraftError(
            f"This {type(model).__name__} has no split networks to calibrate; convert it by a "
            "recipe such as moefication, d2dmoe, lte or cmoe."
        )
    rules = sorted({layer.router.spec.select.kind for layer in layers.values()})
    if len(rules) > 1:
        raise SparsecraftError(
            f"The split networks select by {' and '.join(rules)}, which no one threshold is for; "
            "give all of them one rule."
        )
    if untrained(model):
        makers = ", ".join(stage.name for stage in conversion_of(model).recipe.stages)
        raise SparsecraftError(
            f"The routers of this {conversion_of(model).recipe.name} model have not been trained "
            f"(stages: {makers}), so that no budget below 1 makes sense; run "
            "`sparsecraft train DIR --data ... --out DIR2` first."
        )
    return rules[0]


def _check_targets(model: nn.Module, targets: list[float]) -> None:
    """Refuse targets that no number of experts can reach, before any data is read."""
    if not targets:
        raise SparsecraftError("target_flops is empty; name a share of the FLOPs such as 0.5.")
    layers = split_layers(model)
    router = ffn_flops(model, dict.fromkeys(layers, 0.0))
    least = ffn_flops(model, {name: _least(layer) for name, layer in layers.items()})
    for target in targets:
        number = isinstance(target, (int, float)) and not isinstance(target, bool)
        if not (number and 0 < target <= 1):
            raise SparsecraftError(
                f"target_flops is {target!r}; it is a share of the dense networks' FLOPs, above 0 "
                "and at most 1."
            )
        if target < least:
            raise SparsecraftError(
                f"target_flops is {target:g} and the routers alone take {router:.3f}; with the "
                f"fewest experts that can run the least is {least:.3f}. Ask for more, or convert "
                "with smaller routers or smaller experts."
            )


def _least(layer: MoELayer) -> float:
    """The smallest share of a layer's experts that its rule can take."""
    return layer.router.spec.least / layer.router.num_experts


def _by_formula(model: nn.Module, batches: Sequence[Batch], target: float) -> Setting:
    """The most experts whose FLOPs, by `cost.split_flops`, are at most the target."""
    layers = split_layers(model)
    counts = {layer.router.num_experts for layer in layers.values()}
    best = None
    for share in sorted({n / count for count in counts for n in range(1, count)}):
        if any(share < _least(layer) for layer in layers.values()):
            continue
        taken = {n: _taken(layer, share) for n, layer in layers.items()}
        if ffn_flops(model, taken) <= target:
            best = share
    if best is None:  # experts of several numbers: the least of each is no common share
        raise SparsecraftError(
            f"target_flops is {target:g}, and no share of the experts of every layer is as cheap; "
            "ask for more."
        )
    set_budget(model, best)
    seen = observe(model, batches)
    ffn = ffn_flops(model, seen.shares)
    k = max(layer.router.k for layer in layers.values())
    trial = Trial(math.nan, best, ffn, seen)
    return dataclasses.replace(_setting(model, target, trial, None), k=k)


def _taken(layer: MoELayer, share: float) -> float:
    count = layer.router.num_experts
    return math.ceil(share * count - 1e-9) / count


def _setting(model: nn.Module, target: float, trial: Trial, threshold: float | None) -> Setting:
    return Setting(
        target_flops=float(target),
        share=trial.share,
        threshold=threshold,
        k=None,
        ffn_flops=trial.ffn_flops,
        model_flops=model_flops(model, trial.ffn_flops),
        loss=trial.seen.loss,
        layers=trial.seen.shares,
    )
