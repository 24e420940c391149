"""A handful of tokens, each slot by its own expert, equals the loop; under Triton's interpreter.

Run with TRITON_INTERPRET=1 where triton is installed; on a GPU, tests/kernels/test_kernels_gpu.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsecraft.kernels import few, few_experts
from sparsecraft.kernels.device import compiled_step
from sparsecraft.kernels.two_layer import TwoLayer

interpreted = few.triton is not None and few.triton.knobs.runtime.interpret
pytestmark = pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1")

E, I, O = 33, 40, 24


def net(
    gated: bool, biased: bool, residual: bool, dtype=torch.float32, H: int = 20, number: int = E
):
    torch.manual_seed(0)
    M, wide = 2 * H if gated else H, I if residual else O
    activation = nn.SiLU()

    def activate(hidden):
        if not gated:
            return activation(hidden)
        gate, up = hidden.chunk(2, -1)
        return activation(gate) * up

    def drawn(*shape):
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)

    biases = (
        {"first_bias_EM": drawn(number, M), "second_bias_EO": drawn(number, wide)} if biased else {}
    )
    return TwoLayer(
        drawn(number, M, I), drawn(number, wide, H), activate, scale=0.5, residual=residual,
        activation=activation, **biases,
    )  # fmt: skip


def wanted(net: TwoLayer, x_TI, weights_TK, indices_TK, sums_to_one):
    """The sum over slots, in float64."""

    def wide(tensor):
        return None if tensor is None else tensor.double()

    y_TO = torch.zeros(len(x_TI), net.O, dtype=torch.float64)
    for t, x_I in enumerate(x_TI.double()):
        for w, e in zip(weights_TK[t].double(), indices_TK[t].tolist(), strict=True):
            if e == net.E:
                continue
            hidden = wide(net.first_EMI[e]) @ x_I
            hidden = hidden if net.first_bias_EM is None else hidden + wide(net.first_bias_EM[e])
            y_O = wide(net.second_EOH[e]) @ net.activate(hidden)
            y_O = y_O if net.second_bias_EO is None else y_O + wide(net.second_bias_EO[e])
            y_TO[t] += w * net.scale * y_O
            if net.residual and not sums_to_one:
                y_TO[t] += w * x_I
        if net.residual and sums_to_one:
            y_TO[t] += x_I
    return y_TO


def worst(layers, x_TI, weights_TK, indices_TK, sums_to_one) -> float:
    """The largest error, of the largest number."""
    assert few.fits(layers, x_TI, 2)
    found = few.networks(layers, x_TI, weights_TK, indices_TK, sums_to_one)
    exact = wanted(layers, x_TI, weights_TK, indices_TK, sums_to_one)
    assert found.dtype == x_TI.dtype
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("gated", "biased"), [(False, True), (True, False), (True, True)])
def test_it_equals_the_sum_over_slots(gated, biased, residual, tokens, dtype, monkeypatch):
    monkeypatch.setattr(few, "PROGRAMS", 1024 if residual else 1)  # a row of a matrix, or several
    layers = net(gated, biased, residual, dtype)
    x_TI = torch.randn(tokens, I).to(dtype)
    indices_TK = torch.randint(0, E + 1, (tokens, 2))
    weights_TK = torch.rand(tokens, 2)
    for sums_to_one in (False, True):
        bound = 1e-6 if dtype == torch.float32 else 1e-2
        assert worst(layers, x_TI, weights_TK, indices_TK, sums_to_one) < bound


@pytest.mark.parametrize("tokens", [3, 16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("gated", "biased"), [(False, True), (True, False), (True, True)])
def test_experts_that_are_read_once(gated, biased, residual, tokens, monkeypatch):
    """More slots than experts, some of which no token chose."""
    few_of = 5
    layers = net(gated, biased, residual, torch.float16, H=150, number=few_of)
    x_TI = torch.randn(tokens, I).half()
    for chosen, parts in (([0, 1, 2, 3, 4, 5], 1), ([1, 4, 5], 1024)):
        monkeypatch.setattr(few_experts, "PROGRAMS", parts)
        indices_TK = torch.tensor(chosen)[torch.randint(0, len(chosen), (tokens, 2))]
        weights_TK = torch.rand(tokens, 2)
        for sums_to_one in (False, True):
            assert worst(layers, x_TI, weights_TK, indices_TK, sums_to_one) < 2e-3


def test_what_a_token_did_not_choose_may_overflow():
    layers, weights_TK = net(False, False, False, torch.float16, number=3), torch.rand(4, 1)
    layers.first_EMI[2] *= 6e4
    x_TI = torch.randn(4, I).half()
    x_TI[3] /= 6e4
    indices_TK = torch.tensor([[0], [1], [0], [2]])
    found = few.networks(layers, x_TI, weights_TK, indices_TK, False)
    exact = wanted(layers, x_TI, weights_TK, indices_TK, False)
    torch.testing.assert_close(found.double(), exact, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("number", "k"), [(1, 1), (8, 2), (12, 3), (33, 8), (5, 5)])
def test_the_best_experts(number, k, renormalize):
    torch.manual_seed(number)
    for logits_TE in (torch.randn(4, number), 30 * torch.randn(1, number)):
        assert few.picks(logits_TE)
        weights_TK, indices_TK = few.top_k(logits_TE, k, renormalize)
        top = logits_TE.topk(k)
        assert torch.equal(indices_TK, top.indices)
        every = logits_TE.softmax(-1).gather(-1, top.indices)
        torch.testing.assert_close(weights_TK, top.values.softmax(-1) if renormalize else every)


def test_ties_and_infinities_choose_different_experts():
    logits_TE = torch.tensor([[0.0, 0, 0, 0], [-torch.inf, 1, -torch.inf, -torch.inf]])
    weights_TK, indices_TK = few.top_k(logits_TE, 3, True)
    assert all(len(set(row)) == 3 for row in indices_TK.tolist())
    torch.testing.assert_close(weights_TK, logits_TE.topk(3).values.softmax(-1))


def test_matrices_with_other_strides():
    layers = net(True, False, False)
    turned = TwoLayer(
        layers.first_EMI.transpose(1, 2).contiguous().transpose(1, 2),
        layers.second_EOH.transpose(1, 2).contiguous().transpose(1, 2),
        layers.activate, activation=layers.activation, scale=0.5,
    )  # fmt: skip
    x_TI, weights_TK = torch.randn(2, I), torch.rand(2, 2)
    indices_TK = torch.tensor([[0, 4], [3, 3]])
    found = few.networks(turned, x_TI, weights_TK, indices_TK, False)
    torch.testing.assert_close(found, few.networks(layers, x_TI, weights_TK, indices_TK, False))


def test_what_it_does_not_take():
    layers, x_TI = net(True, False, False), torch.randn(2, I)
    assert few.fits(layers, x_TI, 2)
    assert not few.fits(layers, x_TI.double(), 2)
    assert not few.fits(layers, x_TI.bfloat16(), 2)
    assert not few.fits(layers, x_TI, 17)  # more reads than all experts hold
    half = net(True, False, False, torch.float16)
    assert few.fits(half, x_TI.half(), 17)  # each is read once
    assert not few.fits(layers, x_TI.requires_grad_(), 2)
    with torch.no_grad():
        assert few.fits(layers, x_TI, 2)


def test_under_a_compiler_it_is_one_operator():
    layers, x_TI = net(True, True, False), torch.randn(2, I)
    weights_TK, indices_TK = torch.rand(2, 2), torch.tensor([[0, 4], [3, E]])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    def call(x):
        assert few.fits(layers, x, 2)
        return few.networks(layers, x, weights_TK, indices_TK, False) + 1

    with torch.no_grad(), compiled_step():
        found = torch.compile(call, fullgraph=True, backend=backend)(x_TI)
        torch.testing.assert_close(found, call(x_TI))
    assert len(graphs) == 1 and "few_networks" in graphs[0]
