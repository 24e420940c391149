"""What a decoding step on a GPU is made of, beside float64: products in one launch, attention to a
static cache, experts that are read once.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsecraft.kernels import few
from sparsecraft.kernels.attend import attend
from sparsecraft.kernels.product import add_low_rank
from sparsecraft.kernels.products import Low, products
from sparsecraft.kernels.two_layer import TwoLayer

pytestmark = pytest.mark.gpu
CUDA = {"device": "cuda"}


def drawn(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, **CUDA) / shape[-1] ** 0.5).to(dtype)


def worst(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("width", [2048, 5632, 300])
def test_products(tokens, width, dtype):
    torch.manual_seed(0)
    x = torch.randn(tokens, width, **CUDA).to(dtype)
    weights = [drawn(n, width, dtype=dtype) for n in (2048, 256, 100)]
    z = torch.randn(tokens, 60, **CUDA)
    gate = torch.rand(tokens, 15, **CUDA)
    lows = [
        Low(z, gate, drawn(15, 2048, 4, dtype=dtype), 0.5),
        Low(z, None, drawn(1, 256, 60, dtype=dtype), 2.0),
        None,
    ]
    wanted = [x.double() @ w.double().t() for w in weights]
    for y, exact in zip(products(x, weights, [False] * 3), wanted, strict=True):
        assert worst(y, exact) < (6e-3 if dtype == torch.bfloat16 else 1e-5)
    found = products(x, weights, [False, True, False], lows)
    zero = [torch.zeros_like(y) for y in found]
    for y, exact, low, onto in zip(found, wanted, lows, zero, strict=True):
        if low is not None:
            own = low.z_TZ.double().unflatten(1, (-1, low.b_ENR.shape[2]))
            own = own if low.gate_TE is None else own * gate.double()[..., None]
            update = low.scale * torch.einsum("ter,enr->tn", own, low.b_ENR.double())
            exact = exact + update
            alone = add_low_rank(onto, *low)
            assert worst(alone, update) < (6e-3 if onto.dtype == torch.bfloat16 else 1e-5)
        assert worst(y, exact) < (6e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(("heads", "of_keys", "width"), [(32, 4, 64), (32, 32, 128), (9, 3, 80)])
@pytest.mark.parametrize("length", [512, 2048])
def test_attention(batch, heads, of_keys, width, length, dtype):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, 1, width, **CUDA).to(dtype)
    k, v = (torch.randn(batch, of_keys, length, width, **CUDA).to(dtype) for _ in range(2))
    at = torch.arange(length, **CUDA)
    first, last = (torch.randint(0, n, (batch, 1), **CUDA) for n in (40, length))
    shown = (at >= first) & (at <= last.clamp_min(50))
    for mask in (None, shown[:, None, None], shown[:1, None, None].expand(batch, 1, 1, length)):
        options = {"attn_mask": mask, "enable_gqa": True}
        wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
        found = attend(q, k, v, mask, None)
        assert worst(found, wanted) < (8e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("tokens", [3, 16])
@pytest.mark.parametrize(("width", "hidden", "experts"), [(2048, 512, 8), (512, 1024, 16)])
@pytest.mark.parametrize("gated", [False, True])
def test_experts_that_are_read_once(gated, width, hidden, experts, tokens):
    torch.manual_seed(0)
    act = nn.SiLU()
    net = TwoLayer(
        drawn(experts, hidden * (1 + gated), width), drawn(experts, width, hidden),
        lambda h: act(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1] if gated else act(h),
        activation=act, residual=not gated,
    )  # fmt: skip
    x = torch.randn(tokens, width, **CUDA).bfloat16()
    indices = torch.stack([torch.randperm(experts, **CUDA)[:6] for _ in range(tokens)])
    weights = torch.rand(tokens, 6, **CUDA)
    assert few.fits(net, x, 6) and indices.numel() > experts
    found, wanted = few.networks(net, x, weights, indices, False), 0
    for k in range(6):
        first, second = (m[indices[:, k]].double() for m in (net.first_EMI, net.second_EOH))
        hidden_TM = torch.einsum("tmi,ti->tm", first, x.double())
        y = torch.einsum("toh,th->to", second, net.activate(hidden_TM))
        y = y if gated else y + x.double()
        wanted = wanted + weights[:, k, None].double() * y
    assert worst(found, wanted) < 1e-2
