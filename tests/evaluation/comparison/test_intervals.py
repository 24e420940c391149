"""Intervals against a bootstrap that is written out, and what they say."""

from __future__ import annotations

import numpy as np
import pytest

from sparsecraft.evaluation.comparison import intervals
from sparsecraft.evaluation.comparison.intervals import difference, in_words, verdict


def test_the_interval_is_that_of_a_bootstrap_over_documents(monkeypatch):
    rng = np.random.default_rng(1)
    labels = rng.integers(5, 200, 60).astype(float)
    first = 2.0 * labels + rng.normal(0, 5, 60)
    second = first + 0.05 * labels + rng.normal(0, 3, 60)
    found = difference([(second, first, labels)])
    assert found["difference"] == pytest.approx((second.sum() - first.sum()) / labels.sum())
    rows = rng.integers(0, 60, (9999, 60))
    drawn = (second - first)[rows].sum(1) / labels[rows].sum(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    width = high - low
    assert found["low"] == pytest.approx(low, abs=0.05 * width)
    assert found["high"] == pytest.approx(high, abs=0.05 * width)
    assert found["verdict"] == "higher"
    assert difference([(second, first, labels)]) == found
    monkeypatch.setattr(intervals, "MOST", 1)  # one resample at a time draws the same
    assert difference([(second, first, labels)]) == found


def test_documents_weigh_by_their_labels():
    """Total over total: a document of 90 labels counts nine times one of 10."""
    found = difference([(np.array([90.0, 0.0]), np.zeros(2), np.array([90.0, 10.0]))])
    assert found["difference"] == pytest.approx(0.9)
    assert (found["low"], found["high"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "word", "said"),
    [
        (0.01, 0.02, "higher", "excludes zero: its loss is higher"),
        (-0.02, -0.01, "lower", "excludes zero: its loss is lower"),
        (-0.01, 0.01, "not shown to differ", "includes zero"),
        (0.0, 0.01, "not shown to differ", "includes zero"),
        (1e-6, 2e-6, "the same", "the same loss as b"),
        (0.0, 0.0, "the same", "the same loss as b"),
        (1e-6, 9e-5, "higher", "+1.0e-06 to +0.0001, excludes zero"),
    ],
)
def test_words(low, high, word, said):
    assert verdict(low, high) == word
    found = {"difference": 0.0, "low": low, "high": high, "verdict": word}
    assert said in in_words("a", "b", found)


def test_one_document_has_no_interval():
    found = difference([(np.array([3.0]), np.array([2.0]), np.array([4.0]))])
    assert found == {"difference": 0.25, "low": None, "high": None, "verdict": "of one row"}
    assert "no interval" in in_words("a", "b", found)


def test_documents_are_drawn_within_each_file():
    """How many rows a file has is the user's choice, and no chance."""
    rng = np.random.default_rng(0)
    labels, files = np.full(100, 50.0), []
    for mean in (-0.5, 0.6):
        more = 50 * (mean + rng.normal(0, 0.01, 100))
        files.append((more, np.zeros(100), labels))
    found = difference(files)
    assert found["difference"] == pytest.approx(0.05, abs=0.002)
    assert 0.047 < found["low"] < found["high"] < 0.053 and found["verdict"] == "higher"
    alone = (np.array([5.0]), np.array([0.0]), np.array([50.0]))
    with_one = difference([*files, alone])
    more, count = sum(nats.sum() for nats, *_ in files) + 5, 10_050
    assert with_one["difference"] == pytest.approx(more / count)
    assert with_one["low"] < with_one["difference"] < with_one["high"]
