"""Banks of experts: every kind, on every path, equals the loop, forward and backward.

Shapes: T tokens, K slots per token, E experts, D width, H hidden width.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from sparsecraft.dense.donors import Linear, view
from sparsecraft.dense.sites import Site, find_sites
from sparsecraft.errors import DonorError, RecipeError, SparsecraftError
from sparsecraft.moe.experts import dispatch
from sparsecraft.moe.experts.adapter import AdapterExperts
from sparsecraft.moe.experts.build import build_experts
from sparsecraft.moe.experts.dispatch import PATHS, WAYS, choose_path, loop, why_not_grouped
from sparsecraft.moe.experts.ffn import FFNExperts
from sparsecraft.moe.experts.lora import LoRAExperts
from sparsecraft.moe.experts.vector import VectorExperts
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.experts import AdapterSpec, FFNSpec, LoRASpec, VectorSpec
from tests.cases import dense

E, T, D = 4, 24, 32


def ffn_donor(family: str):
    model = dense(family)
    return view(model, find_sites(model, "ffn")[0])


def randomized(bank: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    for parameter in bank.parameters():
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data = noise.to(parameter.dtype)
    return bank.eval()


def bank_of(kind: str, num_experts: int = E) -> nn.Module:
    if kind == "adapter":
        spec = AdapterSpec(num_experts=num_experts, dim=16, scale=0.25)
        return randomized(AdapterExperts(spec, D))
    if kind == "lora":  # in and out differ
        return randomized(LoRAExperts(LoRASpec(num_experts=num_experts, rank=4), D, 48))
    return randomized(FFNExperts(FFNSpec(num_experts=num_experts), ffn_donor(kind)))


KINDS = ("adapter", "lora", "llama", "mistral", "phi3", "gpt2", "opt", "t5", "t5_gated")


def routing_of(case: str) -> Routing:
    """One awkward routing each, weights that require gradients."""
    generator = torch.Generator().manual_seed(5)
    logits_TE = torch.randn(T, E, generator=generator)
    if case == "an idle expert":
        logits_TE[:, 1] = -30.0
    if case == "all to one":
        logits_TE[:, 2] = 30.0
    K = {"one slot": 1, "all to one": 1, "every expert": E}.get(case, 2)
    weights_TK, indices_TK = logits_TE.softmax(-1).topk(K)
    if case in ("no expert", "nobody"):  # the index E, with a weight that must not count
        empty = torch.rand(indices_TK.shape, generator=generator) < (1 if case == "nobody" else 0.4)
        indices_TK = indices_TK.masked_fill(empty, E)
    if case == "one token":
        weights_TK, indices_TK, logits_TE = weights_TK[:1], indices_TK[:1], logits_TE[:1]
    if case == "no token":
        weights_TK, indices_TK, logits_TE = weights_TK[:0], indices_TK[:0], logits_TE[:0]
    return Routing(weights_TK.clone().requires_grad_(), indices_TK, logits_TE)


ROUTINGS = (
    "two slots",
    "one slot",
    "every expert",
    "no expert",
    "nobody",
    "an idle expert",
    "all to one",
    "one token",
    "no token",
)


def run(path: str, bank: nn.Module, routing: Routing, x_TD: torch.Tensor) -> dict:
    x_TD, weights_TK = x_TD.clone().requires_grad_(), routing.weights_TK
    bank.zero_grad()
    weights_TK.grad = None
    y = PATHS[path](bank, x_TD, routing)
    anchor = sum(t.sum() for t in (x_TD, weights_TK, *bank.parameters()))
    (y.square().sum() + 0 * anchor).backward()  # where no expert is chosen, gradients are zero
    return {
        "output": y.detach(),
        "tokens": x_TD.grad,
        "weights": weights_TK.grad,
        **{name: p.grad for name, p in bank.named_parameters()},
    }


@pytest.mark.parametrize("case", ROUTINGS)
@pytest.mark.parametrize("path", ["by_expert", "grouped", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fast_path_equals_the_loop(kind, path, case):
    bank, routing = bank_of(kind), routing_of(case)
    x_TD = torch.randn(len(routing.indices_TK), D)
    assert why_not_grouped(bank, x_TD) is None
    wanted, found = run("loop", bank, routing, x_TD), run(path, bank, routing, x_TD)
    for name, value in wanted.items():
        other = found[name]
        assert other.isfinite().all(), name
        if name == "weights":  # a weight in an empty slot has no gradient anywhere
            assert (other[routing.indices_TK == E] == 0).all()
        assert torch.allclose(other, value, rtol=0, atol=tolerance(value)), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filled", [2, 1, 0])
@pytest.mark.parametrize("sums_to_one", [False, True])
def test_one_token_alone_equals_the_loop(kind, filled, sums_to_one):
    bank, routing = bank_of(kind), routing_of("one token")
    indices_TK = routing.indices_TK.clone()
    indices_TK[:, filled:] = E
    weights_TK = routing.weights_TK.detach() * (indices_TK < E)
    if sums_to_one and filled:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    facts = {"sums_to_one": sums_to_one and filled > 0}
    routing = Routing(weights_TK, indices_TK, routing.logits_TE, **facts)
    x_TD = torch.randn(1, D)
    with torch.no_grad():
        wanted, found = loop(bank, x_TD, routing), WAYS["one_token"](bank, x_TD, routing)
    assert torch.allclose(found, wanted, rtol=0, atol=tolerance(wanted))


def test_one_token_is_alone_only_without_gradients_and_for_few_experts_on_a_cpu():
    bank, x_TD, routing = bank_of("adapter"), torch.randn(1, D), routing_of("one token")
    assert choose_path(bank, x_TD, routing) != "one_token"
    with torch.no_grad():
        assert choose_path(bank, x_TD, routing) == "one_token"
        assert choose_path(bank, torch.randn(T, D), routing_of("two slots")) != "one_token"
        with torch.autocast("cpu", torch.bfloat16):
            assert choose_path(bank, x_TD, routing) != "one_token"
        bank.train().dropout = 0.5
        assert choose_path(bank, x_TD, routing) != "one_token"


def test_one_token_is_not_what_a_trace_repeats_for_others():
    bank, routing, x_TD = bank_of("adapter"), routing_of("one token"), torch.randn(1, D)
    with torch.no_grad():
        graph = make_fx(lambda x, w, i: bank(x, Routing(w, i, routing.logits_TE)))(
            x_TD, routing.weights_TK, routing.indices_TK
        )
        other = (routing.indices_TK + 1) % E
        found = graph(x_TD, routing.weights_TK, other)
        wanted = loop(bank, x_TD, Routing(routing.weights_TK, other, routing.logits_TE))
    assert torch.allclose(found, wanted, atol=1e-5)


def tolerance(value: torch.Tensor) -> float:
    """A few float32 roundings of the largest number."""
    return 4e-6 * max(1.0, value.abs().max().item() if value.numel() else 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_is_the_weighted_sum_of_single_experts(kind):
    bank, routing = bank_of(kind), routing_of("no expert")
    x_TD = torch.randn(T, D)
    y_TO = loop(bank, x_TD, routing)
    for t in range(T):
        wanted = torch.zeros(bank.out_features)
        for slot, e in enumerate(routing.indices_TK[t].tolist()):
            if e < E:
                weight = routing.weights_TK[t, slot]
                wanted = wanted + weight * bank.expert(e, x_TD[t : t + 1])[0]
        assert torch.allclose(y_TO[t], wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mistral", "phi3", "gpt2", "opt", "bert", "t5", "vit"])
def test_copied_experts_compute_what_the_dense_network_computes(kind):
    model = dense(kind)
    site = find_sites(model, "ffn")[0]
    donor = view(model, site)
    bank = FFNExperts(FFNSpec(num_experts=3), donor).eval()
    x = torch.randn(5, D)
    if site.spans_siblings:
        up, down = donor.up.module, donor.down.module
        wanted = down(donor.activation(up(x)))
    else:
        wanted = model.get_submodule(site.path)(x)
    for e in range(3):
        assert torch.allclose(bank.expert(e, x), wanted, atol=1e-6)


def test_an_adapter_is_the_papers_equation():
    bank = bank_of("adapter")
    x = torch.randn(3, D)
    wanted = x + 0.25 * F.gelu(x @ bank.down[1].T) @ bank.up[1].T
    assert torch.allclose(bank.expert(1, x), wanted, atol=1e-6)
    assert "tanh" not in repr(bank.activation).lower()


def test_a_lora_is_the_papers_equation():
    bank = bank_of("lora")
    x = torch.randn(3, D)
    wanted = (16.0 / 4) * x @ bank.lora_A[2].T @ bank.lora_B[2].T
    assert torch.allclose(bank.expert(2, x), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_initial_adapters_add_nothing_and_have_the_fan_in_of_one_expert(kind):
    torch.manual_seed(0)
    if kind == "adapter":
        bank = AdapterExperts(AdapterSpec(num_experts=64, dim=64), D)
        first, second, x_out = bank.down, bank.up, "x"
    else:
        bank = LoRAExperts(LoRASpec(num_experts=64, rank=64), D, D)
        first, second, x_out = bank.lora_A, bank.lora_B, "0"
    x = torch.randn(4, D)
    assert torch.equal(bank.eval().expert(7, x), x if x_out == "x" else torch.zeros_like(x))
    assert (second == 0).all()
    bound = 1 / D**0.5  # kaiming_uniform with a = sqrt(5), fan-in D and not 64 * D
    assert 0.99 * bound < first.abs().max() <= bound
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("path", ["loop", "by_expert", "grouped", "dense"])
@pytest.mark.parametrize("kind", ["adapter", "lora", "gpt2", "t5"])
def test_dropout_acts_in_training_only_and_keeps_the_mean(kind, path):
    bank, routing = bank_of(kind), routing_of("two slots")
    if kind in ("adapter", "lora"):
        bank.dropout = 0.3
    x_TD = torch.randn(T, D)
    with torch.no_grad():
        still = PATHS[path](bank, x_TD, routing)
        assert torch.equal(still, PATHS[path](bank, x_TD, routing))
        bank.train()
        runs = torch.stack([PATHS[path](bank, x_TD, routing) for _ in range(600)])
    assert not torch.equal(runs[0], runs[1])
    # Dropout before a nonlinearity shifts the mean a little; the experts' own share is small.
    assert (runs.mean(0) - still).abs().mean() < 0.12 * still.abs().mean()


@pytest.mark.parametrize("path", ["loop", "by_expert", "grouped", "dense"])
def test_an_expert_without_tokens_gets_a_zero_gradient(path):
    bank, routing = bank_of("adapter"), routing_of("an idle expert")
    PATHS[path](bank, torch.randn(T, D), routing).square().sum().backward()
    assert (bank.down.grad[1] == 0).all() and (bank.up.grad[1] == 0).all()
    assert bank.up.grad[0].abs().max() > 0


def test_a_single_expert_needs_no_router():
    bank = bank_of("adapter", num_experts=1)
    x = torch.randn(T, D)
    assert torch.equal(bank(x), bank.expert(0, x))


# --------------------------------------------------------------------------------- which path, when


def test_auto_takes_the_path_that_can_run():
    adapters, ffn = bank_of("adapter"), bank_of("llama")
    few, many = routing_of("one token"), routing_of("two slots")
    assert choose_path(adapters, torch.randn(1, D), few) == "dense"
    assert choose_path(ffn, torch.randn(1, D), few) == "grouped"
    assert choose_path(ffn, torch.randn(T, D), many) == "grouped"
    adapters.dense_tokens = 4
    assert choose_path(adapters, torch.randn(T, D), many) == "grouped"
    assert choose_path(adapters, torch.randn(T, D), routing_of("every expert")) == "dense"


def test_all_experts_at_once_is_for_few_products_on_a_cpu(monkeypatch):
    bank, x_TD, routing = bank_of("adapter"), torch.randn(T, D), routing_of("two slots")
    products = T * sum(parameter.numel() for parameter in bank.parameters())
    for limit, path in ((products, "dense"), (products - 1, "grouped")):
        monkeypatch.setattr(dispatch, "CPU_DENSE_PRODUCTS", limit)
        assert choose_path(bank, x_TD, routing) == path
    bank.dense_tokens = T
    monkeypatch.undo()
    assert choose_path(bank, x_TD, routing) == "dense"


def test_auto_avoids_widths_that_grouped_mm_refuses():
    odd = randomized(AdapterExperts(AdapterSpec(num_experts=E, dim=6), D))
    odd.dense_tokens = 4
    reason = why_not_grouped(odd, torch.randn(T, D))
    assert "6" in reason and "16 bytes" in reason
    assert choose_path(odd, torch.randn(T, D), routing_of("two slots")) == "loop"
    with torch.autocast("cpu", torch.bfloat16):  # bf16 doubles the width that is needed
        bank = randomized(LoRAExperts(LoRASpec(num_experts=E, rank=4), D, D))
        assert "16 bytes" in why_not_grouped(bank, torch.randn(T, D))


def test_auto_avoids_types_that_grouped_mm_refuses():
    bank, routing = bank_of("llama").double(), routing_of("two slots")
    x_TD = torch.randn(T, D, dtype=torch.float64)
    assert torch.allclose(bank(x_TD, routing), loop(bank, x_TD, routing))


@pytest.mark.parametrize("path", ["loop", "by_expert", "grouped", "dense"])
@pytest.mark.parametrize("kind", ["adapter", "llama", "gpt2"])
def test_autocast_agrees_with_float32(kind, path):
    bank, routing = bank_of(kind), routing_of("two slots")
    x_TD = torch.randn(T, D)
    wanted = loop(bank, x_TD, routing)
    with torch.autocast("cpu", torch.bfloat16):
        found = PATHS[path](bank, x_TD, routing)
    assert (found.float() - wanted).abs().max() < 0.03 * wanted.abs().max()
    found.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in bank.parameters())


# -------------------------------------------------------------------------------- copies and donors


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("kind", ["opt", "phi3", "gpt2", "llama"])
def test_a_copy_has_memory_of_its_own_and_leaves_the_donor_alone(kind, num_experts):
    donor = ffn_donor(kind)
    before = [donor.first_weight().clone(), donor.down_weight().clone()]
    bank = FFNExperts(FFNSpec(num_experts=num_experts), donor).eval()
    assert all(p.is_contiguous() for p in bank.parameters())
    assert all(torch.equal(expert, before[1]) for expert in bank.down)
    assert why_not_grouped(bank, torch.randn(T, D)) is None
    with torch.no_grad():
        bank.down[0] += 1.0
        assert all(torch.equal(expert, before[1]) for expert in bank.down[1:])
        for parameter in bank.parameters():
            parameter += 1.0
    assert torch.equal(donor.first_weight(), before[0])
    assert torch.equal(donor.down_weight(), before[1])


def test_ffn_experts_refuse_a_linear():
    linear = Linear(nn.Linear(D, D), "model.layers.0.self_attn.q_proj")
    with pytest.raises(RecipeError, match=r"q_proj.*site='ffn'"):
        site = Site("linear", linear.path, (linear.path,))
        build_experts(FFNSpec(), linear, site, "replace", device="cpu", dtype=torch.float32)


def test_a_quantized_donor_cannot_be_copied():
    donor = ffn_donor("llama")
    weight = torch.zeros(8, dtype=torch.uint8)
    donor.down.module.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(DonorError, match=r"down_proj.*quantized"):
        FFNExperts(FFNSpec(), donor)


def test_a_path_that_was_asked_for_and_cannot_run_says_why():
    bank = AdapterExperts(AdapterSpec(num_experts=E, dim=5), D).eval()
    bank.dispatch = "grouped"
    with pytest.raises(SparsecraftError, match="multiple of 16 bytes"):
        bank(torch.randn(T, D), routing_of("two slots"))
    vectors = VectorExperts(VectorSpec(num_experts=E), D).eval()
    for path, words in (("dense", "VectorExperts has no two-layer form"), ("gather", "no gather")):
        vectors.dispatch = path
        with pytest.raises(SparsecraftError, match=words):
            vectors(torch.randn(T, D), routing_of("two slots"))
