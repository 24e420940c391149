"""Grouped networks whose activations are made again equal plain sums in float64.

Under TRITON_INTERPRET=1 the same tests run the Triton kernels on the CPU.
Shapes: T tokens, K slots, E experts, D width, H hidden features, M = 2H when gated.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsecraft.kernels import fused
from sparsecraft.kernels.grouped import grouped
from sparsecraft.kernels.split_triton import activation_code
from sparsecraft.kernels.two_layer import TwoLayer
from sparsecraft.kernels.vectors import INTERPRETED

T, K, E, D, H = 21, 2, 4, 24, 40
ACTIVATIONS = (nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU())
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def leaf(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_()


def parts(gated: bool, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x, weights, both stacks of matrices; and indices, of which some are of no expert."""
    first, second = leaf(E, 2 * H if gated else H, D, seed=1), leaf(E, D, H, seed=2)
    weights = leaf(T, K, seed=3).detach().softmax(-1).requires_grad_()
    indices = torch.rand(T, E, generator=torch.Generator().manual_seed(4)).topk(K).indices
    indices[::5, 1] = E
    x, first, second = (t.detach().to(dtype).requires_grad_() for t in (leaf(T, D), first, second))
    return [x, weights, first, second], indices


def net_of(first, second, activation: nn.Module, gated: bool, **options) -> TwoLayer:
    def activate(hidden):
        if not gated:
            return activation(hidden)
        gate, up = hidden.chunk(2, -1)
        return activation(gate) * up

    return TwoLayer(first, second, activate, activation=activation, **options)


def plain(tensors, indices, activation, gated, residual=False, scale=1.0) -> torch.Tensor:
    x, weights, first, second = (t.double() for t in tensors)
    y = torch.zeros_like(x)
    for t, k in ((t, k) for t in range(T) for k in range(K) if indices[t, k] < E):
        e = indices[t, k]
        hidden = net_of(first, second, activation, gated).activate(first[e] @ x[t])
        own = scale * second[e] @ hidden + (x[t] if residual else 0)
        y = y + F.one_hot(torch.tensor(t), T)[:, None] * weights[t, k] * own
    return y


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_they_are_the_weighted_sum_forward_and_backward(activation, gated, dtype, empty):
    tensors, indices = parts(gated, dtype)
    x, weights, first, second = tensors
    net = net_of(first, second, activation, gated)
    assert fused.fuses(net, x) is INTERPRETED
    y = grouped(net, x, weights, indices, False, empty)
    wanted = plain(tensors, indices, activation, gated)
    dy = leaf(T, D, seed=9).detach()
    found = [y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))]
    wanted = [wanted, *torch.autograd.grad(wanted, tensors, dy.double())]
    assert found[0].dtype == dtype and found[2].dtype == torch.float32
    assert (found[2][indices == E] == 0).all()
    for mine, theirs in zip(found, wanted, strict=True):
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("sums_to_one", [False, True])
def test_a_residual_passes_and_a_scale_counts(sums_to_one):
    tensors, indices = parts(False, torch.float32)
    if sums_to_one:
        indices = indices.clamp(max=E - 1)
    x, weights, first, second = tensors
    net = net_of(first, second, nn.GELU(), False, residual=True, scale=0.25)
    y = grouped(net, x, weights, indices, sums_to_one)
    wanted = plain(tensors, indices, nn.GELU(), False, residual=True, scale=0.25)
    found = torch.autograd.grad(y.square().sum(), tensors)
    theirs = torch.autograd.grad(wanted.square().sum(), tensors)
    assert torch.allclose(y.double(), wanted, atol=1e-4)
    for mine, their in zip(found, theirs, strict=True):
        if sums_to_one and mine is found[1]:
            continue  # what passes through has no part in the weights' gradient
        assert torch.allclose(mine, their, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("trained", [(), (0,), (1,), (2,), (3,), (0, 3)])
def test_gradients_are_those_that_are_asked_for(trained):
    tensors, indices = parts(True, torch.float32)
    every = torch.autograd.grad(
        grouped(net_of(*tensors[2:], nn.SiLU(), True), *tensors[:2], indices, False).sum(), tensors
    )
    some = [t.detach().requires_grad_(n in trained) for n, t in enumerate(tensors)]
    y = grouped(net_of(*some[2:], nn.SiLU(), True), *some[:2], indices, False)
    assert y.requires_grad is bool(trained)
    if trained:
        y.sum().backward()
    for n, tensor in enumerate(some):
        assert (tensor.grad is not None) is (n in trained)
        assert tensor.grad is None or torch.allclose(tensor.grad, every[n], atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="the Triton kernels run on a GPU or interpreted")
def test_sorted_tokens_and_activations_do_not_wait_for_the_backward_pass():
    tensors, indices = parts(True, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped(net_of(*tensors[2:], nn.SiLU(), True), *tensors[:2], indices, False)
    sizes = [tuple(t.shape) for t in kept if t.is_floating_point()]
    assert (T * K, 2 * H) in sizes, "the first product's result"
    assert (T * K, D) not in sizes and (T * K, H) not in sizes


@pytest.mark.parametrize("activation", [nn.Mish(), nn.LeakyReLU()], ids=str)
def test_other_activations_take_the_plain_way(activation):
    tensors, indices = parts(False, torch.float32)
    net = net_of(*tensors[2:], activation, False)
    assert activation_code(activation) is None and not fused.fuses(net, tensors[0])
    y = grouped(net, *tensors[:2], indices, False)
    assert torch.allclose(y.double(), plain(tensors, indices, activation, False), atol=1e-4)


def test_hooks_of_an_activation_are_called():
    tensors, indices = parts(False, torch.float32)
    activation, called = nn.ReLU(), []
    activation.register_forward_hook(lambda *_: called.append(1))
    grouped(net_of(*tensors[2:], activation, False), *tensors[:2], indices, False)
    assert called
