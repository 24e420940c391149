"""The threshold of a split model's routers that gives what is asked, searched for on data.

A threshold is one number for all layers. What a layer runs depends on what the layers before it
have left out, so each threshold is tried with the model as sparse as it will be.

Shapes: T tokens, D width, R experts that are selected from.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsecraft.errors import SparsecraftError
from sparsecraft.evaluation.budget.loads import Batch, Observed, ffn_flops, observe
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.gate import squashed
from sparsecraft.surgery.budget import run, split_layers

log = logging.getLogger("sparsecraft")

# Shares or FLOPs this close below the target will do.
TOLERANCE = 0.01
MAX_TRIALS = 12
# Scores that the first guess is made from.
MAX_SCORES = 2_000_000


@dataclass(frozen=True, slots=True)
class Trial:
    """What was measured at one threshold; `ffn_flops` is relative to the dense networks'."""

    threshold: float
    share: float
    ffn_flops: float
    seen: Observed


class Search:
    """Thresholds of a model, tried on data.

    The scores of the dense model say which threshold should give which share. What the sparse
    model really runs is measured, and the search goes on between the measured points.

    Args:
        batches: as `Source.batches` gives them.
        select: the rule of all layers, one by threshold.

    Attributes:
        dense: the pass with every expert on.
        trials: all that was measured.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], select: str):
        self.model, self.batches, self.select = model, batches, select
        self.layers = split_layers(model)
        self.trials: list[Trial] = []
        self._places: list[float] = []  # of each trial: the share that the dense scores predict
        values: list[Tensor] = []
        each = max(1, MAX_SCORES // (len(self.layers) * len(batches)))

        def keep(layer: MoELayer, x_TD: Tensor) -> None:
            gate = layer.router
            # Tokens from all over the batch, which is sorted by length.
            step = max(1, len(x_TD) * gate.num_experts // each)
            scores_TR = squashed(gate.scorer(x_TD[::step]), gate.spec.squash)
            values.append(critical(scores_TR, self.select).flatten().cpu())

        run(model, "every")
        self.dense = observe(model, batches, visit=keep)
        self._sorted = torch.cat(values).double().sort().values

    def threshold_at(self, place: float) -> float:
        """The threshold that lets this share of the dense model's scores through."""
        rank = (place if self.select == "share" else 1 - place) * (len(self._sorted) - 1)
        low = min(int(rank), len(self._sorted) - 2)
        first, second = self._sorted[low : low + 2].tolist()
        return first + (second - first) * (rank - low)

    def try_at(self, place: float) -> Trial:
        threshold = self.threshold_at(place)
        for layer in self.layers.values():
            layer.router.runs, layer.router.threshold = "sparse", threshold
        seen = observe(self.model, self.batches)
        trial = Trial(threshold, seen.share, ffn_flops(self.model, seen.shares), seen)
        log.info(
            f"threshold {threshold:.4g}: {trial.share:.1%} of the experts, FFN FLOPs "
            f"{trial.ffn_flops:.3f}"
        )
        self.trials.append(trial)
        self._places.append(place)
        return trial

    def below(
        self, target: float, of: Callable[[Trial], float], tolerance: float = TOLERANCE
    ) -> Trial:
        """The trial with the largest `of` that is at most `target`; searches until one is near.

        Bisection between measured points, by the line through them as long as both ends move.

        Raises:
            SparsecraftError: the smallest that there is exceeds the target.
        """
        aim = target - tolerance / 2
        low, high = self._bracket(target, of)
        last = 0
        for _ in range(MAX_TRIALS):
            known = self._best(target, of)
            if known is not None and target - of(known) <= tolerance:
                break
            (left, under), (right, over) = low, high
            if right - left < 1e-6:
                break
            place = left + (right - left) * (aim - under) / max(over - under, 1e-9)
            if abs(last) > 1 or not left < place < right:
                place = (left + right) / 2
            found = of(self.try_at(place))
            if found <= target:
                low, last = (place, found), min(last, 0) - 1
            else:
                high, last = (place, found), max(last, 0) + 1
        best = self._best(target, of) or self.try_at(0.0)
        if of(best) > target:
            raise SparsecraftError(
                f"The target is {target:g} and the least that a threshold gives on this data is "
                f"{of(best):.3f}; ask for more."
            )
        return best

    def points(self, keep: Trial) -> list[tuple[float, float]]:
        """(share, threshold) by ascending share, without those where the threshold turns back.

        Later layers see what earlier ones left out, so that a share may by a hair fall where it
        should rise. `keep` stays in any case.
        """
        kept: list[Trial] = []
        for trial in sorted(self.trials, key=lambda trial: trial.share):
            while kept and trial is keep and not self._follows(kept[-1], trial):
                kept.pop()
            if not kept or self._follows(kept[-1], trial):
                kept.append(trial)
        return [(trial.share, trial.threshold) for trial in kept]

    def _follows(self, first: Trial, second: Trial) -> bool:
        step = second.threshold - first.threshold
        return second.share > first.share and (step > 0 if self.select == "share" else step < 0)

    def _best(self, target: float, of: Callable[[Trial], float]) -> Trial | None:
        return max((t for t in self.trials if of(t) <= target), key=of, default=None)

    def _bracket(
        self, target: float, of: Callable[[Trial], float]
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """(place, value) on both sides of the target: measured, or where nothing was, predicted."""

        def predicted(place: float) -> float:
            shares = {}
            for name, layer in self.layers.items():
                shared = layer.router.spec.shared / layer.router.num_experts
                shares[name] = shared + place * (1 - shared)
            share = sum(shares.values()) / len(shares)
            return of(Trial(math.nan, share, ffn_flops(self.model, shares), Observed()))

        known = [(place, of(t)) for place, t in zip(self._places, self.trials, strict=True)]
        low = max((p for p in known if p[1] <= target), default=(0.0, predicted(0.0)))
        high = min((p for p in known if p[1] > target and p[0] > low[0]), default=None)
        return low, high or (1.0, predicted(1.0))


def critical(scores_TR: Tensor, select: str) -> Tensor:
    """The threshold at which each expert begins to run, (T, R); see `selection.select`.

    Under `share` an expert runs above this threshold, under the other rules below it.
    """
    match select:
        case "threshold":
            return scores_TR
        case "relative":
            best_T1 = scores_TR.max(-1, keepdim=True).values
            return torch.where(scores_TR == best_T1, 1.0, scores_TR / best_T1.clamp_min(1e-30))
    sorted_TR, order_TR = scores_TR.sort(dim=-1, descending=True, stable=True)
    before_TR = sorted_TR.cumsum(-1) - sorted_TR
    before_TR = before_TR / sorted_TR.sum(-1, keepdim=True).clamp_min(1e-30)
    return torch.empty_like(before_TR).scatter_(-1, order_TR, before_TR)
