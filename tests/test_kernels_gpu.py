"""On a GPU: every path equals the loop in bf16, without a host synchronization, and compiled.

Run with `pytest -m gpu`.
"""

from __future__ import annotations

import pytest
import torch

from sparsecraft.experts import AdapterExperts, loop
from sparsecraft.kernels import PATHS, choose_path
from sparsecraft.recipe import AdapterSpec, RouterSpec
from sparsecraft.routers import build_router

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def parts(tokens: int, dtype=torch.bfloat16):
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": dtype}
    bank = AdapterExperts(AdapterSpec(num_experts=8, dim=64, dropout=0.0), 256, **options).eval()
    torch.nn.init.normal_(bank.up, std=0.05)
    router = build_router(RouterSpec(top_k=2), 256, 8, **options)
    x = torch.randn(tokens, 256, **options)
    return bank, router, x


def run(function, bank, router, x):
    x = x.clone().requires_grad_()
    bank.zero_grad(), router.zero_grad()
    y = function(bank, x, router(x), True)
    y.float().pow(2).mean().backward()
    return [y, x.grad, bank.down.grad, bank.up.grad, router.scorer.weight.grad]


@pytest.mark.parametrize("tokens", [1, 7, 64, 1000])
@pytest.mark.parametrize("path", ["grouped", "dense"])
def test_each_path_equals_the_loop(path, tokens):
    parts_ = parts(tokens)
    for fast, slow in zip(run(PATHS[path], *parts_), run(loop, *parts_), strict=True):
        error = (fast.double() - slow.double()).norm() / slow.double().norm()
        assert error < 2e-2


def test_grouped_does_not_wait_for_the_device():
    bank, router, x = parts(512)
    with torch.no_grad():
        PATHS["grouped"](bank, x, router(x), True)  # compiles what it compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = PATHS["grouped"](bank, x, router(x), True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert y.isfinite().all()


def test_float32_takes_the_loop_and_says_so(caplog):
    bank, router, x = parts(512, torch.float32)
    assert choose_path(bank, x, router(x)) == "loop"
    assert "grouped_mm on CUDA takes bfloat16" in caplog.text
