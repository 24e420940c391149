"""How sure the difference of two losses is: a paired bootstrap over documents.

Shapes: R documents of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
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


# Of the documents of a file: what a model loses, what the baseline loses (nats), and their labels.
Losses = tuple[np.ndarray, np.ndarray, np.ndarray]


def difference(files: Sequence[Losses]) -> dict[str, Any]:
    """How much more a model loses than the baseline, in nats per label: total over total.

    Documents are drawn with replacement, each with its nats of both models and its labels, as many
    of each file as it has; the interval is that of percentiles.

    Returns:
        `difference`; `low` and `high`, the ends of the interval, None where no file has two
        documents; `verdict`: whether the interval excludes zero, in words.
    """
    more, labels = [nats - base for nats, base, _ in files], [counts for *_, counts in files]
    found = sum(map(np.sum, more)) / sum(map(np.sum, labels))
    drawn = [number for number, counts in enumerate(labels) if len(counts) > 1]
    if not drawn:
        return {"difference": float(found), "low": None, "high": None, "verdict": UNKNOWN}

    def per_label(*rows: np.ndarray, axis: int = -1) -> np.ndarray:
        def total(of: list[np.ndarray]) -> np.ndarray:
            fixed = sum(values.sum() for values in of if len(values) == 1)
            pairs = zip(drawn, rows, strict=True)
            return fixed + sum(of[number][at.astype(int)].sum(axis) for number, at in pairs)

        return total(more) / total(labels)

    ends = stats.bootstrap(
        [np.arange(len(labels[number])) for number in drawn], per_label, vectorized=True,
        method="percentile", n_resamples=RESAMPLES, confidence_level=LEVEL,
        batch=max(1, MOST // sum(map(len, labels))), random_state=np.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    low, high = map(float, ends)
    return {"difference": float(found), "low": low, "high": high, "verdict": verdict(low, high)}


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
    ends = " to ".join(_signed(found[end]) for end in ("low", "high"))
    return f"{change}; the 95 % interval, {ends}, {says}."


def _signed(value: float) -> str:
    """To four digits, or to two that are not zero."""
    return f"{value:+.4f}" if abs(value) >= SAME or not value else f"{value:+.1e}"
