"""On a GPU: the kernels of a split network equal the loop over its experts, wait for nothing, and
run in a CUDA graph whose tokens and threshold change; the rules select what the torch code does.

Run with `pytest -m gpu`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparsecraft as sc
from sparsecraft.kernels import selection, split
from sparsecraft.kernels.split import SplitNet
from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.moe.routers.gate import Gate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RULED = {
    "top_k": sc.recipes.moefication, "share": sc.recipes.dsti,
    "relative": sc.recipes.d2dmoe, "threshold": sc.recipes.lte,
}  # fmt: skip
ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
SHAPES = [
    (24, 32, 512, True), (9, 6, 600, False), (344, 4, 1024, True), (5, 96, 4096, True),
    (7, 3, 24, True), (4, 512, 5120, False),
]  # fmt: skip


def net_of(E=24, m=32, D=512, gated=True, dtype=torch.bfloat16, act=None, extra=True) -> SplitNet:
    def make(*shape):
        return (torch.randn(shape, device="cuda") * shape[-1] ** -0.5).to(dtype)

    rows = 2 * m if gated else m
    more = (make(E, rows), make(E, m), make(D)) if extra else ()
    return SplitNet(make(E, rows, D), make(E, m, D), act or nn.SiLU(), *more)


def in_float64(net: SplitNet, x_TD, weights_TE) -> torch.Tensor:
    wide = [None if t is None else t.double() for t in (
        net.first_EMD, net.down_EHD, net.first_bias_EM, net.mean_EH, net.bias_D)]  # fmt: skip
    wide = SplitNet(*wide[:2], net.activation, *wide[2:])
    return split.masked(wide, x_TD.double(), weights_TE.double())


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.isfinite().all() and got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def some(T: int, E: int, share: float = 0.5) -> torch.Tensor:
    return (torch.rand(T, E, device="cuda") < share).float()


@pytest.mark.parametrize("T", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("E,m,D,gated", SHAPES)
def test_gather_equals_float64(E, m, D, gated, dtype, T):
    net, x = net_of(E, m, D, gated, dtype), torch.randn(T, D, device="cuda").to(dtype)
    for weights in (some(T, E) * torch.rand(T, E, device="cuda"), torch.ones(T, E, device="cuda")):
        wanted = in_float64(net, x, weights)
        found, again = (split.gather(net, x, weights) for _ in range(2))
        assert found.dtype == dtype and torch.equal(found, again)
        assert relative(found, wanted) < ROUNDING[dtype]
    nobody = split.gather(net, x, torch.zeros(T, E, device="cuda"))
    assert torch.equal(nobody, net.bias_D.expand(T, -1))


@pytest.mark.parametrize("T", [1, 3, 5])
@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU()])
def test_activations(act, T):
    net, x = net_of(act=act, dtype=torch.float32), torch.randn(T, 512, device="cuda") * 3
    weights = some(T, 24)
    for path in (split.gather, split.masked):
        assert relative(path(net, x, weights), in_float64(net, x, weights)) < 1e-5


@pytest.mark.parametrize("T", [1, 5, 16, 64, 3000])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("E,m,D,gated", SHAPES)
def test_masked_equals_float64(E, m, D, gated, dtype, T):
    net, x = net_of(E, m, D, gated, dtype), torch.randn(T, D, device="cuda").to(dtype)
    weights = some(T, E) * torch.rand(T, E, device="cuda")
    assert split.weighs_at_once(net, x, weights)
    # The first product is rounded, which `gather` does not do.
    most = 2 * ROUNDING[dtype]
    assert relative(split.masked(net, x, weights), in_float64(net, x, weights)) < most
    whole = SplitNet(net.first_EMD, net.down_EHD, net.activation, net.first_bias_EM)
    ones = torch.ones(T, E, device="cuda")
    assert relative(split.every(whole, x), in_float64(whole, x, ones)) < most


@pytest.mark.parametrize("T", [100, 1000])
@pytest.mark.parametrize("E,m,D,gated", [(8, 176, 512, True), (5, 96, 1024, False)])
def test_grouped_equals_float64(E, m, D, gated, T):
    net, x = net_of(E, m, D, gated), torch.randn(T, D, device="cuda").bfloat16()
    weights = some(T, E) * torch.rand(T, E, device="cuda")
    weights[:, 1], weights[7] = 0, 0
    found, again = (split.grouped(net, x, weights) for _ in range(2))
    assert torch.equal(found, again)
    assert relative(found, in_float64(net, x, weights)) < 2 * ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("T", [1, 2, 4, 16])
def test_a_large_layer_many_times(T):
    """Programs of a tile add their parts when all have arrived: the same bits every time."""
    net, x = net_of(344, 32, 4096, extra=False), torch.randn(T, 4096, device="cuda").bfloat16()
    for share in (1.0, 0.5, 0.05):
        weights = some(T, 344, share)
        first = split.gather(net, x, weights)
        assert relative(first, split.masked(net, x, weights)) < 1e-2
        for _ in range(200):
            assert torch.equal(split.gather(net, x, weights), first)


@pytest.mark.parametrize("kind", ["positive", "ties", "holes"])
@pytest.mark.parametrize("rule", selection.RULES)
@pytest.mark.parametrize("T,E", [(1, 344), (16, 344), (3, 48), (2, 4096), (16, 1000)])
def test_rules_equal_the_torch_code(T, E, rule, kind):
    scores = torch.rand(T, E, device="cuda")
    if kind == "ties":
        scores = (scores * 8).floor()
    if kind == "holes":
        scores = scores.masked_fill(torch.rand_like(scores) < 0.3, torch.nan)
    for threshold in (0.0, 0.3, 0.7, 1.0):
        threshold = torch.tensor(threshold, device="cuda")
        k = max(1, E // 3)
        found, used = selection.select(scores, rule, k, threshold)
        wanted = selection.select_torch(scores, rule, k, threshold)
        assert torch.equal(found, wanted)
        on_cpu = selection.select_torch(scores.cpu(), rule, k, threshold.cpu())
        assert torch.equal(wanted.cpu(), on_cpu)
        used = selection.active(found) if used is None else used
        n = used.count.item()
        assert used.list_E[:n].tolist() == found.any(0).nonzero().flatten().tolist()
        assert (used.list_E[n:] == -1).all()


@pytest.mark.parametrize("T", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("outcome", selection.OUTCOMES)
def test_scores(outcome, T):
    x = torch.randn(T, 4096, device="cuda").bfloat16()
    for weight in (
        torch.randn(128, 4096, device="cuda"),
        torch.randn(9, 4096, device="cuda").bfloat16(),
    ):
        for unit in (False, True):
            found = selection.score(x * 0.02, weight, None, outcome, unit)
            args = ((x * 0.02).double(), weight.double(), None, outcome, unit)
            assert relative(found, selection.score_torch(*args)) < 5e-6


def layer(net: SplitNet, router, x, rule, threshold):
    scores = selection.score(x, router, outcome="sigmoid")
    weights, used = selection.select(scores, rule, 8, threshold)
    return split.gather(net, x, weights, used), weights


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("rule", selection.RULES)
@pytest.mark.parametrize("T", [1, 2, 6])
def test_the_whole_layer_waits_for_nothing_and_runs_in_a_graph(T, rule, early, monkeypatch):
    monkeypatch.setattr(selection, "EARLY_LAUNCH", early)
    net, router = net_of(), torch.randn(24, 512, device="cuda").bfloat16() * 0.05
    x = torch.randn(T, 512, device="cuda").bfloat16()
    threshold = torch.tensor(0.5, device="cuda")
    with torch.no_grad():
        layer(net, router, x, rule, threshold)  # compiles
        few = T <= split.CUDA_GATHER_TOKENS
        assert split.choose(net, x, some(T, 24)) == ("gather" if few else "masked")
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(net, router, x, rule, threshold)
            split.gather(net, x, some(T, 24))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(net, router, x, rule, threshold)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y, weights = layer(net, router, x, rule, threshold)
        for budget in (0.5, 0.6, 0.9):
            x.copy_(torch.randn(T, 512, device="cuda"))
            threshold.fill_(budget)
            graph.replay()
            torch.cuda.synchronize()
            monkeypatch.setattr(selection, "EARLY_LAUNCH", False)
            wanted, chosen = layer(net, router, x, rule, threshold)
            assert torch.equal(weights, chosen) and torch.equal(y, wanted)
            assert relative(y, in_float64(net, x, chosen)) < 8e-3


@pytest.mark.parametrize("rule", selection.RULES)
@pytest.mark.parametrize("T", [3, 16])
def test_in_a_graph_the_router_runs_beside_the_first_product(T, rule):
    bank, gate = bank_and_gate(rule)
    x = torch.randn(T, 256, device="cuda").bfloat16()
    with torch.no_grad():
        bank.routed(x, gate.weigh)  # compiles
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            bank.routed(x, gate.weigh)
        torch.cuda.synchronize()
        calls, graph = [], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            assert split.overlaps(x)

            def weigh(x_TD):
                calls.append(torch.cuda.current_stream() != stream)
                return gate.weigh(x_TD)

            layers = [bank.routed(x, weigh) for _ in range(20)]
        assert calls == [True] * 20
        for _ in range(20):
            x.copy_(torch.randn(T, 256, device="cuda"))
            graph.replay()
            torch.cuda.synchronize()
            wanted = bank.weighed(x, *gate.weigh(x))
            assert wanted.abs().max() > 0 and all(torch.equal(y, wanted) for y in layers)


def bank_and_gate(rule: str) -> tuple[SplitExperts, Gate]:
    """A split network of bf16, and its router of random rows."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).cuda().bfloat16().eval()
    sc.convert(model, RULED[rule](32))
    layer = model.model.layers[0].mlp
    for weight in layer.router.parameters():
        nn.init.normal_(weight, std=0.1)
    layer.router.runs = "sparse"
    return layer.experts, layer.router


@pytest.mark.parametrize("T", [1, 3, 16])
def test_early_launches_in_a_row_change_no_bit(T, monkeypatch):
    """Layers one after another, each reading what the last one wrote."""
    nets = [net_of(96, 32, 1024, extra=False) for _ in range(4)]
    router = torch.randn(96, 1024, device="cuda").bfloat16() * 0.05
    x = torch.randn(T, 1024, device="cuda").bfloat16()

    def stack():
        y = x
        for net in nets * 3:
            y = y + layer(net, router, y, "top_k", 0.5)[0]
        return y

    with torch.no_grad():
        wanted = stack()
        monkeypatch.setattr(selection, "EARLY_LAUNCH", True)
        assert selection.early(x.device)["PDL"] == (torch.cuda.get_device_capability() >= (9, 0))
        assert torch.equal(stack(), wanted)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            stack()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = stack()
        for _ in range(100):
            y.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, wanted)
