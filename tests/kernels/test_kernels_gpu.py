"""On a GPU: every path equals the loop in bf16, without a host synchronization, and compiled;
the merged mixtures equal their float64 forms.

Run with `pytest -m gpu`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsecraft.kernels.lora import LoRAs, mix_lora
from sparsecraft.kernels.projections import float32_product
from sparsecraft.kernels.vectors import mix_vectors, mix_vectors_torch, usable
from sparsecraft.moe.experts import dispatch
from sparsecraft.moe.experts.adapter import AdapterExperts
from sparsecraft.moe.experts.dispatch import PATHS, choose_path, loop
from sparsecraft.moe.experts.lora import LoRAExperts
from sparsecraft.moe.experts.vector import VectorExperts
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.build import build_router
from sparsecraft.recipe.experts import AdapterSpec, LoRASpec, VectorSpec
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.selections import Soft, TopK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def parts(tokens: int, dtype=torch.bfloat16):
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": dtype}
    bank = AdapterExperts(AdapterSpec(num_experts=8, dim=64, dropout=0.0), 256, **options).eval()
    torch.nn.init.normal_(bank.up, std=0.05)
    router = build_router(RouterSpec(select=TopK(2)), 256, 8, **options)
    x = torch.randn(tokens, 256, **options)
    return bank, router, x


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def run(function, bank, router, x):
    x = x.clone().requires_grad_()
    bank.zero_grad(), router.zero_grad()
    y = function(bank, x, router(x))
    y.to(torch.promote_types(y.dtype, torch.float32)).pow(2).mean().backward()
    return [y, x.grad, bank.down.grad, bank.up.grad, router.scorer.weight.grad]


@pytest.mark.parametrize("tokens", [1, 7, 64, 1000])
@pytest.mark.parametrize("path", ["by_expert", "grouped", "dense"])
def test_each_path_is_as_near_to_float64_as_the_loop(path, tokens):
    parts_ = parts(tokens)
    fast, slow = run(PATHS[path], *parts_), run(loop, *parts_)
    exact = run(loop, *(p.double() for p in parts_))
    names = ("y", "x", "down", "up", "router")
    for name, ours, theirs, want in zip(names, fast, slow, exact, strict=True):
        # One token's router gradient is a multiple of x; its factor is a difference of two dot
        # products of bf16 outputs, which nearly cancel (0.039 and 0.009 were measured).
        slack = 5e-2 if name == "router" and tokens < 64 else 2e-3
        assert relative(ours, want) < 2 * relative(theirs, want) + slack


FEW = [(1, torch.bfloat16), (4, torch.bfloat16), (1, torch.float32), (4, torch.float32)]


@pytest.mark.parametrize(("tokens", "dtype"), [*FEW, (7, torch.bfloat16), (16, torch.bfloat16)])
def test_few_tokens_are_as_near_to_float64_as_the_loop(tokens, dtype):
    bank, router, x = parts(tokens, dtype)
    with torch.no_grad():
        routing = router(x)
        assert choose_path(bank, x, routing) == "few"
        fast, slow = (run(bank, x, routing) for run in (dispatch.few, loop))
        wide = router.double()(x.double())
        assert torch.equal(wide.indices_TK.sort().values, routing.indices_TK.sort().values)
        exact = loop(bank.double(), x.double(), wide)
    assert relative(fast, exact) < 2 * relative(slow, exact) + 1e-6


def test_grouped_does_not_wait_for_the_device():
    bank, router, x = parts(512)
    with torch.no_grad():
        PATHS["grouped"](bank, x, router(x))  # compiles what it compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = PATHS["grouped"](bank, x, router(x))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert y.isfinite().all()


def test_float32_takes_its_experts_one_by_one_and_says_so(caplog):
    dispatch._say_once.cache_clear()
    bank, router, x = parts(512, torch.float32)
    assert choose_path(bank, x, router(x)) == "by_expert"
    assert "grouped_mm on CUDA takes bfloat16" in caplog.text


# ------------------------------------------------------------------ merged mixtures
def leaf(*shape: int, dtype=torch.float32, at: float = 0.0) -> torch.Tensor:
    return (0.5 * torch.randn(shape, device="cuda") + at).to(dtype).requires_grad_()


def soft_weights(rows: int, num_experts: int) -> torch.Tensor:
    return torch.randn(rows, num_experts, device="cuda").softmax(-1).requires_grad_()


def outputs(function, leaves, dtype=None) -> list[torch.Tensor]:
    """Result and gradients, of copies of the leaves in `dtype`."""
    copies = [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in leaves]
    y = function(*copies)
    seed = torch.Generator("cuda").manual_seed(3)
    dy = torch.randn(y.shape, generator=seed, device="cuda").bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, copies, dy)]


def assert_near(found, wanted, tolerances) -> None:
    for i, (got, want, most) in enumerate(zip(found, wanted, tolerances, strict=True)):
        assert relative(got, want) < most, (i, relative(got, want))


VECTOR_CASES = [(1, 10, 1), (7, 1, 1), (16, 16, 1), (300, 10, 4), (1000, 33, 1), (2500, 64, 2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("T,E,heads", VECTOR_CASES)
@pytest.mark.parametrize("sums_to_one", [False, True])
def test_mixed_vectors_equal_torch_in_float64(sums_to_one, T, E, heads, dtype):
    leaves = [leaf(T, 600, dtype=dtype), soft_weights(T * heads, E), leaf(E, 600, at=1.0)]
    assert usable(*leaves)
    found = outputs(lambda *t: mix_vectors(*t, sums_to_one), leaves)
    wanted = outputs(lambda *t: mix_vectors_torch(*t, sums_to_one), leaves, torch.float64)
    rounding = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 2e-6}[dtype]
    # The tensor cores cut both of tf32's factors off after ten bits: up to 2 * 2**-10, one way.
    inner = 2e-3 if dtype != torch.float32 else 5e-6
    assert_near(found, wanted, [rounding, rounding, inner, inner])
    again = outputs(lambda *t: mix_vectors(*t, sums_to_one), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("T", [1, 9, 700])
def test_vectors_of_ones_give_the_tokens_exactly(T, dtype):
    x = leaf(T, 600, dtype=dtype)
    for E in (10, 40):
        y = mix_vectors(x, soft_weights(T, E), torch.ones(E, 600, device="cuda"), True)
        assert torch.equal(y, x)


LORA_CASES = [(1, 10, 4, False), (16, 3, 8, True), (700, 10, 4, False), (700, 5, 8, True)]


@pytest.mark.parametrize("T,E,R,shared", LORA_CASES)
def test_mixed_lora_equals_its_float64_form(T, E, R, shared):
    leaves = [
        leaf(T, 256, dtype=torch.bfloat16), soft_weights(T, E),
        leaf(1 if shared else E, R, 256), leaf(E, 600, R), leaf(T, 600, dtype=torch.bfloat16),
    ]  # fmt: skip
    wanted = outputs(lambda *t: mix_lora(*t[:2], LoRAs(*t[2:4], 0.5), t[4]), leaves, torch.float64)
    for in_place in (False, True):
        found = outputs(
            lambda *t: mix_lora(*t[:2], LoRAs(*t[2:4], 0.5), t[4] * 1, in_place),  # noqa: B023
            leaves,
        )
        assert_near(found, wanted, [1e-2] * 6)
        with torch.no_grad():
            y = mix_lora(*leaves[:2], LoRAs(*leaves[2:4], 0.5), leaves[4] * 1, in_place)
        assert_near([y], wanted[:1], [1e-2])


@pytest.mark.parametrize("E", [1, 3, 10, 64])
@pytest.mark.parametrize("T", [1, 5, 100, 256, 4096])
def test_scores_of_bf16_tokens_are_float32(T, E):
    leaves = [leaf(T, 1024, dtype=torch.bfloat16), leaf(E, 1024)]
    found = outputs(float32_product, leaves)
    wanted = outputs(torch.nn.functional.linear, leaves, torch.float64)
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.bfloat16
    assert_near(found, wanted, [5e-6, 3e-3, 5e-6])
    with torch.no_grad():
        assert_near([float32_product(*leaves)], wanted[:1], [5e-6])
        with torch.autocast("cuda", torch.bfloat16):
            assert_near([float32_product(*leaves)], wanted[:1], [5e-6])


def test_scores_make_no_float32_copy_of_the_tokens():
    x, weight = leaf(8192, 4096, dtype=torch.bfloat16), leaf(10, 4096)
    outputs(float32_product, [x[:256], weight])  # the library's own workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        float32_product(x, weight)
    assert torch.cuda.max_memory_allocated() - before < x.numel()


def mixture_functions():
    """Name -> a function of its leaves, and the leaves."""
    T, E = 512, 10
    x, w = leaf(T, 256, dtype=torch.bfloat16), soft_weights(T, E)
    lora = [x, w, leaf(E, 4, 256), leaf(E, 600, 4), leaf(T, 600, dtype=torch.bfloat16)]
    return {
        "vectors": (lambda *t: mix_vectors(*t, True), [x, w, leaf(E, 256, at=1.0)]),
        "lora": (lambda *t: mix_lora(*t[:2], LoRAs(*t[2:4], 0.5), t[4] * 1, True), lora),
        "product": (float32_product, [x, leaf(E, 256)]),
    }


@pytest.mark.parametrize("name", ["vectors", "lora", "product"])
def test_mixtures_compile_whole(name):
    function, leaves = mixture_functions()[name]
    wanted = outputs(function, leaves)
    found = outputs(torch.compile(function, fullgraph=True), leaves)
    assert_near(found, wanted, [5e-3] * len(found))


@pytest.mark.parametrize("T", [1, 512])
@pytest.mark.parametrize("name", ["vectors", "lora", "product"])
def test_mixtures_run_in_a_cuda_graph(name, T):
    function, leaves = mixture_functions()[name]
    inputs = [t.detach()[:T] if t.shape[0] == 512 else t.detach() for t in leaves]
    with torch.no_grad():
        wanted = function(*inputs)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            function(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = function(*inputs)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, wanted)


# ------------------------------------------------------------------ the layer
def layer_of(kind: str, width: int = 256, hidden: int = 600) -> MoELayer:
    base = nn.Linear(width, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    router = build_router(RouterSpec(select=Soft()), width, 10, device="cuda")
    if kind == "vectors":
        bank = VectorExperts(VectorSpec(num_experts=10, init_std=0.3), hidden, device="cuda")
        return MoELayer("after", bank, router, base)
    spec = LoRASpec(num_experts=10, rank=4, dropout=0.0, shared_a=kind == "shared a")
    bank = LoRAExperts(spec, width, hidden, device="cuda")
    nn.init.normal_(bank.lora_B, std=0.1)
    return MoELayer("beside", bank, router, base)


def layer_outputs(layer, x) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(3), device="cuda")
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.bfloat16().to(y.dtype))]


@pytest.mark.parametrize("T", [5, 300, 2048, 5000])
@pytest.mark.parametrize("kind", ["lora", "shared a", "vectors"])
def test_a_joint_layer_is_as_near_to_float64_as_its_parts(kind, T, monkeypatch):
    layer = layer_of(kind)
    x = leaf(1, T, 256, dtype=torch.bfloat16)
    wanted = layer_outputs(copy.deepcopy(layer).double(), x.double())
    found, again = layer_outputs(layer, x), layer_outputs(layer, x)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    with torch.no_grad():
        assert relative(layer(x), wanted[0]) < 1e-2
    monkeypatch.setattr("sparsecraft.moe.fusions.joins", lambda *_: False)
    monkeypatch.setattr("sparsecraft.moe.fusions.scales_in_chunks", lambda *_: False)
    apart = layer_outputs(layer, x)
    for ours, theirs, want in zip(found, apart, wanted, strict=True):
        assert relative(ours, want) < 1.5 * relative(theirs, want) + 1e-3


@pytest.mark.parametrize("kind,width,most", [("lora", 1024, 2.6), ("vectors", 128, 2.8)])
def test_a_layer_holds_few_large_tensors_at_once(kind, width, most):
    layer, x = layer_of(kind, width, 1024), leaf(8192, width, dtype=torch.bfloat16)
    layer_outputs(layer, x[:300]), layer_outputs(layer, x)  # the library's own workspaces
    dy = torch.randn(8192, 1024, device="cuda").bfloat16()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(layer(x), leaves, dy)
    assert torch.cuda.max_memory_allocated() - before < most * dy.nbytes


@pytest.mark.parametrize("kind", ["lora", "shared a", "vectors"])
@pytest.mark.parametrize("T", [1, 300])
def test_a_layer_runs_in_a_cuda_graph_and_compiled(kind, T):
    layer, x = layer_of(kind), leaf(T, 256, dtype=torch.bfloat16).detach()
    with torch.no_grad():
        wanted = layer(x)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = layer(x)
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(y, wanted)
    compiled = torch.compile(layer, fullgraph=True)
    for got, want in zip(layer_outputs(compiled, x), layer_outputs(layer, x), strict=True):
        assert relative(got, want) < 1e-2
