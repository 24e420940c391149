"""What a log line says of routing, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsecraft.moe.routing import Routing
from sparsecraft.training.tally import Tally


def routing(indices: list[list[int]], experts: int = 4) -> Routing:
    indices_TK = torch.tensor(indices)
    return Routing(torch.ones(indices_TK.shape), indices_TK, torch.zeros(len(indices), experts))


def test_experts_without_tokens():
    tally = Tally()
    tally.add_routing("a", routing([[0], [0], [1]]), None)
    tally.add_routing("a", routing([[2], [0], [0]]), None)
    tally.add_routing("b", routing([[0], [1], [2], [3]]), torch.tensor([True, True, False, False]))
    found = tally.pop(lambda vector: vector)
    assert found["dead_experts/a"] == 1 and found["dead_experts/b"] == 2
    assert found["dead_experts"] == 1.5 and found["max_load/a"] == pytest.approx(4 * 4 / 6)
    assert not tally.pop(lambda vector: vector)


def test_an_expert_that_is_to_have_no_tokens_is_not_counted():
    tally = Tally()
    target = replace(routing([[0], [0], [1], [1]]), target_load=(0.5, 0.25, 0.25, 0.0))
    tally.add_routing("a", target, None)
    found = tally.pop(lambda vector: vector)
    assert found["dead_experts/a"] == 1  # the third
    assert found["max_load/a"] == pytest.approx(4 * 2 / 3)  # of 1, 2, 0, 0 times what is meant


def test_a_layer_without_tokens_says_nothing_of_its_load():
    tally = Tally()
    tally.add_routing("a", routing([[0], [1], [2], [3]]), None)
    tally.add_routing("b", routing([[0], [0]]), torch.tensor([False, False]))
    found = tally.pop(lambda vector: vector)
    assert found["dead_experts"] == 0 and found["load_entropy"] == pytest.approx(1)
    assert "dead_experts/b" not in found
