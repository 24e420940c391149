"""Products of a handful of tokens with several matrices equal their own, in torch and in Triton.

The kernel runs with TRITON_INTERPRET=1 where triton is installed, and on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from sparsecraft.kernels import products as module
from sparsecraft.kernels.device import INTERPRETED
from sparsecraft.kernels.products import Low, in_torch, products

BF16, FLOAT = torch.bfloat16, torch.float32


def case(tokens: int, width: int, dtype=FLOAT):
    torch.manual_seed(0)
    drawn = [torch.randn(n, width) / width**0.5 for n in (tokens, 5, 64, 1)]
    x, *weights = drawn
    return x.to(dtype), [w.to(t) for w, t in zip(weights, (dtype, dtype, FLOAT), strict=True)]


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 40), (3, 70), (16, 5000)])
def test_each_product_is_its_own(tokens, width, dtype):
    x, weights = case(tokens, width, dtype)
    found = products(x, weights, [True, False, True])
    assert [y.dtype for y in found] == [FLOAT, dtype, FLOAT]
    for y, weight in zip(found, weights, strict=True):
        bound = 8e-3 if y.dtype is BF16 else 1e-5
        torch.testing.assert_close(
            y.double(), x.double() @ weight.double().t(), rtol=bound, atol=bound
        )


def test_the_kernel_gives_what_torch_does():
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    x, weights = case(2, 4200, BF16)
    for wide in ([True] * 3, [False] * 3):
        for found, wanted in zip(
            products(x, weights, wide), in_torch(x, weights, wide), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=8e-3, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [FLOAT, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_a_low_rank_update_is_added(tokens, dtype, rows, monkeypatch):
    monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(module, "FEWEST_TILES", 64)
    torch.manual_seed(0)
    width, sizes = 300, (5, 70, 33, 17)
    x = torch.randn(tokens, width).to(dtype)
    weights = [(torch.randn(n, width) / width**0.5).to(dtype) for n in sizes]

    def low(number: int, experts: int, rank: int, z_experts: int, gated: bool) -> Low:
        z = torch.randn(tokens, z_experts * rank)
        gate = torch.rand(tokens, experts).to(dtype) if gated else None
        return Low(z, gate, torch.randn(experts, number, rank).to(dtype), 0.5)

    # One expert, experts with matrices of their own and with a shared one, and more ranks than one
    # block; none.
    lows = [low(5, 1, 8, 1, False), low(70, 3, 4, 3, True), low(33, 40, 5, 1, True), None]
    found = products(x, weights, [False, True, False, False], lows)
    for y, weight, update in zip(found, weights, lows, strict=True):
        wanted = x.double() @ weight.double().t()
        if update is not None:
            z, gate, b, scale = (t.double() if isinstance(t, torch.Tensor) else t for t in update)
            for e in range(len(b)):
                R = b.shape[2]
                own = z[:, e * R : (e + 1) * R] if z.shape[1] > R else z
                own = own if gate is None else own * gate[:, e : e + 1]
                wanted = wanted + scale * own @ b[e].t()
        bound = 4e-3 if y.dtype != FLOAT else 2e-5
        torch.testing.assert_close(y.double(), wanted, rtol=bound, atol=bound)


def test_under_a_compiler_it_is_one_operator():
    x, weights = case(2, 40)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(products, fullgraph=True, backend=backend)
    found = compiled(x, weights, [True, False, True])
    torch.testing.assert_close(found, products(x, weights, [True, False, True]))
    assert len(graphs) == 1 and graphs[0].count("sparsecraft.products") == 1
