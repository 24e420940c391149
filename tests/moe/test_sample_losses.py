"""Importance and sample similarity (Krishnamurthy et al. 2023), against plain loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import sparsecraft as sc
from sparsecraft.errors import RecipeError
from sparsecraft.moe import losses
from sparsecraft.moe.losses import LOSSES, OF_SAMPLES
from sparsecraft.moe.routers.selectors import soft, top_k
from sparsecraft.moe.routing import Routing
from tests.cases import RECIPES, batch, dense
from tests.reference import specialization as plain

N, E, D = 17, 5, 6


def routing_of(logits_TE: torch.Tensor, x_TD: torch.Tensor | None = None) -> Routing:
    return Routing(*soft(logits_TE), logits_TE, inputs_TD=x_TD)


def drawn(count: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    return 2 * torch.randn(count, E), torch.randn(count, D)


@pytest.mark.parametrize("masked", [False, True])
def test_importance_equals_the_papers_loop(masked):
    logits_TE, _ = drawn()
    mask_T = torch.arange(N) % 3 > 0 if masked else None
    kept_TE = logits_TE if mask_T is None else logits_TE[mask_T]
    wanted = plain.importance(kept_TE.tolist())
    found = LOSSES["importance"](routing_of(logits_TE), mask_T)
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_importance_lies_between_zero_and_one_expert_alone():
    even, alone = 50 * torch.eye(E), torch.zeros(9, E)
    alone[:, 2] = 60.0
    assert LOSSES["importance"](routing_of(even)).item() == pytest.approx(0, abs=1e-6)
    assert LOSSES["importance"](routing_of(alone)).item() == pytest.approx(E - 1, rel=1e-5)
    nothing = LOSSES["importance"](routing_of(alone), torch.zeros(9, dtype=torch.bool))
    assert nothing.item() == 0


@pytest.mark.parametrize("masked", [False, True])
def test_similarity_equals_the_papers_double_loop(masked):
    logits_TE, x_TD = drawn()
    mask_T = torch.arange(N) % 3 > 0 if masked else torch.ones(N, dtype=torch.bool)
    x_TD[~mask_T] *= 1e3  # padding must not be the largest distance
    same, different = plain.similarity_sums(logits_TE[mask_T].tolist(), x_TD[mask_T].tolist())
    count = mask_T.sum().item()
    wanted = {
        "sample_similarity": same / (count**2 - count),
        "sample_dissimilarity": -different / (count**2 - count),
        "sample_similarity_released": same,
        "sample_dissimilarity_released": -different / count**2,
    }
    assert wanted.keys() == OF_SAMPLES
    for name, value in wanted.items():
        found = LOSSES[name](routing_of(logits_TE, x_TD), mask_T if masked else None)
        assert found.item() == pytest.approx(value, rel=1e-5), name


def test_both_terms_have_one_gradient():
    """Probabilities sum to one, so that what is not in one expert is in two."""
    gradients = []
    x_TD = torch.randn(N, D)
    logits_TE = (2 * torch.randn(N, E)).requires_grad_()
    for name in ("sample_similarity", "sample_dissimilarity"):
        loss = LOSSES[name](routing_of(logits_TE, x_TD))
        gradients.append(torch.autograd.grad(loss, logits_TE)[0])
    assert gradients[0].abs().max() > 1e-4
    assert torch.allclose(gradients[0], (E - 1) * gradients[1], atol=1e-7)


def test_samples_of_one_group_want_one_expert():
    x_TD = torch.cat([torch.zeros(8, D), torch.ones(8, D)]) + 0.01 * torch.randn(16, D)
    apart, mixed = torch.zeros(16, 2), torch.zeros(16, 2)
    apart[:8, 0] = apart[8:, 1] = mixed[::2, 0] = mixed[1::2, 1] = 20.0
    for name in OF_SAMPLES:
        assert LOSSES[name](routing_of(apart, x_TD)) < LOSSES[name](routing_of(mixed, x_TD)), name


def test_equal_samples_and_a_single_one_have_no_distance():
    for count in (1, 4):
        routing = routing_of(torch.randn(count, E, requires_grad=True), torch.ones(count, D))
        for name in OF_SAMPLES:
            loss = LOSSES[name](routing)
            assert loss.item() == 0 and loss.isfinite(), name


def test_no_more_than_so_many_samples_enter(monkeypatch):
    logits_TE, x_TD = drawn(100)
    monkeypatch.setattr(losses, "MOST_SAMPLES", 40)
    mask_T = torch.arange(100) < 90
    found = LOSSES["sample_similarity"](routing_of(logits_TE, x_TD), mask_T)
    every = math.ceil(100 / 40)
    chosen = torch.arange(0, 90, every)
    same, _ = plain.similarity_sums(logits_TE[chosen].tolist(), x_TD[chosen].tolist())
    assert found.item() == pytest.approx(same / (len(chosen) ** 2 - len(chosen)), rel=1e-5)


def test_no_gradient_goes_to_the_samples_and_routing_may_be_sparse():
    logits_TE, x_TD = drawn()
    x_TD.requires_grad_()
    sparse = Routing(*top_k(logits_TE, 2, True), logits_TE.requires_grad_(), inputs_TD=x_TD)
    LOSSES["sample_similarity"](sparse).backward()
    assert x_TD.grad is None and logits_TE.grad.abs().max() > 0


def test_without_inputs_they_say_how_to_keep_them():
    with pytest.raises(RecipeError, match="inputs=True"):
        LOSSES["sample_similarity"](routing_of(torch.randn(N, E)))


@pytest.mark.parametrize("recipe", ["upcycling", "smola_slots", "mov_released", "molora"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_trace_keeps_what_each_row_was_routed_by_if_asked(family, recipe):
    """By token, slot and head; nothing otherwise."""
    model, inputs = dense(family), batch(family)
    sc.convert(model, RECIPES[recipe].make(), certify=False)
    with sc.trace(model) as plainly, torch.no_grad():
        model(**inputs)
    assert all(r.inputs_TD is None for r in plainly.values())
    with sc.trace(model, inputs=True) as kept, torch.no_grad():
        model(**inputs)
    for name, routing in kept.items():
        assert len(routing.inputs_TD) == len(routing.logits_TE), name
        assert LOSSES["sample_similarity"](routing) > 0


def test_a_loop_of_ones_own_has_them_in_the_models_loss():
    model, inputs = dense("llama").train(), batch("llama", labels=True)
    recipe = sc.override(RECIPES["upcycling"].make(), {"stages.0.losses": "sample_similarity=0.5"})
    sc.convert(model, recipe)
    model.train()
    model.sparsecraft.own_loss.losses = {}
    without = model(**inputs).loss
    model.sparsecraft.own_loss.losses = None
    found = model(**inputs).loss - without
    with sc.trace(model, inputs=True) as routing:
        model(**inputs)
    routings = [dataclasses.replace(r) for r in routing.values()]
    wanted = sum(LOSSES["sample_similarity"](r) for r in routings) / len(routings)
    assert found.item() == pytest.approx(0.5 * wanted.item(), rel=1e-4)
