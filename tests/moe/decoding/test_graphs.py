"""Rewritten graphs compute what they did, whatever stands between the products of one input."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsecraft.kernels import attend, products
from sparsecraft.kernels.product import add_low_rank
from sparsecraft.moe.decoding import graphs
from sparsecraft.moe.decoding.graphs import share_keys, share_launches

D = 8


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(graphs, "is_handful", lambda x, *others: 0 < len(x) <= 16)
    monkeypatch.setattr(attend, "runs", lambda x: True)
    monkeypatch.setattr(products, "fits_tiles", lambda x, weights: 1 < len(x) <= 16)


def rewritten(function, *args) -> tuple[str, object]:
    """The code of the one graph that a function is, rewritten, and what that gives."""
    codes = []

    def backend(graph, inputs):
        share_keys(graph)
        share_launches(graph)
        codes.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)(*args)
    (code,) = codes
    return code, found


class Cases(nn.Module):
    """Named functions of x; parameters, because weights must be there from the start."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Parameter(torch.randn(D, D)) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(2, D // 2))
        self.low = nn.Parameter(torch.randn(1, D, 3))
        self.rows = nn.Parameter(torch.randn(3, D))

    def forward(self, x, case: str):
        return getattr(self, case)(x * 2)

    def plain(self, x):
        return F.linear(x, self.a), F.linear(x, self.b)

    def written_to_after(self, x):
        y = F.linear(x, self.a)
        x.mul_(3)
        return y, F.linear(x, self.b)

    def written_to_before(self, x):
        y = x * 1
        y.mul_(self.a[0])
        return F.linear(y, self.a), F.linear(y, self.b)

    def a_view_written_to(self, x):
        y = x.reshape(-1, D)
        z = F.linear(y, self.a)
        x.view(-1).add_(1)
        return z, F.linear(y, self.b)

    def filled_by_slices(self, x):
        y = torch.empty_like(x)
        y[..., :4] = x[..., 4:]
        y[..., 4:] = x[..., :4]
        return F.linear(y, self.a)

    def in_place_by_position(self, x):
        y = x - 1
        z = F.linear(y, self.a)
        F.relu(y, True)
        return z, F.linear(y, self.b)

    def an_overload_that_writes(self, x):
        y = F.linear(x, self.a)
        torch.ops.aten.add_.Tensor(x, x)
        return y, F.linear(x, self.b)

    def one_into_another(self, x):
        return F.linear(F.linear(x, self.a), self.b), F.linear(x, self.c)

    def a_computed_bias(self, x):
        return F.linear(x, self.a, self.bias.flatten()), F.linear(
            x, self.b, self.bias.sum(0).repeat(2)
        )

    def within_autocast(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, self.a), F.linear(x, self.b)

    def another_type_of_weight(self, x):
        return (
            F.linear(x.double(), self.a.double()),
            F.linear(x, self.a[:, :].t()),
            F.linear(x, self.a[0]),
        )

    def updated(self, x):
        flat = x.reshape(-1, D)
        z = products.products(flat, [self.rows], [True])[0]
        y = add_low_rank(F.linear(flat, self.a), z, None, self.low, 0.5)
        return F.silu(y) * F.linear(flat, self.b), x

    def an_update_that_waits_for_another(self, x):
        flat = x.reshape(-1, D)
        z = products.products(flat, [self.rows], [True])[0]
        y = add_low_rank(F.linear(flat, self.a), z, None, self.low, 0.5)
        gate = y.sum(-1, keepdim=True).sigmoid()
        w = add_low_rank(F.linear(flat, self.b), z, gate, self.low, 0.5)
        v = add_low_rank(F.linear(y, self.c), z, gate, self.low, 0.5)
        return y, w, v, F.linear(y, self.a)

    def an_update_of_other_rows(self, x):
        z = products.products(x.reshape(-1, D), [self.rows], [True])[0]
        y = F.linear(x.reshape(-1, D), torch.cat([self.a, self.b])).reshape(-1, D)
        return add_low_rank(y, z.repeat(2, 1), None, self.low, 0.5)


CASES = [name for name in vars(Cases) if not name.startswith("_") and name != "forward"]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_it_did(case, tokens):
    model, x = Cases(), torch.randn(1, tokens, D)
    with torch.no_grad():
        wanted = model(x.clone(), case)
    code, found = rewritten(model, x.clone(), case)
    for got, want in zip(
        *(v if isinstance(v, tuple) else (v,) for v in (found, wanted)), strict=True
    ):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)
    counts = {"plain": 1, "updated": 2, "one_into_another": 2, "a_computed_bias": 1}
    if case in counts:
        assert code.count("sparsecraft.products") == counts[case] and "linear(" not in code
    if case in ("written_to_after", "within_autocast"):
        assert code.count("sparsecraft.products") == (0 if case == "within_autocast" else 2)


def attention(q, k, v, kind: str):
    def repeated(t):
        return t[:, :, None].expand(1, 2, 3, 5, 4).reshape(1, 6, 5, 4)

    if kind == "keywords":
        return F.scaled_dot_product_attention(
            query=q, key=repeated(k), value=repeated(v), scale=0.3
        )
    if kind == "written to":
        k = k * 1
        r = repeated(k)
        k.mul_(2)
        return F.scaled_dot_product_attention(q, r, repeated(v))
    if kind == "grouped":
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    if kind == "causal":
        return F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True)
    mask = torch.arange(5) < 3
    if kind == "added":
        mask = torch.zeros(1, 1, 1, 5).masked_fill(~mask, torch.finfo(torch.float32).min)
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), mask.view(1, 1, 1, 5))


@pytest.mark.parametrize("kind", ["keywords", "written to", "grouped", "causal", "mask", "added"])
def test_attention_is_what_it_was(kind):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 6, 1, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    code, found = rewritten(attention, q, k, v, kind)
    torch.testing.assert_close(found, attention(q, k, v, kind))
    assert ("sparsecraft.attend" in code) == (kind != "causal")
