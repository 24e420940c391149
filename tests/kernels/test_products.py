"""Products of a handful of tokens with several matrices equal their own, in torch and in Triton.

The kernel runs with TRITON_INTERPRET=1 where triton is installed, and on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from sparsecraft.kernels import products as module
from sparsecraft.kernels.products import in_torch, products

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
    if not module.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    x, weights = case(2, 4200, BF16)
    for wide in ([True] * 3, [False] * 3):
        for found, wanted in zip(
            products(x, weights, wide), in_torch(x, weights, wide), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=8e-3, atol=1e-5)


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
