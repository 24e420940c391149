"""Auxiliary losses: known values, masks, dtypes, gradients, and the papers' plain loops."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsecraft.errors import RecipeError
from sparsecraft.moe.losses import (
    LOSSES,
    auxiliary_loss,
    btx_balance,
    pesc_released_balance,
    router_z,
    switch_balance,
    switch_balance_unnormalized,
)
from sparsecraft.moe.routers.selectors import top_k
from sparsecraft.moe.routing import Routing
from tests.reference import papers, splitting


def routing_of(logits_TE: torch.Tensor, k: int) -> Routing:
    return Routing(*top_k(logits_TE, k, renormalize=True), logits_TE)


def recorded(routing: Routing) -> Routing:
    """With what the activations of a split network read and what the layer read, for the losses of
    these, and the number of experts that a token is to have, for that of ReLU routing."""
    generator = torch.Generator().manual_seed(6)
    pre_TF = 5 * torch.randn(len(routing.logits_TE), 12, generator=generator)
    inputs_TD = torch.randn(len(routing.logits_TE), 6, generator=generator)
    return dataclasses.replace(routing, pre_TF=pre_TF, inputs_TD=inputs_TD, k=2)


def balanced(E: int, k: int) -> Routing:
    """Token t prefers experts t, ..., t+k-1 (mod E)."""
    logits_TE = torch.zeros(E, E)
    for t in range(E):
        logits_TE[t, [(t + j) % E for j in range(k)]] = 20.0
    return routing_of(logits_TE, k)


def collapsed(E: int, k: int) -> Routing:
    logits_TE = torch.zeros(10, E)
    logits_TE[:, :k] = 60.0
    return routing_of(logits_TE, k)


SIZES = pytest.mark.parametrize(("E", "k"), [(8, 2), (8, 1), (4, 4), (6, 3)])


@SIZES
def test_balance_is_one_when_balanced_and_e_over_k_when_collapsed(E, k):
    assert switch_balance(balanced(E, k)).item() == pytest.approx(1.0, abs=1e-5)
    assert switch_balance(collapsed(E, k)).item() == pytest.approx(E / k, abs=1e-5)
    assert switch_balance_unnormalized(balanced(E, k)).item() == pytest.approx(k, abs=1e-5)
    assert switch_balance_unnormalized(collapsed(E, k)).item() == pytest.approx(E, abs=1e-4)


@SIZES
@pytest.mark.parametrize("masked", [False, True])
def test_losses_equal_the_papers_loops(E, k, masked):
    logits_TE = 2 * torch.randn(30, E)
    mask_T = (torch.rand(30) < 0.6) if masked else None
    routing = routing_of(logits_TE, k)
    for ours, theirs in (
        (switch_balance, papers.switch_balance(logits_TE, k, mask_T)),
        (switch_balance_unnormalized, papers.switch_balance(logits_TE, k, mask_T, False)),
        (router_z, papers.z_loss(logits_TE, mask_T)),
    ):
        assert ours(routing, mask_T).item() == pytest.approx(theirs.item(), rel=1e-5)


@SIZES
def test_gradients_equal_the_papers_loops(E, k):
    for ours, theirs in ((switch_balance, papers.switch_balance), (router_z, papers.z_loss)):
        grads = []
        for loss in (ours, theirs):
            logits_TE = torch.randn(12, E, generator=torch.Generator().manual_seed(3))
            logits_TE.requires_grad_()
            value = loss(routing_of(logits_TE, k)) if loss is ours else None
            if value is None:
                value = loss(logits_TE, k) if theirs is papers.switch_balance else loss(logits_TE)
            value.backward()
            grads.append(logits_TE.grad)
        # With every expert chosen, f is constant and p sums to one: balance cannot act.
        assert grads[1].abs().max() > 1e-3 or (k == E and theirs is papers.switch_balance)
        assert torch.allclose(grads[0], grads[1].float(), atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("E", "k"), [(5, 2), (4, 4), (3, 1)])
def test_the_loss_of_btx_equals_its_formula_and_u_has_a_gradient(E, k, masked):
    """E sum_e u_e p_e with u and p both functions of the logits (section 3.3)."""
    logits_TE = torch.randn(12, E, generator=torch.Generator().manual_seed(3)).double()
    mask_T = torch.arange(12) % 3 != 1 if masked else torch.ones(12, dtype=torch.bool)
    found = []
    for ours in (True, False):
        leaf_TE = logits_TE.clone().requires_grad_()
        if ours:
            value = btx_balance(routing_of(leaf_TE, k), mask_T if masked else None)
        else:
            kept_TE = torch.full_like(leaf_TE, -torch.inf).scatter(
                -1, leaf_TE.topk(k).indices, leaf_TE.topk(k).values
            )
            u_E = kept_TE.softmax(-1)[mask_T].mean(0)
            value = E * (u_E * leaf_TE.softmax(-1)[mask_T].mean(0)).sum()
        value.backward()
        found.append((value.item(), leaf_TE.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert (found[0][1] - found[1][1]).abs().max() < 1e-6 < found[1][1].abs().max()


def test_balance_pushes_a_collapsed_router_apart():
    logits_TE = torch.zeros(16, 4)
    logits_TE[:, 0] = 1.0
    logits_TE.requires_grad_()
    switch_balance(routing_of(logits_TE, 1)).backward()
    assert (logits_TE.grad[:, 0] > 0).all() and (logits_TE.grad[:, 1:] < 0).all()


@SIZES
def test_the_released_pesc_loss_is_a_constant_without_gradient(E, k):
    """E/k, as its model calls it; its docstring's shape would give E. It balances nothing."""
    for logits_TE in (3 * torch.randn(20, E), collapsed(E, k).logits_TE):
        logits_TE = logits_TE.clone().requires_grad_()
        loss = pesc_released_balance(routing_of(logits_TE, k))
        loss.backward()
        wanted = papers.pesc_released_balance_as_called([logits_TE], k)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert loss.item() == pytest.approx(E / k, rel=1e-5)
        assert logits_TE.grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    "name", ["switch", "switch_unnormalized", "z", "lte_efficiency", "lte_separability"]
)
def test_padding_does_not_count(name):
    logits_TE = torch.randn(20, 4)
    mask_T = torch.arange(20) < 13
    noisy_TE = torch.where(mask_T[:, None], logits_TE, 50 * torch.randn(20, 4))
    loss = LOSSES[name]
    wanted = loss(routing_of(logits_TE[:13], 2))
    assert loss(routing_of(noisy_TE, 2), mask_T).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert loss(routing_of(noisy_TE, 2)).item() != pytest.approx(wanted.item(), rel=1e-3)
    square = mask_T.reshape(4, 5).long()  # an attention mask as it comes
    assert loss(routing_of(noisy_TE, 2), square).item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_float32_under_bf16(name):
    routing = recorded(routing_of(torch.randn(500, 4), 2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](routing)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(LOSSES[name](routing).item(), rel=1e-6)
    floats = ("weights_TK", "logits_TE", "pre_TF")
    half = dataclasses.replace(
        routing, **{field: getattr(routing, field).bfloat16() for field in floats}
    )
    same = dataclasses.replace(half, **{field: getattr(half, field).float() for field in floats})
    assert LOSSES[name](half).dtype == torch.float32
    assert torch.equal(LOSSES[name](half), LOSSES[name](same))


@pytest.mark.parametrize("name", ["btx", "switch", "z", "own_expert", "lte_efficiency"])
@pytest.mark.parametrize("real", [1, 2])
def test_the_mean_is_over_as_few_tokens_as_there_are(name, real):
    logits_TE = torch.randn(20, 4)
    wanted = LOSSES[name](routing_of(logits_TE[:real], 2))
    found = LOSSES[name](routing_of(logits_TE, 2), torch.arange(20) < real)
    torch.testing.assert_close(found, wanted)


SPARSITY = {
    "relu_hoyer": lambda pre: splitting.hoyer(pre.clamp(min=0)),
    "relu_l1": lambda pre: splitting.l1(pre.clamp(min=0)),
    "gelu_clamped_l1": lambda pre: splitting.l1(splitting.above(pre, -10.0)),
    "gelu_clamped_hoyer": lambda pre: splitting.hoyer(splitting.above(pre, -10.0)),
}


@pytest.mark.parametrize("name", SPARSITY)
@pytest.mark.parametrize("masked", [False, True])
def test_sparsity_losses_equal_the_papers_loops(name, masked):
    routing = recorded(routing_of(torch.randn(30, 4), 2))
    mask_T = torch.arange(30) % 3 > 0 if masked else None
    pre_TF = routing.pre_TF if mask_T is None else routing.pre_TF[mask_T]
    assert LOSSES[name](routing, mask_T).item() == pytest.approx(SPARSITY[name](pre_TF), rel=1e-5)
    half = dataclasses.replace(routing, pre_TF=routing.pre_TF.bfloat16())
    assert LOSSES[name](half, mask_T).dtype == torch.float32


def test_the_hoyer_measure_lies_between_one_and_the_width():
    one_hot, even = torch.eye(5, 8), torch.ones(5, 8)
    base = routing_of(torch.randn(5, 4), 2)
    for pre_TF, wanted in ((one_hot, 1.0), (even, 8.0), (7 * even, 8.0)):
        loss = LOSSES["relu_hoyer"](dataclasses.replace(base, pre_TF=pre_TF), None)
        assert loss.item() == pytest.approx(wanted)
    idle = torch.full((5, 8), -1.0, requires_grad=True)  # no activation at all
    loss = LOSSES["relu_hoyer"](dataclasses.replace(base, pre_TF=idle), None)
    loss.backward()
    assert loss.item() == 0 and idle.grad.isfinite().all()


@pytest.mark.parametrize("name", SPARSITY)
def test_losses_of_activations_refuse_a_routing_without_any(name):
    with pytest.raises(RecipeError, match=r"in training with stage\.runs='every'"):
        LOSSES[name](routing_of(torch.randn(5, 4), 2), None)


def test_lte_losses_equal_the_papers_loops():
    traced = {n: routing_of(3 * torch.randn(20, 5), 2) for n in "ab"}
    mask_T = torch.arange(20) < 13
    gates = [r.logits_TE.sigmoid()[mask_T].tolist() for r in traced.values()]
    _, parts = auxiliary_loss(
        traced, {"lte_efficiency": 1.0, "lte_separability": 1.0}, lambda _: mask_T
    )
    assert parts["lte_efficiency"].item() == pytest.approx(splitting.efficiency(gates), rel=1e-5)
    theirs = splitting.separability(gates, epsilon=1e-2)
    assert parts["lte_separability"].item() == pytest.approx(theirs, rel=1e-4)


def test_empty_slots_are_nobodys_load():
    logits_TE = torch.randn(9, 3)
    weights_TK, indices_TK = top_k(logits_TE, 2, renormalize=True)
    indices_TK[:, 1] = 3
    routing = Routing(weights_TK, indices_TK, logits_TE)
    one = switch_balance_unnormalized(routing_of(logits_TE, 1))
    assert switch_balance_unnormalized(routing).item() == pytest.approx(one.item(), rel=1e-6)


def test_the_sum_is_the_mean_over_layers_and_not_over_concatenated_tokens():
    """Opposite collapses in two layers must not look balanced."""
    traced = {"a": collapsed(2, 1), "b": collapsed(2, 1)}
    flipped = traced["b"].logits_TE.flip(1)
    traced["b"] = routing_of(flipped, 1)
    total, parts = auxiliary_loss(traced, {"switch": 0.5, "z": 2.0})
    assert parts["switch"].item() == pytest.approx(2.0, abs=1e-5)
    assert total.item() == pytest.approx(0.5 * 2.0 + 2.0 * parts["z"].item(), rel=1e-6)


def test_nothing_to_add_is_none():
    assert auxiliary_loss({}, {"switch": 1.0}) == (None, {})
    assert auxiliary_loss({"a": balanced(4, 2)}, {}) == (None, {})


def test_an_unknown_loss_names_the_nearest():
    with pytest.raises(RecipeError, match=r"'swich'.*Did you mean 'switch'"):
        auxiliary_loss({"a": balanced(4, 2)}, {"swich": 1.0})
