"""A split network by every path equals a loop over tokens and experts; the rules equal sorting.

Under TRITON_INTERPRET=1 the same tests run the Triton kernels on the CPU.
Shapes: T tokens, D features, E experts, m neurons of one.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from sparsecraft.errors import SparsecraftError
from sparsecraft.kernels import selection, split
from sparsecraft.kernels.device import usable
from sparsecraft.kernels.split import SplitNet
from sparsecraft.kernels.split_triton import (
    DOWN,
    FEW,
    UP,
    _fit_down,
    _fit_up,
    activation_code,
    gather,
    padded,
)
from sparsecraft.kernels.vectors import INTERPRETED

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")
needs_kernels = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")


def net_of(
    E=7, m=4, D=24, gated=True, bias=False, mean=False, act="silu", dtype=torch.float32
) -> SplitNet:
    def make(*shape):
        return (torch.randn(shape) * 0.4).to(dtype)

    rows = 2 * m if gated else m
    return SplitNet(
        make(E, rows, D), make(E, m, D), ACT2FN[act], make(E, rows) if bias else None,
        make(E, m) if mean else None, make(D) if bias else None,
    )  # fmt: skip


def slowly(net: SplitNet, x_TD: torch.Tensor, weights_TE: torch.Tensor) -> torch.Tensor:
    """One expert of one token at a time, in float64."""
    rows = []
    for x, weights in zip(x_TD.double(), weights_TE.double(), strict=True):
        y = torch.zeros(net.D).double() if net.bias_D is None else net.bias_D.double()
        for e in range(net.E):
            first = net.first_EMD[e].double() @ x
            if net.first_bias_EM is not None:
                first = first + net.first_bias_EM[e].double()
            a = net.activation(first[: net.m])
            a = a * first[net.m :] if net.gated else a
            if net.mean_EH is not None:
                a = a - net.mean_EH[e].double()
            y = y + weights[e] * (a @ net.down_EHD[e].double())
        rows.append(y)
    return torch.stack(rows)


def some(T: int, E: int, share: float = 0.5) -> torch.Tensor:
    return (torch.rand(T, E) < share).float()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape and got.isfinite().all()
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-9)).item()


def paths(net, x, weights) -> dict[str, torch.Tensor]:
    found = {"masked": split.masked(net, x, weights), "gather": split.gather(net, x, weights)}
    if split.why_not_grouped(net, x, weights) is None:
        found["grouped"] = split.grouped(net, x, weights)
    if usable(x):
        found["torch"] = split.gather_torch(net, x, weights)
        found["masked in torch"] = torch_only(split.masked, net, x, weights)
    return found


def torch_only(function, *args) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "weighs_at_once", lambda *_: False)
        return function(*args)


def assert_equal_paths(net, x, weights, most=2e-6) -> None:
    wanted = slowly(net, x, weights)
    for name, got in paths(net, x, weights).items():
        assert got.dtype == x.dtype and relative(got, wanted) < most, name


# ------------------------------------------------------------------ paths
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("m,D", [(3, 24), (4, 40), (6, 17), (32, 70)])
@pytest.mark.parametrize("gated", [True, False])
def test_every_path_equals_the_loop(gated, m, D, T):
    net = net_of(m=m, D=D, gated=gated)
    assert net.gated == gated and (net.E, net.m, net.D) == (7, m, D)
    assert_equal_paths(net, torch.randn(T, D), some(T, 7))


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_biases_means_weights_and_activations(gated, act, T):
    net = net_of(gated=gated, bias=True, mean=True, act=act)
    assert_equal_paths(net, torch.randn(T, 24), some(T, 7) * torch.rand(T, 7))


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("bias,mean", [(True, False), (False, True)])
def test_nobody_and_everybody(bias, mean, T):
    net, x = net_of(bias=bias, mean=mean), torch.randn(T, 24)
    assert_equal_paths(net, x, torch.ones(T, 7))
    assert_equal_paths(net, x, torch.eye(T, 7))
    nobody = torch.zeros(T, 7)
    for got in paths(net, x, nobody).values():
        wanted = net.bias_D if bias else torch.zeros(24)
        assert torch.equal(got, wanted.expand(T, -1))


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("dtype,most", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_halves(dtype, most, T):
    net = net_of(m=32, D=64, bias=True, dtype=dtype)
    x = torch.randn(T, 64).to(dtype)
    assert_equal_paths(net, x, some(T, 7), most)


@pytest.mark.parametrize("gated", [True, False])
def test_many_tokens_by_grouped_products(gated):
    net = net_of(E=5, m=8, D=24, gated=gated, bias=True, mean=True)
    x, weights = torch.randn(70, 24), some(70, 5) * torch.rand(70, 5)
    weights[3], weights[:, 2] = 0, 0  # a token without an expert, an expert without a token
    found, again = (split.grouped(net, x, weights) for _ in range(2))
    assert torch.equal(found, again) and relative(found, slowly(net, x, weights)) < 2e-6
    assert torch.equal(found[3], net.bias_D)
    nobody = split.grouped(net, x, torch.zeros(70, 5))
    assert torch.equal(nobody, net.bias_D.expand(70, -1))


def test_grouped_says_why_it_cannot_run():
    net = net_of(m=8)
    x, weights = torch.randn(9, 24), some(9, 7)
    with pytest.raises(SparsecraftError, match="it has no gradient"):
        split.grouped(net, x.requires_grad_(), weights)
    with pytest.raises(SparsecraftError, match=r"a width of 3 in torch\.float32"):
        split.grouped(net_of(m=3, gated=False), x.detach(), weights)


@pytest.mark.parametrize("bags", [1, 3, 100])
def test_sums_of_pairs_are_cut_for_cores(bags, monkeypatch):
    net, x, weights = net_of(bias=True), torch.randn(3, 24), some(3, 7)
    weights[1] = 0  # a token of which nothing runs
    monkeypatch.setattr(split, "BAGS", bags)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = split.gather_torch(net, x, weights)
    assert relative(found, split.masked(net, x, weights).double()) < 1e-6
    assert torch.equal(found[1], net.bias_D)


def test_every_expert_is_the_dense_network():
    net, x, bias = net_of(m=4, D=24, bias=True, mean=True), torch.randn(5, 24), torch.randn(24)
    gate, up = (net.first_EMD[:, i : i + 4].flatten(0, 1) for i in (0, 4))
    gate_bias, up_bias = (net.first_bias_EM[:, i : i + 4].flatten() for i in (0, 4))
    hidden = net.activation(x @ gate.t() + gate_bias) * (x @ up.t() + up_bias)
    wanted = hidden @ net.down_EHD.flatten(0, 1) + bias
    assert relative(split.every(net, x, bias), wanted.double()) < 1e-6


@needs_kernels
@pytest.mark.parametrize("T", [1, 5, 64])
@pytest.mark.parametrize("m,gated", [(32, True), (6, True), (7, False)])
def test_one_kernel_between_the_products(m, gated, T):
    net, x = net_of(E=40, m=m, gated=gated, bias=True, mean=True), torch.randn(T, 24)
    for weights in (None, some(T, 40) * torch.rand(T, 40)):
        assert split.weighs_at_once(net, x, weights)
        wanted = torch_only(split.between, net, x, weights)
        assert relative(split.between(net, x, weights), wanted.double()) < 1e-6
        halves = split.between(net_of(E=40, m=m, dtype=torch.bfloat16), x.bfloat16(), weights)
        assert halves.dtype == torch.bfloat16


@needs_kernels
def test_the_kernel_between_the_products_knows_its_limits():
    net, x, weights = net_of(), torch.randn(3, 24), some(3, 7)
    assert split.weighs_at_once(net, x, weights)
    assert not split.weighs_at_once(net, torch.randn(65, 24), some(65, 7))
    assert not split.weighs_at_once(net, x[:0], weights[:0])
    assert not split.weighs_at_once(net, x, weights.clone().requires_grad_())
    assert not split.weighs_at_once(net, x.bfloat16(), weights)
    assert not split.weighs_at_once(net_of(act="relu2"), x, weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert not split.weighs_at_once(net, x, weights)


def test_masked_has_gradients_and_gather_says_that_it_has_none():
    net, x = net_of(bias=True, mean=True), torch.randn(3, 24, requires_grad=True)
    weights = torch.rand(3, 7, requires_grad=True)
    y = split.masked(net, x, weights)
    wanted = slowly(net, x, weights)
    dy = torch.randn(3, 24)
    found = torch.autograd.grad(y, [x, weights], dy)
    for got, want in zip(
        found, torch.autograd.grad(wanted, [x, weights], dy.double()), strict=True
    ):
        assert relative(got, want.double()) < 1e-5
    assert split.choose(net, x, weights) == "masked"
    with pytest.raises(SparsecraftError, match="no gradient"):
        split.gather(net, x, weights)
    with torch.no_grad():
        assert split.gather(net, x, weights).requires_grad is False


def test_the_choice_of_a_path():
    net = net_of()
    x, few = torch.randn(1, 24), torch.eye(1, 7)
    assert split.choose(net, x, few) == "gather"
    assert split.choose(net, torch.randn(40, 24), few.expand(40, 7)) == "masked"
    assert split.choose(net, x.double(), few) == "masked"  # weights of another dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert split.choose(net, x, few) == "masked"
    if not INTERPRETED:
        assert split.choose(net, x, torch.ones(1, 7)) == "masked"
    assert split.gather(net, x[:0], few[:0]).shape == (0, 24)


def test_many_tokens_of_large_experts_are_grouped(monkeypatch):
    monkeypatch.setattr(split, "GROUPED_TOKENS", 20)
    monkeypatch.setattr(split, "GROUPED_NEURONS", 8)
    monkeypatch.setattr(split, "GROUPED_SHARE", 0.5)
    x, half = torch.randn(20, 24), torch.zeros(20, 7)
    half[:, :3] = 1
    assert split.choose(net_of(m=8), x, half) == "grouped"
    assert split.choose(net_of(m=4), x, half) == "masked"
    assert split.choose(net_of(m=8), x, torch.ones(20, 7)) == "masked"
    assert split.choose(net_of(m=8), x[:17], half[:17]) == "masked"
    assert split.choose(net_of(m=8), x.requires_grad_(), half) == "masked"


def test_shapes_that_do_not_fit_say_so():
    good = net_of()
    with pytest.raises(SparsecraftError, match=r"first_EMD is .* must be \(7, 4, 24\) or"):
        SplitNet(good.first_EMD[:, :5].contiguous(), good.down_EHD, nn.SiLU())
    with pytest.raises(SparsecraftError, match="mean_EH"):
        SplitNet(good.first_EMD, good.down_EHD, nn.SiLU(), None, torch.zeros(7, 5))
    with pytest.raises(SparsecraftError, match="contiguous"):
        SplitNet(good.first_EMD.transpose(1, 2).contiguous().mT, good.down_EHD, nn.SiLU())


def test_kernels_know_activations_by_what_they_compute():
    code = activation_code
    assert [code(ACT2FN[a]) for a in ACTIVATIONS] == [0, 1, 2, 2, 3]
    assert code(nn.GELU()) == 1 and code(nn.GELU(approximate="tanh")) == 2
    assert code(ACT2FN["relu2"]) is None


@needs_kernels
@pytest.mark.parametrize("T", [1, 2, 3, 6])
def test_configurations_change_nothing(T):
    net, x, weights = net_of(E=9, m=6, D=150, bias=True), torch.randn(T, 150), some(T, 9)
    wanted = slowly(net, x, weights)
    used = selection.active(weights)
    for BN, BD, BR, tile in [(1, 256, 16, 32), (2, 64, 64, 64), (16, 32, 16, 256)]:
        up = {"BN": BN, "BD": BD, "STAGES": 2, "num_warps": 4}
        if T > FEW:
            up = {"BN": 16, "BD": BD, "num_warps": 4}
        down = {"BR": BR, "BD": tile, "PER_SM": 1, "num_warps": 4}
        found = gather(net, x, weights, used, {"up": up, "down": down})
        assert relative(found, wanted) < 2e-6


@needs_kernels
def test_configurations_are_cut_down_to_small_layers_only():
    for TP, up in UP.items():
        assert _fit_up(up, 4096, 32, 2, TP) == up
        small = _fit_up(up, 24, 3, 4, TP)
        assert small["BD"] <= 32 and small["BN"] <= 16
    for down in DOWN.values():
        assert _fit_down(down, 4096, 2) == down
    assert [padded(T) for T in (1, 2, 3, 4, 5, 16)] == [1, 2, 4, 4, 16, 16]


# ------------------------------------------------------------------ rules
def plainly(scores: list[float], rule: str, k: int, threshold: float) -> list[float]:
    """The rules of `selection.select`, in exact arithmetic, for one token."""
    scores = [-math.inf if math.isnan(s) else s for s in scores]
    order = sorted(range(len(scores)), key=lambda e: (-scores[e], e))
    if rule == "threshold":
        return [float(s > threshold) for s in scores]
    if rule == "top_k":
        chosen = order[:k]
    elif rule == "relative":
        chosen = [e for e in order if -math.inf < scores[e] >= threshold * scores[order[0]]]
    else:
        worth = [Fraction(max(0.0, s)) for s in scores]
        chosen, total = order[:1], worth[order[0]]
        while total < Fraction(threshold) * sum(worth) and len(chosen) < len(order):
            chosen.append(order[len(chosen)])
            total += worth[chosen[-1]]
    return [float(e in (chosen or order[:1])) for e in range(len(scores))]


def scores_of(kind: str, T: int, E: int) -> torch.Tensor:
    if kind == "ties":
        return torch.randint(0, 4, (T, E)).float()
    if kind == "equal":
        return torch.full((T, E), 0.25)
    if kind == "zero":
        return torch.zeros(T, E) * torch.tensor([-1.0, 1.0]).repeat(E)[:E]
    if kind == "holes":
        return torch.rand(T, E).masked_fill(torch.rand(T, E) < 0.3, torch.nan)
    if kind == "none":
        return torch.full((T, E), torch.nan)
    return torch.rand(T, E) if kind == "positive" else torch.randn(T, E)


KINDS = ("positive", "normal", "ties", "equal", "zero", "holes", "none")


@pytest.mark.parametrize("T,E", [(1, 1), (1, 40), (3, 17)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", selection.RULES)
def test_rules_equal_sorting(rule, kind, T, E):
    scores = scores_of(kind, T, E)
    for k, threshold in [(E, 1.0), ((E + 1) // 2, 0.3), (1, 0.0), (1, -1.0), (1, 2.0)]:
        threshold = torch.tensor(threshold).item()
        wanted = torch.tensor([plainly(row, rule, k, threshold) for row in scores.tolist()])
        found, used = selection.select(scores, rule, k, threshold)
        assert found.dtype == torch.float32 and torch.equal(found, wanted)
        assert torch.equal(selection.select_torch(scores, rule, k, threshold), wanted)
        if threshold == 1.0:
            again = selection.select(scores, rule, k, torch.tensor(threshold))[0]
            assert torch.equal(again, wanted)
        if used is not None:
            assert_lists(used, wanted)


@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
@pytest.mark.parametrize("rule,ks", [("top_k", (1, 86, 172, 599, 600)), ("share", (1,))])
def test_cuts_among_many_experts(rule, ks, kind):
    scores = scores_of(kind, 1, 600)
    for k in ks:
        found, used = selection.select(scores, rule, k, 0.4)
        assert torch.equal(found, selection.select_torch(scores, rule, k, 0.4))
        if used is not None:
            assert_lists(used, found)


def test_early_launches_are_of_cuda(monkeypatch):
    monkeypatch.setattr(selection, "EARLY_LAUNCH", True)
    assert selection.early(torch.device("cpu")) == {"PDL": False}


def assert_lists(used: selection.Active, weights: torch.Tensor) -> None:
    (wanted,) = weights.any(0).nonzero(as_tuple=True)
    n = used.count.item()
    assert used.list_E[:n].tolist() == wanted.tolist() and (used.list_E[n:] == -1).all()


@pytest.mark.parametrize("T,E", [(1, 5), (3, 40)])
def test_the_experts_in_use_are_listed(T, E):
    for share in (0.0, 0.3, 1.0):
        weights = some(T, E, share) * -0.5
        assert_lists(selection.active(weights), weights)
        assert_lists(selection.active_torch(weights), weights)


@pytest.mark.parametrize("rule", ["share", "relative", "threshold"])
def test_less_is_a_part_of_more(rule):
    scores = torch.rand(6, 50)
    before = None
    for step in range(11):
        budget = step / 10 if rule == "share" else 1 - step / 10
        found = selection.select(scores, rule, threshold=budget)[0]
        assert before is None or (found >= before).all()
        before = found
        if rule != "threshold":
            assert (found.sum(-1) >= 1).all()


def test_a_rule_that_cannot_be_says_so():
    with pytest.raises(SparsecraftError, match="Unknown rule 'best'"):
        selection.select(torch.rand(1, 4), "best")
    with pytest.raises(SparsecraftError, match="top_k of 5 among 4"):
        selection.select(torch.rand(1, 4), "top_k", 5)


# ------------------------------------------------------------------ scores
@pytest.mark.parametrize("T", [1, 2, 3, 8, 16, 20])
@pytest.mark.parametrize("outcome", selection.OUTCOMES)
def test_scores_are_float32_products(outcome, T):
    x, weight, bias = torch.randn(T, 70).bfloat16(), torch.randn(9, 70), torch.randn(9)
    for unit in (False, True):
        wanted = x.double() @ weight.double().t()
        if unit:
            wanted = wanted / x.double().norm(dim=-1, keepdim=True)
        wanted = wanted + bias.double()
        wanted = wanted if outcome == "none" else getattr(torch, outcome)(wanted)
        found = selection.score(x, weight, bias, outcome, unit)
        assert found.dtype == torch.float32 and relative(found, wanted) < 2e-6
    assert relative(selection.score(x, weight), x.double() @ weight.double().t()) < 2e-6


def test_scores_have_gradients_and_zeros_have_no_length():
    x, weight = torch.randn(2, 12, requires_grad=True), torch.randn(5, 12, requires_grad=True)
    selection.score(x, weight, outcome="sigmoid").sum().backward()
    assert x.grad.any() and weight.grad.any()
    zeros = selection.score(torch.zeros(1, 12), weight.detach(), None, "tanh", True)
    assert torch.equal(zeros, torch.zeros(1, 5))
    with pytest.raises(SparsecraftError, match="Unknown outcome"):
        selection.score(x, weight, outcome="softmax")
