"""MoE++: zero-computation experts, the gating residual, loads by tau.

T tokens, E experts, D width.
"""

from __future__ import annotations

import copy
import math
import threading
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

import sparsecraft as sc
from sparsecraft.dense.donors import view
from sparsecraft.dense.sites import find_sites
from sparsecraft.errors import ExportError, RecipeError, SparsecraftError
from sparsecraft.kernels import grouped as grouped_kernel
from sparsecraft.moe.experts.dispatch import loop
from sparsecraft.moe.experts.heterogeneous import HeterogeneousExperts
from sparsecraft.moe.losses import heterogeneous_balance, switch_balance
from sparsecraft.moe.routers.build import build_router
from sparsecraft.moe.routers.capacity import limited, room
from sparsecraft.moe.routers.selectors import top_k
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.balancing import Capacity, Hold
from sparsecraft.recipe.heterogeneous import HeterogeneousSpec
from sparsecraft.recipe.residual import Residual
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.scorers import Linear
from sparsecraft.recipe.selections import TopK
from tests import tiny
from tests.cases import D, batch, dense, randomize_new

T, K = 40, 2
SMALL = {"constant": 2, "hold_steps": 0, "capacity": 0}


def bank_of(family: str = "llama", **options) -> HeterogeneousExperts:
    model = dense(family)
    donor = view(model, find_sites(model, "ffn")[0])
    torch.manual_seed(0)
    spec = HeterogeneousSpec(**({"num_experts": 7} | options))
    bank = HeterogeneousExperts(spec, donor, dtype=torch.float32).eval()
    for parameter in bank.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    return bank


def routing_of(E: int, k: int = K) -> Routing:
    logits_TE = torch.randn(T, E)
    return Routing(*top_k(logits_TE, k, False), logits_TE)


def moepp(family: str = "llama", moved: bool = True, **options) -> torch.nn.Module:
    model = dense(family)
    sc.convert(model, sc.recipes.moepp(3, **(SMALL | options)))
    if moved:
        randomize_new(model, std=0.3)
    return model


# ------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("zero_weight", ["lost", "shared"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    "counts", [(3, 2, 1, 1), (2, 0, 2, 3), (4, 3, 0, 0), (1, 0, 0, 6)], ids=str
)
def test_the_mixture_is_the_papers_token_by_token(counts, family, zero_weight):
    networks, constant, copies, zeros = counts
    options = {"constant": constant, "copy": copies, "zero": zeros, "zero_weight": zero_weight}
    bank = bank_of(family, **options)
    x_TD, routing = torch.randn(T, D), routing_of(7)
    found_TD = bank(x_TD, routing)
    for t in range(T):
        x, y = x_TD[t], torch.zeros(D)
        chosen = list(zip(routing.weights_TK[t], routing.indices_TK[t].tolist(), strict=True))
        if zero_weight == "shared":
            rest = sum(w for w, e in chosen if e < 7 - zeros)
            chosen = [(w / rest, e) for w, e in chosen if e < 7 - zeros]
        for weight, e in chosen:
            if e < networks:
                y = y + weight * bank.networks.expert(e, x[None])[0]
            elif e < networks + constant:
                c = e - networks
                a = (bank.mix[2 * c : 2 * c + 2] @ x).softmax(-1)
                y = y + weight * (a[0] * x + a[1] * bank.constants[c])
            elif e < networks + constant + copies:
                y = y + weight * x
        assert torch.allclose(found_TD[t], y, atol=1e-5), t
    if zero_weight == "lost":
        assert torch.allclose(found_TD, loop(bank, x_TD, routing), atol=1e-5)


def test_a_zero_expert_adds_exactly_nothing():
    bank = bank_of()
    x_TD = torch.randn(T, D)
    only = Routing(torch.ones(T, 1), torch.full((T, 1), 6), torch.zeros(T, 7))
    assert (bank(x_TD, only) == 0).all()
    copies = Routing(torch.ones(T, 1), torch.full((T, 1), 5), torch.zeros(T, 7))
    assert torch.equal(bank(x_TD, copies), x_TD)


@pytest.mark.parametrize("dispatch", ["grouped", "dense", "loop"])
@pytest.mark.parametrize("family", ["t5", "gpt2", "opt", "llama"])
def test_the_networks_see_their_own_tokens_alone(family, dispatch, monkeypatch):
    """Counted in the grouped product's offsets, and in the loop's calls."""
    bank = bank_of(family)
    bank.dispatch = dispatch
    x_TD, routing = torch.randn(T, D, requires_grad=True), routing_of(7)
    ends, rows = [], []
    product, expert = F.grouped_mm, bank.networks.expert

    def spied(x, w, *, offs):
        ends.append(offs[-1].item())
        y = product(x, w, offs=offs)
        with torch.no_grad():  # what stands there is no number that may go anywhere
            y[offs[-1] :] = math.nan
        return y

    def counted(e, x):
        rows.append(len(x))
        return expert(e, x)

    monkeypatch.setattr(grouped_kernel.F, "grouped_mm", spied)
    monkeypatch.setattr(bank.networks, "expert", counted)
    y_TD = bank(x_TD, routing)
    wanted = (routing.indices_TK < 3).sum().item()
    assert ends == ([wanted] * 2 if dispatch == "grouped" else [])
    assert sum(rows) == (wanted if dispatch == "loop" else 0)
    bank.dispatch = "loop"
    monkeypatch.undo()
    again = x_TD.detach().clone().requires_grad_()
    slow_TD = bank(again, routing)
    assert torch.allclose(y_TD, slow_TD, atol=1e-5)
    upstream = torch.randn_like(y_TD)
    y_TD.backward(upstream)
    found = {name: p.grad.clone() for name, p in bank.named_parameters()}
    bank.zero_grad()
    slow_TD.backward(upstream)
    assert torch.allclose(x_TD.grad, again.grad, atol=1e-4)
    for name, parameter in bank.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-4), name


def test_grouped_gives_no_gradient_of_what_was_in_memory(monkeypatch):
    """All rows of empty slots are poison, forward and backward; with biases too."""
    for family in ("t5", "gpt2"):
        bank = bank_of(family)
        bank.dispatch = "grouped"
        x_TD = torch.randn(T, D, requires_grad=True)
        weights_TK = torch.rand(T, K, requires_grad=True)
        indices_TK = torch.randint(0, 7, (T, K))
        routing = Routing(weights_TK, indices_TK, torch.zeros(T, 7))

        class Poisoned(torch.autograd.Function):
            @staticmethod
            def forward(ctx, y, end):
                ctx.end = end
                y = y.clone()
                y[end:] = math.nan
                return y

            @staticmethod
            def backward(ctx, grad):
                grad = grad.clone()
                grad[ctx.end :] = 0  # the product's own backward does not read them
                return grad, None

        class PoisonsGradient(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, end):
                ctx.end = end
                return x.view_as(x)

            @staticmethod
            def backward(ctx, grad):
                grad = grad.clone()
                grad[ctx.end :] = math.nan
                return grad, None

        product = F.grouped_mm

        def poisoned(x, w, *, offs, product=product):
            end = int(offs[-1])
            return Poisoned.apply(product(PoisonsGradient.apply(x, end), w, offs=offs), end)

        with monkeypatch.context() as patch:
            patch.setattr(grouped_kernel.F, "grouped_mm", poisoned)
            y_TD = bank(x_TD, routing)
            y_TD.sum().backward()
        assert y_TD.isfinite().all()
        gradients = [x_TD.grad, weights_TK.grad, *(p.grad for p in bank.parameters())]
        assert all(gradient.isfinite().all() for gradient in gradients), family


# ------------------------------------------------------------------------------ loads and capacity


@pytest.mark.parametrize("tau", [0.1, 0.25, 0.75, 1.0])
def test_capacities_and_the_loss_follow_tau(tau):
    spec = HeterogeneousSpec(num_experts=12, tau=tau)
    n_ffn, n_free, gamma, tokens = 8, 4, 1.1, 4000
    shares_E = torch.tensor(spec.load, dtype=torch.float64)
    rooms_E = room(Capacity(factor=gamma), tokens * K, shares_E)
    total = tau * n_ffn + n_free
    for e in range(12):
        wanted = gamma * K * (tau if e < n_ffn else 1) * tokens / total
        assert rooms_E[e].item() == math.ceil(round(wanted, 6))
    assert sum(spec.load) == pytest.approx(1)
    assert rooms_E.sum().item() == pytest.approx(gamma * K * tokens, abs=12)
    assert sum(spec.load[:8]) == pytest.approx(tau * n_ffn / total)
    torch.manual_seed(0)
    logits_TE = torch.randn(T, 12)
    routing = Routing(*top_k(logits_TE, K, True), logits_TE, target_load=spec.load, free=4)
    probs_TE = logits_TE.softmax(-1)
    loss = 0.0
    for e in range(12):
        f = sum(e in routing.indices_TK[t].tolist() for t in range(T)) / T
        loss += (1 if e < n_ffn else tau) * f * probs_TE[:, e].mean().item()
    assert heterogeneous_balance(routing).item() == pytest.approx(loss, rel=1e-5)


def test_a_tau_without_bound_is_the_plain_mixture():
    """Zero-computation experts are meant to have nothing then, and networks as much as without."""
    spec = HeterogeneousSpec(num_experts=12, tau=1e12)
    assert spec.load[:8] == pytest.approx([1 / 8] * 8) and max(spec.load[8:]) < 1e-11
    torch.manual_seed(0)
    logits_TE = torch.randn(400, 12)
    logits_TE[:, 8:] -= 50  # the balance loss, tau times their share, has driven them away
    routing = Routing(*top_k(logits_TE, K, True), logits_TE, target_load=spec.load, free=4)
    plain = Routing(*top_k(logits_TE[:, :8], K, True), logits_TE[:, :8])
    capacity = Capacity(factor=1.1)
    assert torch.equal(
        limited(routing, capacity).indices_TK.clamp(max=8), limited(plain, capacity).indices_TK
    )
    # The paper's loss has no factor N, and counts K choices for a token.
    wanted = switch_balance(plain).item() * K / 8
    assert heterogeneous_balance(routing).item() == pytest.approx(wanted, rel=1e-4)


def test_the_log_counts_computing_experts(tmp_path):
    model = tiny.llama()
    sc.convert(model, sc.recipes.moepp(3, **(SMALL | {"capacity": 0.5})))
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())
    options = {"batch_size": 4, "max_length": 48, "tokenizer": tiny.tokenizer()}
    sc.train(model, rows, tmp_path / "run", steps=2, log_every=1, progress=False, **options)
    lines = [e for e in model.sparsecraft.report["training"][-1]["log"] if "loss" in e]
    assert all(0 < line["computing_experts"] < 2 for line in lines)
    assert all(0 < line["dropped"] < 1 for line in lines)
    assert all(line["heterogeneous_loss"] > 0 for line in lines)


# ------------------------------------------------------------------------------- gating residual


def by_hand(model: torch.nn.Module, x: dict) -> dict[str, torch.Tensor]:
    """Layer -> logits, by the paper's recursion over what the routers read."""
    read = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, sc.MoELayer)}
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, name=name: read.__setitem__(name, args[0].detach())
        )
        for name, layer in layers.items()
    ]
    with sc.trace(model) as routing:
        model(**x)
    for handle in handles:
        handle.remove()
    logits, before = {}, {}
    for name, layer in layers.items():
        scorer, stack = layer.router.scorer, name.split(".")[0]
        x_TD = read[name].reshape(-1, D).double()
        if scorer.weight is not None:
            found = x_TD @ scorer.weight.double().T
        else:
            found = (x_TD @ scorer.first.double().T).tanh() @ scorer.second.double().T
        if stack in before:
            found = found + before[stack] @ scorer.previous.double().T
        else:
            assert scorer.previous is None, "a layer without a predecessor has no residual"
        before[stack] = logits[name] = found
        assert torch.allclose(routing[name].logits_TE.double(), found, atol=1e-4), name
    return logits


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("family", ["llama", "opt", "t5", "bert"])
def test_logits_go_on_from_the_layer_before(family, variant):
    model = moepp(family, variant=variant)
    with torch.no_grad():
        assert len(by_hand(model, batch(family))) >= 2


def test_the_residual_is_right_under_activation_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = moepp().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = batch("llama")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    residual = [n for n in gradients[0] if n.endswith("scorer.previous")]
    assert residual and all(gradients[0][n].abs().max() > 0 for n in residual)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_reentrant_checkpointing_would_lose_the_residuals_gradient():
    model = moepp(balance_coef=0.0).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    ids = batch("llama")["input_ids"]
    with pytest.raises(SparsecraftError, match="use_reentrant=False"):
        model(input_ids=ids, labels=ids).loss.backward()


def test_threads_do_not_meet_in_the_residual():
    model = moepp()
    ids = [batch("llama")["input_ids"], batch("llama")["input_ids"].flip(-1)[:, :7]]
    wanted = [model(input_ids=i).logits.detach() for i in ids]
    wrong = []

    def run(number: int) -> None:
        for _ in range(20):
            found = model(input_ids=ids[number]).logits.detach()
            wrong.extend([number] if not torch.equal(found, wanted[number]) else [])

    threads = [threading.Thread(target=run, args=(n % 2,)) for n in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_a_cache_gives_what_a_whole_pass_gives():
    model, ids = moepp(), batch("llama")["input_ids"]
    whole = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :6], use_cache=True)
    second = model(input_ids=ids[:, 6:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5)


def test_a_copy_of_the_model_has_its_own_residual():
    model = moepp()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.sparsecraft.layers:
            layer.router.scorer.weight.mul_(2)
    by_hand(model, batch("llama"))
    by_hand(other, batch("llama"))


# ------------------------------------------------------------------------------------- upcycling


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "vit"])
def test_a_held_model_starts_as_the_dense_one(family):
    inputs = batch(family)
    wanted = dense(family)(**inputs).logits
    held, free = moepp(family, False, hold_steps=10), moepp(family, False)
    assert (held(**inputs).logits - wanted).abs().max() <= 2e-5
    assert (free(**inputs).logits - wanted).abs().max() > 1e-3


def test_zero_computation_experts_come_into_use(tmp_path):
    model = tiny.llama()
    options = SMALL | {"hold_steps": 4}
    sc.convert(model, sc.recipes.moepp(3, **options))
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())
    options = {"batch_size": 4, "max_length": 48, "tokenizer": tiny.tokenizer()}
    sc.train(model, rows, tmp_path / "run", steps=6, log_every=1, progress=False, **options)
    lines = [e for e in model.sparsecraft.report["training"][-1]["log"] if "loss" in e]
    assert lines[0]["computing_experts"] == 2, "held back at first"
    assert lines[-1]["computing_experts"] < 2
    assert all(layer.router.balance.value == 1 for layer in model.sparsecraft.layers)


def test_they_come_into_use_little_by_little():
    torch.manual_seed(0)
    router = build_router(RouterSpec(select=TopK(K, balance=Hold())), D, 7, experts=spec_of(0.5))
    x_TD, used = torch.randn(2000, D), []
    for value in (0, 0.2, 0.4, 0.6, 0.8, 1):
        router.balance.value.fill_(value)
        routing = router(x_TD)
        used.append((routing.indices_TK >= 3).float().mean().item())
        assert torch.equal(routing.logits_TE, x_TD @ router.scorer.weight.T)
    assert used[0] == 0 and 0.45 < used[-1] < 0.7
    steps = [after - before for before, after in pairwise(used)]
    assert all(0.01 < step < 0.25 for step in steps), used


def spec_of(tau: float) -> HeterogeneousSpec:
    return HeterogeneousSpec(num_experts=7, constant=2, copy=1, zero=1, tau=tau)


def test_held_experts_are_meant_to_have_nothing():
    """Capacity and loss are those of the plain mixture at the start, and tau's at the end."""
    torch.manual_seed(0)
    router = build_router(RouterSpec(select=TopK(K, balance=Hold())), D, 7, experts=spec_of(0.75))
    with torch.no_grad():
        router.scorer.weight.mul_(8)
    plain = build_router(RouterSpec(select=TopK(K)), D, 3)
    plain.scorer.weight.data = router.scorer.weight.data[:3]
    x_TD, capacity = torch.randn(300, D), Capacity(factor=1.1)
    held, wanted = router(x_TD), plain(x_TD)
    assert torch.equal(held.indices_TK, wanted.indices_TK)
    dropped = limited(held, capacity).indices_TK.clamp(max=3)
    assert torch.equal(dropped, limited(wanted, capacity).indices_TK)
    loss = heterogeneous_balance(held)
    assert loss.item() == pytest.approx(switch_balance(wanted).item() * K / 3, rel=1e-5)
    loss.backward()
    assert router.scorer.weight.grad.isfinite().all()
    assert (router.scorer.weight.grad[3:] == 0).all(), "nothing is said of the held ones"
    router.balance.value.fill_(1)
    assert router(x_TD).load_to_have_E().tolist() == pytest.approx(spec_of(0.75).load)


def test_a_training_that_ends_too_soon_says_so(tmp_path, caplog):
    model = tiny.llama()
    sc.convert(model, sc.recipes.moepp(3, **(SMALL | {"hold_steps": 50})))
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())
    options = {"batch_size": 4, "max_length": 48, "tokenizer": tiny.tokenizer()}
    sc.train(model, rows, tmp_path / "run", steps=2, progress=False, **options)
    assert caplog.text.count("for 48 of 50 steps") == 1


def test_the_defaults_train_as_they_start(tmp_path):
    """Held back, networks have the room of a plain mixture: the first steps drop no more."""
    dropped = {}
    for name, recipe in {
        "moepp": sc.recipes.moepp(4, hold_steps=100),
        "plain": sc.override(
            sc.recipes.upcycling(4), {"router.select.capacity": Capacity(factor=1.1)}
        ),
    }.items():
        model = tiny.llama()
        sc.convert(model, recipe)
        rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())
        options = {"batch_size": 8, "max_length": 48, "tokenizer": tiny.tokenizer()}
        sc.train(model, rows, tmp_path / name, steps=1, log_every=1, progress=False, **options)
        dropped[name] = model.sparsecraft.report["training"][-1]["log"][0]["dropped"]
    assert dropped["moepp"] < dropped["plain"] + 0.1


def test_the_distance_from_the_dense_model_is_printed():
    model = dense("llama")
    report = sc.convert(model, sc.recipes.moepp(3, **SMALL))
    assert not report.certificate.exact and report.certificate.max_difference > 1e-3
    assert "difference" in str(report)


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tau": 0.0}, "tau is 0.0"),
        ({"tau": -1.0}, "tau"),
        ({"tau": math.nan}, "tau"),
        ({"tau": 1e300}, "tau"),
        ({"copy": -1}, "copy is -1"),
        ({"preset": "8+3"}, "8\\+4"),
        ({"preset": "8+4", "num_experts": 16}, "num_experts=8"),
        ({"preset": "32+8", "constant": 2}, "constant=6"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": 2, "copy": -1}, "copy"),
        ({"num_experts": 1, "constant": 0, "copy": 0, "zero": 0}, "top_k is 2"),
        ({"capacity": -1.0}, "capacity"),
        ({"hold_steps": -5}, "steps"),
        ({"variant": "released code"}, "variant"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(RecipeError, match=words):
        sc.recipes.moepp(**options)


def test_no_standard_architecture_has_such_experts(tmp_path):
    model = tiny.llama()
    sc.convert(model, sc.recipes.moepp(3, **SMALL))
    with pytest.raises(ExportError, match="heterogeneous"):
        sc.export(model, "mixtral", tmp_path / "out")
    with pytest.raises(RecipeError, match="heterogeneous"):
        sc.extend(model, tiny.llama(), rows="reset")
    other = tiny.llama()
    sc.convert(other, sc.override(sc.recipes.upcycling(4), {"router.scorer": "residual"}))
    with pytest.raises(RecipeError, match="layer before"):
        sc.extend(other, tiny.llama(), rows="reset")


def test_eight_networks_have_the_presets_others():
    assert sc.recipes.moepp(8) == sc.recipes.moepp(preset="8+4") == sc.recipes.moepp()


def test_options_that_make_no_sense_together_are_refused():
    with pytest.raises(RecipeError, match="none of which computes nothing"):
        sc.override(sc.recipes.upcycling(4), {"router.select.balance": "hold"})
    with pytest.raises(RecipeError, match="lower top_k"):
        sc.recipes.moepp(2, 4)
    with pytest.raises(RecipeError, match="through"):
        sc.override(sc.recipes.moepp(4), {"router.select.through": True})


def test_a_residual_is_of_routers_by_token():
    with pytest.raises(RecipeError, match="by token"):
        RouterSpec(scorer=Residual(), reads="output")
    assert not RouterSpec(scorer=Linear()).reads_previous
