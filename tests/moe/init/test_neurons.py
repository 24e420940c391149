"""Copies that differ in pairs around the dense network."""

from __future__ import annotations

import pytest
import torch

import sparsecraft as sc
from sparsecraft.errors import RecipeError
from sparsecraft.moe.init.neurons import diversify
from sparsecraft.recipe import Difference
from tests.cases import dense


def banks(count: int, pairs: int, dtype: torch.dtype = torch.float32):
    model = dense("llama").to(dtype)
    torch.manual_seed(0)
    sc.convert(model, sc.recipes.attentive(count, 1, pairs=pairs))
    before = model.sparsecraft.dense["model.layers.0.mlp"]
    return before, model.model.layers[0].mlp.experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairs", [1, 4, 7])
@pytest.mark.parametrize("count", [2, 5])
def test_the_mean_of_two_is_the_dense_matrix_to_the_last_bit(count, pairs, dtype):
    before, bank = banks(count, pairs, dtype)
    w_OF = before.down_proj.weight.detach().double()
    down_EOF = bank.down.detach().double()
    for e in range(0, count - 1, 2):
        assert torch.equal(down_EOF[e] + down_EOF[e + 1], 2 * w_OF)
        step_OF = (down_EOF[e] - w_OF).abs()
        power_OF = 2.0 ** (w_OF.abs().log2().floor() - pairs)
        moved_OF = step_OF > 0
        assert torch.equal(step_OF[moved_OF], power_OF[moved_OF])
        # Not where the next power of two would be reached: 2^-pairs of all mantissas.
        reaches_OF = w_OF.abs() + power_OF >= 2 * power_OF * 2**pairs
        assert torch.equal(moved_OF, ~reaches_OF)
        raised = ((down_EOF[e] > w_OF) & moved_OF).sum() / moved_OF.sum()
        assert 0.4 < raised < 0.6
    if count % 2:
        assert torch.equal(down_EOF[-1], w_OF)
    assert count < 4 or not torch.equal(down_EOF[0], down_EOF[2])
    assert torch.equal(bank.gate_up[0], bank.gate_up[1])


def test_a_zero_stays_zero():
    _, bank = banks(2, 4)
    bank.down.data.zero_()
    diversify(bank, Difference(pairs=4))
    assert not bank.down.any()


def test_equal_copies_stay_equal_under_an_attentive_gate_and_parted_ones_do_not():
    ids = torch.arange(3, 35).reshape(2, 16)
    for pairs in (None, 4):
        model = dense("llama")
        sc.convert(model, sc.recipes.attentive(2, 1, pairs=pairs))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model.train()(ids, labels=ids).loss.backward()
            optimizer.step()
        layer = model.model.layers[0].mlp
        query, up = layer.router.scorer.query, layer.experts.gate_up
        assert query.any().item() is (pairs is not None)
        assert torch.allclose(up[0], up[1], atol=1e-6) is (pairs is None)


@pytest.mark.parametrize("pairs", [0, 8, 1.5, "4"])
def test_sizes_that_a_type_cannot_hold_are_refused(pairs):
    with pytest.raises(RecipeError, match="must be 1 to 7"):
        Difference(pairs=pairs)
