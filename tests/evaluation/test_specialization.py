"""H_s, H_u and I(E;Y) on tables whose values are known, and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from sparsecraft.errors import SparsecraftError
from sparsecraft.evaluation.specialization import (
    class_information,
    sample_entropy,
    usage_entropy,
)
from tests.reference.specialization import entropy


def test_known_tables():
    decided, even = torch.eye(4), torch.full((6, 4), 0.25)
    assert sample_entropy(decided) == 0 and usage_entropy(decided) == pytest.approx(2)
    assert sample_entropy(even) == pytest.approx(2) and usage_entropy(even) == pytest.approx(2)
    alone = torch.tensor([[0.0, 1.0, 0.0]]).expand(5, 3)
    assert sample_entropy(alone) == 0 == usage_entropy(alone)
    half = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    assert sample_entropy(half) == pytest.approx(1) and usage_entropy(half) == pytest.approx(2)


def test_an_expert_for_each_class_knows_all_and_a_random_one_nothing():
    classes = torch.arange(8).repeat(3)
    assert class_information(classes, classes) == pytest.approx(3)
    assert class_information(classes // 2, classes) == pytest.approx(2)
    assert class_information(torch.zeros_like(classes), classes) == 0
    experts = torch.arange(2).repeat_interleave(8)
    assert class_information(experts, torch.arange(8).repeat(2)) == pytest.approx(0, abs=1e-12)


def test_they_equal_plain_loops():
    probs = torch.randn(30, 5).softmax(-1)
    rows = probs.double().tolist()
    assert sample_entropy(probs) == pytest.approx(sum(map(entropy, rows)) / 30, rel=1e-9)
    mean = [sum(row[e] for row in rows) / 30 for e in range(5)]
    assert usage_entropy(probs) == pytest.approx(entropy(mean), rel=1e-9)

    experts, classes = torch.randint(0, 5, (200,)), torch.randint(0, 7, (200,))
    pairs = list(zip(experts.tolist(), classes.tolist(), strict=True))
    wanted = 0.0
    for e in range(5):
        for c in range(7):
            both = pairs.count((e, c)) / 200
            apart = sum(p[0] == e for p in pairs) * sum(p[1] == c for p in pairs) / 200**2
            wanted += both * math.log2(both / apart) if both else 0
    assert class_information(experts, classes) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sample_entropy(torch.randn(4, 3)), "holds no probabilities"),
        (lambda: usage_entropy(torch.ones(4, 3)), "holds no probabilities"),
        (lambda: sample_entropy(torch.ones(4)), "holds no probabilities"),
        (lambda: usage_entropy(torch.zeros(0, 3)), "holds no probabilities"),
        (lambda: class_information(torch.ones(3), torch.ones(3).long()), "experts_T is torch.flo"),
        (lambda: class_information(torch.ones(3).long(), torch.ones(2).long()), "classes_T is"),
        (lambda: class_information(-torch.ones(3).long(), torch.ones(3).long()), "holds -1"),
    ],
)
def test_what_is_none_is_refused(call, words):
    with pytest.raises(SparsecraftError, match=words):
        call()
