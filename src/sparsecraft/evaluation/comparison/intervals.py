"""How sure the difference of two losses is: a paired bootstrap over documents.

Shapes: R documents.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

RESAMPLES, LEVEL, SEED = 9999, 0.95, 0
MOST = 1 << 22  # numbers of the resamples that are in memory at a time
SAME = 5e-5  # nats per label: both ends of an interval print as 0.0000

# What an interval says of a loss, as the end of "its loss is ..."
LOWER, HIGHER, UNCLEAR, EQUAL, UNKNOWN = (
    "lower", "higher", "not shown to differ", "the same", "of one row",
)  # fmt: skip


def difference(nats_R: np.ndarray, baseline_R: np.ndarray, labels_R: np.ndarray) -> dict[str, Any]:
    """How much more a model loses than the baseline, in nats per label: total over total.

    Documents are drawn with replacement, each with its nats of both models and its labels; the
    interval is that of percentiles.

    Returns:
        `difference`; `low` and `high`, the ends of the interval, None of fewer than two documents;
        `verdict`: whether the interval excludes zero, in words.
    """
    more_R = nats_R - baseline_R
    found = float(_per_label(more_R, labels_R))
    if len(labels_R) < 2:
        return {"difference": found, "low": None, "high": None, "verdict": UNKNOWN}
    drawn = stats.bootstrap(
        (more_R, labels_R), _per_label, paired=True, vectorized=True, method="percentile",
        n_resamples=RESAMPLES, confidence_level=LEVEL, batch=max(1, MOST // len(labels_R)),
        random_state=np.random.default_rng(SEED),
    )  # fmt: skip
    low, high = map(float, drawn.confidence_interval)
    return {"difference": found, "low": low, "high": high, "verdict": verdict(low, high)}


def _per_label(more: np.ndarray, labels: np.ndarray, axis: int = -1) -> np.ndarray:
    return more.sum(axis) / labels.sum(axis)


def verdict(low: float, high: float) -> str:
    """What an interval says of the loss."""
    if max(abs(low), abs(high)) < SAME:
        return EQUAL
    return HIGHER if low > 0 else LOWER if high < 0 else UNCLEAR


def in_words(name: str, baseline: str, found: dict[str, Any]) -> str:
    """The sentence about one difference."""
    change = f"{name}: {found['difference']:+.4f} nats per label against {baseline}"
    if found["verdict"] == UNKNOWN:
        return f"{change}, of a single row, so that there is no interval."
    if found["verdict"] == EQUAL:
        return f"{name}: the same loss as {baseline}, to four digits."
    says = "includes zero, so that no difference is shown"
    if found["verdict"] != UNCLEAR:
        says = f"excludes zero: its loss is {found['verdict']}"
    return f"{change}; the 95 % interval, {found['low']:+.4f} to {found['high']:+.4f}, {says}."
