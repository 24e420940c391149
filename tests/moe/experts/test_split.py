"""Split networks: banks, rules, weightings, scorers, targets and losses against the papers' loops.

Shapes: T tokens, D width, E experts, m neurons of each, F = E m; R = E less the shared experts.
"""

from __future__ import annotations

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsecraft as sc
from sparsecraft.dense.donors import Linear, view
from sparsecraft.dense.sites import find_sites
from sparsecraft.errors import RecipeError, SparsecraftError
from sparsecraft.kernels import selection
from sparsecraft.moe.experts.base import set_dispatch
from sparsecraft.moe.experts.imitation import imitation
from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.moe.init.balanced import balanced_kmeans
from sparsecraft.moe.init.partition import random_partition
from sparsecraft.moe.losses import LOSSES, auxiliary_loss
from sparsecraft.moe.routers.gate import Gate
from sparsecraft.moe.routers.part_scorers import centers_ED, targets
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.experts import SplitSpec
from sparsecraft.recipe.routers import GateSpec
from sparsecraft.recipe.scorers import MLP, Analytic, LinearParts, Norm, Oracle, Similarity
from sparsecraft.recipe.selections import Above, Relative, Share, TopK
from sparsecraft.recipe.stages import Stage
from sparsecraft.surgery.budget import run, set_budget, split_layers
from sparsecraft.training.staging import begin_stage, end_stage, staged
from tests.cases import (
    FAMILIES,
    RECIPES,
    RUNNING,
    SPLITS,
    D,
    E,
    F,
    batch,
    choosy,
    dense,
    logits,
    randomize_new,
)
from tests.reference import splitting

families = pytest.mark.parametrize("family", FAMILIES)
# Gated with biases, gated without, plain with biases, plain ReLU with and without.
FORMS = ("llama", "mistral", "gpt2", "opt", "t5")
forms = pytest.mark.parametrize("family", FORMS)


def donor_of(family: str, model: nn.Module | None = None):
    model = dense(family).double() if model is None else model
    return view(model, find_sites(model, "ffn")[0])


def bank_of(family: str, num_experts: int = E, compensate: bool = False, seed: int = 1):
    """A bank in float64 with its neurons in random order and, if it compensates, some means."""
    bank = SplitExperts(
        SplitSpec(num_experts=num_experts, compensate=compensate), donor_of(family)
    ).eval()
    bank.arrange(random_partition(F, num_experts, seed=seed))
    if compensate:
        generator = torch.Generator().manual_seed(7)
        bank.mean.copy_(0.3 * torch.randn(bank.mean.shape, generator=generator))
    return bank


def net_of(family: str) -> dict:
    """The dense network for the transcriptions, read from the dense model."""
    donor = donor_of(family)
    first, bias = donor.first_weight().detach(), donor.first_bias()
    parts = {"act": donor.activation, "down": donor.down_weight().detach()}
    names = ("gate", "up") if donor.gated else ("up",)
    for name, rows in zip(names, first.split(F), strict=True):
        parts[name] = rows
    if bias is not None:
        for name, values in zip(names, bias.detach().split(F), strict=True):
            parts[f"{name}_bias"] = values
    if donor.down_bias() is not None:
        parts["down_bias"] = donor.down_bias().detach()
    return parts


def gate_of(bank: SplitExperts, **spec) -> Gate:
    return Gate(GateSpec(**({"weighting": "one"} | spec)), bank).double().eval()


def tokens(count: int = 5, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, generator=generator, dtype=torch.float64)


def routing_of(weights_TE: torch.Tensor, mask_TE: torch.Tensor) -> Routing:
    experts = weights_TE.shape[-1]
    indices_TE = torch.where(mask_TE, torch.arange(experts), experts)
    return Routing(weights_TE * mask_TE, indices_TE, torch.zeros_like(weights_TE), in_order=True)


def masks_of(kept: list[set[int]], num_experts: int = E) -> torch.Tensor:
    return torch.tensor([[e in chosen for e in range(num_experts)] for chosen in kept])


def kept_of(routing: Routing) -> list[set[int]]:
    return [{e for e in row if e < routing.num_experts} for row in routing.indices_TK.tolist()]


def near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-9) -> bool:
    theirs = torch.as_tensor(theirs, dtype=ours.dtype)
    return bool((ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item()))


# ---------------------------------------------------------------------------- splitting and merging


@families
@pytest.mark.parametrize("num_experts", [1, 4, 6, 48])
def test_splitting_and_going_back_is_bit_exact(family, num_experts):
    donor = donor_of(family, dense(family))
    bank = SplitExperts(SplitSpec(num_experts=num_experts), donor)
    wanted = {
        "first": donor.first_weight(),
        "first_bias": donor.first_bias(),
        "down": donor.down_weight(),
        "down_bias": donor.down_bias(),
    }
    rows = donor.first_weight()[:F].float()
    for neurons_EM in (
        None,
        random_partition(F, num_experts, seed=1),
        balanced_kmeans(rows, num_experts, seed=2),
        random_partition(F, num_experts, seed=3),
    ):
        if neurons_EM is not None:
            bank.arrange(neurons_EM)
            assert torch.equal(bank.neurons, neurons_EM)
        found = bank.dense()
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert (found[name] is None) == (tensor is None), name
            assert tensor is None or torch.equal(found[name], tensor), name


@forms
def test_an_expert_holds_the_neurons_that_it_names(family):
    bank, net = bank_of(family), net_of(family)
    for e, i in itertools.product(range(E), (0, 5, 11)):
        j = bank.neurons[e, i]
        first = [net[part][j] for part in ("gate", "up") if part in net]
        assert torch.equal(bank.first[e, i :: F // E], torch.stack(first))
        assert torch.equal(bank.down[e, i], net["down"][:, j])


def test_means_move_with_their_neurons():
    bank = bank_of("gpt2", compensate=True)
    before = dict(zip(bank.neurons.flatten().tolist(), bank.mean.flatten().tolist(), strict=True))
    constant = bank._constant().clone()
    bank.arrange(random_partition(F, E, seed=9))
    after = dict(zip(bank.neurons.flatten().tolist(), bank.mean.flatten().tolist(), strict=True))
    assert after == before
    assert near(bank._constant(), constant, 1e-6)


def test_what_is_no_partition_is_refused():
    bank = bank_of("opt")
    for wrong in (
        torch.arange(F).view(6, 8),
        torch.zeros(E, F // E, dtype=torch.long),
        torch.arange(1, F + 1).view(E, -1),
    ):
        before = bank.dense()
        with pytest.raises(SparsecraftError, match="name each of them once"):
            bank.arrange(wrong)
        assert torch.equal(bank.dense()["first"], before["first"])


def test_experts_that_cannot_share_the_neurons_are_refused_with_the_nearest_numbers():
    with pytest.raises(RecipeError) as caught:
        SplitExperts(SplitSpec(num_experts=7), donor_of("llama"))
    message = str(caught.value)
    assert "num_experts is 7" in message and "48 neurons" in message and "6, 8" in message
    assert "\n" not in message
    model = dense("llama")
    with pytest.raises(RecipeError, match="num_experts is 100"):
        sc.convert(model, sc.recipes.moefication(100))
    assert not hasattr(model, "sparsecraft")


# -------------------------------------------------------------------------------------- computation


@forms
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("path", ["loop", "dense", "gather", "auto"])
def test_a_selection_equals_the_papers_sum(family, compensate, path):
    bank, net, x_TD = bank_of(family, compensate=compensate), net_of(family), tokens(4)
    kept = [{0, 2}, set(), {0, 1, 2, 3}, {3}]
    mask_TE = masks_of(kept)
    bank.dispatch = path
    partition = bank.neurons.tolist()
    means = dict(zip(bank.neurons.flatten().tolist(), bank.mean.flatten(), strict=True)) if (
        compensate
    ) else None  # fmt: skip
    with torch.no_grad():
        ours = bank(x_TD, routing_of(torch.ones(4, E), mask_TE))
        theirs = splitting.split(net, partition, x_TD, kept, means=means)
    assert near(ours, theirs, 1e-6), "nothing selected, some, and everything"
    if not compensate:
        assert near(ours, theirs, 1e-12)


def test_the_means_of_a_float64_bank_are_as_exact_as_it():
    bank, net, x_TD = bank_of("gpt2", compensate=True), net_of("gpt2"), tokens(2)
    means = dict(zip(bank.neurons.flatten().tolist(), bank.mean.flatten(), strict=True))
    theirs = splitting.split(net, bank.neurons.tolist(), x_TD, [set(), {1}], means=means)
    with torch.no_grad():
        ours = bank(x_TD, routing_of(torch.ones(2, E), masks_of([set(), {1}])))
    assert near(ours, theirs, 1e-12)


@families
@pytest.mark.parametrize("compensate", [False, True])
def test_nothing_and_everything(family, compensate):
    """The bias once, and beside it the means; or the dense network."""
    bank, donor, x_TD = bank_of(family, compensate=compensate), donor_of(family), tokens()
    ones = torch.ones(len(x_TD), E)
    with torch.no_grad():
        nothing = bank(x_TD, routing_of(ones, ones < 0))
        wanted = torch.zeros(D) if donor.down_bias() is None else donor.down_bias()
        if compensate:
            wanted = wanted + bank.mean.flatten() @ bank.down.flatten(0, 1)
        assert near(nothing, wanted.expand(len(x_TD), -1), 1e-6)
        everything = bank(x_TD, routing_of(ones, ones > 0))
        assert near(everything, bank(x_TD), 1e-6)
        first = nn.functional.linear(x_TD, donor.first_weight(), donor.first_bias())
        hidden = donor.activation(first[:, :F]) * (first[:, F:] if donor.gated else 1)
        dense_output = nn.functional.linear(hidden, donor.down_weight(), donor.down_bias())
        assert near(bank(x_TD), dense_output, 1e-12)


@forms
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_dense_path_equals_the_loop_forward_and_backward(family, compensate, training):
    weights_TE = torch.rand(9, E, generator=torch.Generator().manual_seed(5)).double()
    mask_TE = weights_TE > 0.4
    mask_TE[2], mask_TE[5] = False, True
    found = {}
    for path in ("loop", "dense"):
        bank = bank_of(family, compensate=compensate)
        bank.hidden_dropout = bank.output_dropout = 0.0
        bank.train(training).dispatch = path
        x_TD, w_TE = tokens(9).requires_grad_(), weights_TE.clone().requires_grad_()
        y_TD = bank(x_TD, routing_of(w_TE, mask_TE))
        (y_TD * torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD).sin()).sum().backward()
        found[path] = [y_TD, x_TD.grad, w_TE.grad, *(p.grad for p in bank.parameters())]
    for loop, fast in zip(found["loop"], found["dense"], strict=True):
        if loop is None:  # of down's bias, which is in the constant that evaluation keeps
            assert compensate and not training and fast is None
        else:
            assert near(fast, loop.detach(), 1e-11)


def test_a_compensating_bank_has_the_same_gradients_in_evaluation_and_training():
    found = []
    for training in (True, False):
        bank = bank_of("gpt2", compensate=True).train(training)
        bank.hidden_dropout = bank.output_dropout = 0.0
        ones = torch.ones(3, E)
        y_TD = bank(tokens(3), routing_of(ones, masks_of([{0}, {1, 2}, set()])))
        y_TD.square().sum().backward()
        found.append(bank.down.grad)
    assert near(found[1], found[0], 1e-6)


def test_weights_that_are_loaded_in_evaluation_count_at_once():
    bank, other = bank_of("gpt2", compensate=True), bank_of("gpt2", compensate=True)
    with torch.no_grad():
        bank.mean.add_(1.0)
        other.load_state_dict(bank.state_dict())
        routing = routing_of(torch.ones(3, E), masks_of([{0}, {1, 2}, set()]))
        assert near(other(tokens(3), routing), bank(tokens(3), routing), 1e-6)


@pytest.mark.parametrize("name", ["mean", "down", "down_bias"])
def test_an_edit_in_evaluation_counts_at_once(name):
    bank = bank_of("gpt2", compensate=True)
    routing = routing_of(torch.ones(3, E), masks_of([{0}, {1, 2}, set()]))
    with torch.no_grad():
        bank(tokens(3), routing)  # what is kept from now on
        getattr(bank, name).add_(1.0)
        fresh = copy.deepcopy(bank).train().eval()  # which keeps nothing
        assert near(bank(tokens(3), routing), fresh(tokens(3), routing), 1e-12)


@pytest.mark.parametrize("family", ["t5", "t5_gated"])
def test_dropout_of_activations_is_that_of_the_dense_network(family):
    """In training T5 drops activations: with every expert, the same mask gives the same output."""
    bank = SplitExperts(SplitSpec(num_experts=E), donor_of(family, dense(family).train())).train()
    assert bank.hidden_dropout == 0.1
    x_TD, ones = tokens(200).float(), torch.ones(200, E)
    with torch.no_grad():
        torch.manual_seed(0)
        whole = bank(x_TD)
        torch.manual_seed(0)
        routed = bank(x_TD, routing_of(ones, ones > 0))
        assert near(routed, whole, 1e-5)
        assert not torch.equal(bank(x_TD), whole)
        dropped = torch.stack([bank(x_TD[:1].expand(2000, -1)).mean(0) for _ in range(4)]).mean(0)
        assert (dropped - bank.eval()(x_TD[:1])[0]).abs().max() < 0.1 * dropped.abs().max()


@pytest.mark.parametrize("recipe", SPLITS)
@families
def test_all_experts_by_the_rule_are_the_dense_model(family, recipe):
    """Not the short cut of a budget of 1.0: every router asked, every expert selected."""
    model, inputs = dense(family), batch(family)
    start = logits(model, inputs)
    sc.convert(model, RECIPES[recipe].make(), certify=False)
    choosy(model)
    for layer in split_layers(model).values():
        gate = layer.router
        gate.k = gate.num_experts - gate.spec.shared
        gate.threshold = {"threshold": -1.0, "relative": 0.0}.get(gate.spec.select.kind, 1.0)
    with sc.trace(model) as routing:
        found = logits(model, inputs)
    assert (found - start).abs().max() <= 1e-5
    assert all((r.weights_TE() == 1).all() for r in routing.values())
    set_budget(model, 1.0)
    assert (logits(model, inputs) - start).abs().max() <= 1e-5


@pytest.mark.parametrize("recipe", RUNNING)
def test_the_sparse_rows_of_the_table_are_sparse(recipe):
    """Or the suite would test them whole."""
    model, inputs = dense("llama"), batch("llama")
    sc.convert(model, RUNNING[recipe].make(), certify=False)
    randomize_new(model)
    RUNNING[recipe].ready(model)
    with sc.trace(model) as routing, torch.no_grad():
        model(**inputs)
    shares = [(r.indices_TK < E).float().mean().item() for r in routing.values()]
    assert all(0.05 < share < 0.95 for share in shares), shares


def test_set_dispatch_knows_the_paths_of_split_experts():
    model = dense("opt")
    sc.convert(model, RECIPES["moefication"].make(), certify=False)
    set_budget(model, 0.5)
    wanted = logits(model, batch("opt"))
    for path in ("loop", "dense", "gather", "grouped", "auto"):
        set_dispatch(model, path)
        assert (logits(model, batch("opt")) - wanted).abs().max() <= 1e-5
    set_dispatch(model, "merged")
    with pytest.raises(SparsecraftError, match="do not run by the 'merged' path; use auto, loop"):
        logits(model, batch("opt"))


@pytest.mark.parametrize("recipe", ["gmoefication", "d2dmoe", "lte"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_bf16_is_near_float32(family, recipe):
    model, inputs = dense(family), batch(family)
    sc.convert(model, RECIPES[recipe].make(), certify=False)
    randomize_new(model)
    choosy(model)
    layer = next(iter(split_layers(model).values()))
    x = tokens(7).float()[None]
    with torch.no_grad(), sc.trace(layer) as routing:
        wanted, scores = layer(x), routing[""].logits_TE
        found = layer.to(torch.bfloat16)(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert routing[""].logits_TE.dtype == routing[""].weights_TK.dtype == torch.float32
    assert (routing[""].logits_TE - scores).abs().max() <= 0.05 * scores.abs().max().clamp(min=1)
    same_T = (routing[""].indices_TK < E).eq(layer.router(x.float()).indices_TK < E).all(-1)
    assert (found - wanted)[0][same_T].abs().max() <= 0.05 * wanted.abs().max()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        again = layer.float()(x)
    assert (again - wanted)[0][same_T].abs().max() <= 0.1 * wanted.abs().max()
    assert logits(model.bfloat16(), inputs).isfinite().all()


# -------------------------------------------------------------------------------------------- rules


def scores_of(seed: int, experts: int = 7, ties: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(40, experts, generator=generator)
    return (scores * 4).ceil() / 4 if ties else scores


@pytest.fixture
def select():
    """(scores, rule, k, threshold) -> mask."""
    return lambda scores, rule, k, tau: selection.select(scores, rule, k or 1, 0.5 if tau is None
                                                         else tau)[0] > 0  # fmt: skip


LEVELS = (0.0, 0.1, 0.25, 0.5, 0.6, 0.75, 0.99, 1.0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rule", ["share", "relative", "threshold"])
def test_rules_by_threshold_equal_the_papers(select, rule, ties):
    theirs = getattr(splitting, rule)
    for seed, tau in itertools.product(range(3), LEVELS):
        scores_TE = scores_of(seed, ties=ties)
        mask_TE = select(scores_TE, rule, None, torch.tensor(tau))
        for scores_E, mask_E in zip(scores_TE, mask_TE, strict=True):
            if rule == "share" and ties and 0 < tau < 1:
                # Sums of quarters are exact, their quotients are not: compare sums.
                total = sum(scores_E.tolist())
                if any(abs(s / total - tau) < 1e-6 for s in scores_E.sort(descending=True)
                       .values.cumsum(0).tolist()):  # fmt: skip
                    continue
            wanted = theirs(scores_E.tolist(), float(torch.tensor(tau)))
            assert set(mask_E.nonzero().flatten().tolist()) == wanted, (scores_E, tau)


@pytest.mark.parametrize("ties", [False, True])
def test_top_k_equals_the_papers_and_prefers_the_lower_index(select, ties):
    for seed, k in itertools.product(range(3), range(1, 8)):
        scores_TE = scores_of(seed, ties=ties)
        mask_TE = select(scores_TE, "top_k", k, None)
        assert (mask_TE.sum(-1) == k).all()
        for scores_E, mask_E in zip(scores_TE, mask_TE, strict=True):
            wanted = splitting.largest(scores_E.tolist(), k)
            assert set(mask_E.nonzero().flatten().tolist()) == wanted


def test_known_selections(select):
    scores_TE = torch.tensor([[8.0, 4.0, 2.0, 1.0, 1.0]]) / 16

    def chosen(rule, tau):
        return select(scores_TE, rule, None, torch.tensor(tau))[0].nonzero().flatten().tolist()

    assert chosen("share", 0.5) == [0], "a share is reached by a sum that equals it"
    assert chosen("share", 0.75) == [0, 1]
    assert chosen("share", 0.76) == [0, 1, 2]
    assert chosen("share", 0.0) == [0], "one at least"
    assert chosen("share", 1.0) == [0, 1, 2, 3, 4]
    assert chosen("relative", 0.5) == [0, 1], ">= the share of the largest"
    assert chosen("relative", 1.0) == [0]
    assert chosen("threshold", 0.25) == [0], "above, not at"
    assert chosen("threshold", 0.5) == []
    even = torch.full((1, 5), 0.3)
    assert select(even, "relative", None, torch.tensor(1.0)).all()
    assert select(even, "top_k", 2, None)[0].tolist() == [True, True, False, False, False]
    zero = torch.zeros(1, 5)
    assert select(zero, "share", None, torch.tensor(0.9)).sum() == 1
    assert select(zero, "relative", None, torch.tensor(0.9)).all(), "0 >= 0.9 * 0, as the paper"


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rule", ["top_k", "share", "relative", "threshold"])
def test_a_smaller_budget_selects_a_subset(select, rule, ties):
    scores_TE = scores_of(11, experts=31, ties=ties)
    levels = range(1, 32) if rule == "top_k" else torch.linspace(0, 1, 41).tolist()
    masks = [
        select(scores_TE, rule, level, None)
        if rule == "top_k"
        else select(scores_TE, rule, None, torch.tensor(level))
        for level in levels
    ]
    masks = masks if rule in ("top_k", "share") else masks[::-1]
    for small, large in itertools.pairwise(masks):
        assert not (small & ~large).any()
    assert masks[0].sum() < masks[-1].sum()


def test_a_score_that_is_no_number_is_never_preferred(select):
    scores_TE = torch.tensor([[float("nan"), 0.2, 0.9]])
    for rule, k in (("top_k", 1), ("relative", None), ("threshold", None)):
        mask = select(scores_TE, rule, k, torch.tensor(0.5))
        assert mask[0].tolist() == [False, False, True], rule


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("rule", [TopK(2), Relative(0.5), Share(0.5), Above(0.5)])
def test_a_routing_names_no_expert_where_none_runs_and_shared_ones_always(rule, shared):
    bank = bank_of("gpt2", 6)
    gate = gate_of(bank, select=rule, shared=shared, squash="sigmoid").requires_grad_(False)
    x_TD = tokens(30)
    gate.scorer.weight.data *= 20
    routing = gate(x_TD)
    assert (
        routing.indices_TK.shape == routing.weights_TK.shape == routing.logits_TE.shape == (30, 6)
    )
    runs_TE = routing.indices_TK < 6
    assert torch.equal(routing.indices_TK[runs_TE], torch.arange(6).expand(30, -1)[runs_TE])
    assert (routing.indices_TK[~runs_TE] == 6).all()
    assert ((routing.weights_TK == 1) == runs_TE).all() and (
        (routing.weights_TK == 0) != runs_TE
    ).all()
    assert runs_TE[:, :shared].all()
    logits_TR = gate.scorer(x_TD)
    assert torch.equal(routing.logits_TE[:, shared:], logits_TR)
    scores_TR = logits_TR.sigmoid()
    for scores_R, row_E in zip(scores_TR, runs_TE[:, shared:], strict=True):
        theirs = (
            splitting.largest(scores_R, 2)
            if rule == TopK(2)
            else getattr(splitting, rule.kind)(scores_R, 0.5)
        )
        assert set(row_E.nonzero().flatten().tolist()) == theirs
    assert 0 < runs_TE[:, shared:].float().mean() < 1
    load_E = routing.load_E()
    assert torch.allclose(load_E, runs_TE.float().sum(0) / runs_TE.sum())


# --------------------------------------------------------------------------------------- weightings


def weights_of(gate: Gate, x_TD: torch.Tensor):
    routing = gate(x_TD)
    return routing, kept_of(routing), routing.weights_TE()


def test_weighting_scaled_is_the_softmax_of_the_kept_times_e_over_k():
    gate, x_TD = gate_of(bank_of("gpt2", 6), select=TopK(2), weighting="scaled"), tokens()
    routing, kept, weights_TE = weights_of(gate, x_TD)
    for t, chosen in enumerate(kept):
        assert chosen == splitting.largest(routing.logits_TE[t], 2)
        theirs = splitting.scaled(routing.logits_TE[t].detach(), chosen, 2)
        assert near(weights_TE[t], [theirs.get(e, 0.0) for e in range(6)], 1e-12)
        assert weights_TE[t].sum().item() == pytest.approx(3.0)


def test_weighting_scaled_counts_no_shared_expert():
    """E / k of the experts that are chosen among; a shared one runs with weight one."""
    gate = gate_of(bank_of("gpt2", 6), select=TopK(2), weighting="scaled", shared=2)
    weights_TE = gate(tokens()).weights_TE()
    assert (weights_TE[:, :2] == 1).all()
    assert near(weights_TE[:, 2:].sum(-1), torch.full((5,), 4 / 2), 1e-12)
    assert torch.equal(gate.weigh(tokens())[0], weights_TE)


def test_weighting_straight_through_is_one_with_the_gradient_of_the_softmax():
    x_TD, objective = tokens(), torch.randn(5, 6, dtype=torch.float64)
    ours = gate_of(bank_of("gpt2", 6), select=TopK(2), weighting="straight_through")
    routing, kept, weights_TE = weights_of(ours, x_TD)
    assert near(weights_TE, (routing.indices_TK < 6).double(), 1e-12)
    (weights_TE * objective).sum().backward()
    leaf = ours.scorer.weight.detach().clone().requires_grad_()
    total = 0.0
    for t, chosen in enumerate(kept):
        theirs = splitting.straight_through(leaf @ x_TD[t], chosen)
        total = total + sum(w * objective[t, e] for e, w in theirs.items())
    total.backward()
    assert near(ours.scorer.weight.grad, leaf.grad, 1e-12)
    assert leaf.grad.abs().max() > 1e-3


def test_weighting_straight_through_is_exactly_one():
    gate = Gate(
        GateSpec(select=TopK(2), weighting="straight_through"), bank_of("gpt2", 6).float()
    ).eval()
    routing = gate(tokens(200).float())
    assert torch.equal(routing.weights_TK, (routing.indices_TK < 6).float())


def test_weighting_score_multiplies_by_the_score():
    gate = gate_of(bank_of("gpt2", 6), select=TopK(3), weighting="score", squash="sigmoid")
    routing, kept, weights_TE = weights_of(gate, tokens())
    wanted = routing.logits_TE.sigmoid() * masks_of(kept, 6)
    assert torch.equal(weights_TE, wanted)
    weights_TE.sum().backward()
    assert gate.scorer.weight.grad.abs().max() > 0


def test_weighting_gain_starts_at_one_and_learns_first_the_gain_then_the_router():
    gate, x_TD = gate_of(bank_of("gpt2", 6), select=TopK(2), shared=2, weighting="gain"), tokens()
    routing, kept, weights_TE = weights_of(gate, x_TD)
    assert torch.equal(weights_TE, masks_of(kept, 6).double())
    weights_TE.square().sum().backward()
    assert gate.gain.grad.abs().max() > 0 and gate.scorer.weight.grad.abs().max() == 0
    with torch.no_grad():
        gate.gain.copy_(torch.linspace(-1, 1, 4))
    routing, kept, weights_TE = weights_of(gate, x_TD)
    for t, chosen in enumerate(kept):
        routed = {e - 2 for e in chosen} - {-1, -2}
        theirs = splitting.gain(routing.logits_TE[t, 2:], routed, gate.gain)
        wanted = [1.0, 1.0, *(theirs.get(e, torch.tensor(0.0)) for e in range(4))]
        assert near(weights_TE[t].detach(), torch.tensor([float(v) for v in wanted]), 1e-7)
    gate.zero_grad()
    weights_TE.square().sum().backward()
    assert gate.scorer.weight.grad.abs().max() > 0


def test_lte_multiplies_by_its_scores_in_the_soft_stage_and_not_after_it():
    """FFN_soft = sum_i G_i E_i, then sum_i 1[G_i > 0.5] E_i."""
    model, x_TD = dense("llama").double(), tokens(4)
    sc.convert(model, RECIPES["lte"].make(), certify=False)
    choosy(model)
    layer = next(iter(split_layers(model).values()))
    net, bank = net_of("llama"), layer.experts
    with torch.no_grad():
        gates_TE = (x_TD @ layer.router.scorer.weight.T + layer.router.scorer.bias).sigmoid()
        begin_stage(model, model.sparsecraft.recipe.stages[0])
        weights = [dict(enumerate(row)) for row in gates_TE]
        every = [set(range(E))] * 4
        theirs = splitting.split(net, bank.neurons.tolist(), x_TD, every, weights)
        assert near(layer(x_TD), theirs, 1e-9)
        model.sparsecraft.running.stages = ["soft"]
        begin_stage(model, model.sparsecraft.recipe.stages[1])
        kept = [splitting.threshold(row, 0.5) for row in gates_TE]
        assert 0 < sum(map(len, kept)) < 4 * E
        theirs = splitting.split(net, bank.neurons.tolist(), x_TD, kept)
        assert near(layer(x_TD), theirs, 1e-9)


# ------------------------------------------------------------------------------------------ scorers


@forms
def test_similarity_is_the_distance_to_the_mean_direction_of_the_first_rows(family):
    """Of the gate's rows where there is one (D2DMoE)."""
    bank, net, x_TD = bank_of(family), net_of(family), tokens()
    gate = gate_of(bank, scorer=Similarity())
    rows = net.get("gate", net["up"])
    center = splitting.centers(rows, bank.neurons.tolist())
    assert near(gate.scorer.centers, center, 1e-6)
    assert near(gate.scorer(x_TD), splitting.similarity(x_TD, center), 1e-6)
    assert torch.allclose(gate.scorer(7 * x_TD), gate.scorer(x_TD)), "only the direction counts"
    bank.arrange(random_partition(F, E, seed=5))
    gate.begin(bank)
    center = splitting.centers(rows, bank.neurons.tolist())
    assert near(gate.scorer(x_TD), splitting.similarity(x_TD, center), 1e-6)
    half = copy.deepcopy(bank).bfloat16()
    assert torch.equal(centers_ED(half), centers_ED(copy.deepcopy(half).float()))


def test_an_imitation_has_the_linears_cost_and_no_dropout():
    donor, where = Linear(nn.Linear(3, 2), "x"), {"device": "cpu", "dtype": torch.float64}
    for factor, width in ((6.0, 8), (5.0, 6), (0.01, 2)):  # factor (3 2 + 2) / (3 + 2 + 1)
        net = imitation(SplitSpec(num_experts=2, flops_factor=factor), donor, **where)
        assert (net.up.in_features, net.up.out_features) == (3, width)
        assert (net.down.in_features, net.down.out_features) == (width, 2)
        assert net.hidden_dropout == net.output_dropout == 0 and not net.fused


@forms
def test_the_mlp_starts_from_the_centers_and_the_identity(family):
    bank, net, x_TD = bank_of(family), net_of(family), tokens()
    gate = gate_of(bank, scorer=MLP())
    center = splitting.centers(net.get("gate", net["up"]), bank.neurons.tolist())
    assert near(gate.scorer.first, center, 1e-6)
    assert torch.equal(gate.scorer.second, torch.eye(E, dtype=torch.float64))
    theirs = splitting.mlp(x_TD, gate.scorer.first.detach(), gate.scorer.second.detach())
    assert near(gate.scorer(x_TD), torch.tensor(theirs), 1e-9)
    cosines = torch.stack([c @ x for x in x_TD for c in center]).view(len(x_TD), E)
    order = gate.scorer(x_TD).argsort(dim=-1)
    assert torch.equal(order, cosines.argsort(dim=-1)), "the ranks of the products with centers"
    with torch.no_grad():
        for parameter in gate.scorer.parameters():
            parameter.add_(torch.randn_like(parameter))
    theirs = splitting.mlp(x_TD, gate.scorer.first.detach(), gate.scorer.second.detach())
    assert near(gate.scorer(x_TD), torch.tensor(theirs), 1e-9)


def test_the_mlp_ranks_as_similarity_where_centers_have_one_length():
    """-|x - c| and x c differ by |c|, which the paper's epoch zero does not have either."""
    bank, x_TD = bank_of("gpt2"), tokens(40)
    similarity, mlp = gate_of(bank, scorer=Similarity()).scorer, gate_of(bank, scorer=MLP()).scorer
    with torch.no_grad():
        similarity.centers.copy_(nn.functional.normalize(similarity.centers, dim=-1))
        mlp.first.copy_(similarity.centers)
    assert torch.equal(similarity(x_TD).argsort(-1), mlp(x_TD).argsort(-1))


def test_norm_is_the_absolute_value_of_a_relu_network():
    bank, x_TD = bank_of("opt"), tokens()
    gate = gate_of(bank, scorer=Norm(hidden=9), select=Relative(0.5))
    first, second = gate.scorer.first.detach(), gate.scorer.second.detach()
    assert first.shape == (9, D) and second.shape == (E, 9)
    assert near(gate.scorer(x_TD), torch.tensor(splitting.norm(x_TD, first, second)), 1e-9)
    assert (gate.scorer(x_TD) >= 0).all()
    assert gate_of(bank, scorer=Norm()).scorer.first.shape == (128, D)


@forms
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("normalize", [False, True])
def test_analytic_is_the_activation_of_one_neuron_of_each_expert(family, shared, normalize):
    bank, net, x_TD = bank_of(family), net_of(family), tokens()
    gate = gate_of(bank, scorer=Analytic(normalize=normalize), shared=shared)
    places = torch.tensor([3, 0, 11, 7])[shared:]
    gate.scorer.begin(bank, places)
    chosen = [bank.neurons[e + shared, i].item() for e, i in enumerate(places)]
    if normalize:  # CMoE's code: directions of tokens and of rows
        x_TD = nn.functional.normalize(x_TD, dim=-1)
        for part in ("gate", "up"):
            if part in net:
                net[part] = torch.stack([splitting.unit(row) for row in net[part]])
    theirs = torch.tensor(splitting.analytic(net, chosen, x_TD))
    assert near(gate.scorer(tokens()), theirs, 1e-9)
    if not normalize:
        assert gate.products == splitting.analytic_router(D, E - shared, "gate" in net)


@forms
@pytest.mark.parametrize("target", ["mass", "output_norm", "intermediate_norm"])
def test_the_oracle_scores_what_a_router_should_predict(family, target):
    bank, x_TD = bank_of(family), tokens()
    gate = gate_of(bank, scorer=Oracle(), target=target, shared=1)
    assert torch.equal(gate.scorer(x_TD), targets(bank, x_TD, target)[:, 1:])
    assert not list(gate.parameters()) and not list(gate.buffers())


def test_a_copy_of_a_model_with_an_oracle_is_independent():
    model, inputs = dense("opt"), batch("opt")
    sc.convert(model, sc.recipes.moefication(E, 2, router="oracle"), certify=False)
    set_budget(model, None)
    twin = copy.deepcopy(model)
    wanted = logits(model, inputs)
    layers = list(split_layers(model).values()), list(split_layers(twin).values())
    for layer, other in zip(*layers, strict=True):
        assert other.router.scorer._bank[0] is other.experts is not layer.experts
    with torch.no_grad():
        for other in layers[1]:
            other.experts.first.neg_()
    assert torch.equal(logits(model, inputs), wanted)
    assert not torch.equal(logits(twin, inputs), wanted)
    set_budget(twin, 1.0)
    assert torch.equal(logits(model, inputs), wanted)


@pytest.mark.parametrize(
    "scorer", [LinearParts(), Similarity(), MLP(), Norm(), Analytic(), Oracle()]
)
def test_scores_are_float32_under_autocast(scorer):
    bank = bank_of("llama").float()
    gate = Gate(GateSpec(scorer=scorer, weighting="one"), bank)
    x_TD = tokens().float()
    wanted = gate(x_TD).logits_TE
    with torch.autocast("cpu", torch.bfloat16):
        routing = gate(x_TD)
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    assert torch.equal(routing.logits_TE, wanted)


# ------------------------------------------------------------------------------------------ targets


@forms
@pytest.mark.parametrize("compensate", [False, True])
def test_targets_equal_the_papers(family, compensate):
    bank, net, x_TD = bank_of(family, compensate=compensate), net_of(family), tokens(4)
    partition = bank.neurons.tolist()
    means = dict(zip(bank.neurons.flatten().tolist(), bank.mean.flatten(), strict=True)) if (
        compensate
    ) else None  # fmt: skip
    if compensate:
        for kind, theirs in (
            ("deviation", splitting.deviation),
            ("squared_deviation", splitting.squared_deviation),
        ):
            wanted = torch.tensor(theirs(net, partition, x_TD, means))
            assert near(targets(bank, x_TD, kind), wanted.float(), 1e-5)
        return
    for kind, theirs in (
        ("output_norm", splitting.output_norm),
        ("intermediate_norm", splitting.hidden_norm),
    ):
        wanted = torch.tensor(theirs(net, partition, x_TD))
        assert near(targets(bank, x_TD, kind), wanted.float(), 1e-5)
    for kind in ("deviation", "squared_deviation"):
        with pytest.raises(RecipeError, match=r"set experts\.compensate=true"):
            targets(bank, x_TD, kind)


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_mass_is_moefications_where_activations_are_not_negative(family):
    bank, net, x_TD = bank_of(family), net_of(family), tokens(4)
    wanted = torch.tensor(splitting.mass(net, bank.neurons.tolist(), x_TD))
    assert near(targets(bank, x_TD, "mass"), wanted.float(), 1e-5)


@families
@pytest.mark.parametrize("compensate", [False, True])
def test_the_output_norm_is_that_of_what_an_expert_adds(family, compensate):
    """By the explicit tensor (T, E, D)."""
    bank, x_TD = bank_of(family, compensate=compensate), tokens(20)
    with torch.no_grad():
        outputs_TED = torch.stack([bank.expert(e, x_TD) for e in range(E)], dim=1)
    wanted = outputs_TED.norm(dim=-1)
    assert near(targets(bank, x_TD, "output_norm"), wanted.float(), 1e-5)
    assert targets(bank, x_TD, "output_norm").dtype == torch.float32


def test_an_expert_that_adds_nothing_has_a_norm_of_zero():
    bank = bank_of("opt")
    with torch.no_grad():
        bank.down[1] = 0
    found = targets(bank, tokens(50), "output_norm")
    assert (found[:, 1] == 0).all() and (found >= 0).all() and found.isfinite().all()


def test_targets_know_no_dropout():
    bank = SplitExperts(SplitSpec(num_experts=E), donor_of("t5", dense("t5").train())).train()
    x_TD = tokens(50).float()
    found = targets(bank, x_TD, "mass")
    assert torch.equal(found, targets(bank.eval(), x_TD, "mass"))


# ------------------------------------------------------------------------------------------- losses


def sparsified(family: str, recipe: sc.Recipe, relu: bool) -> nn.Module:
    """A converted model in its first stage, in training mode, without dropout."""
    model = dense(family).double().train()
    sc.convert(model, recipe, certify=False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    begin_stage(model, recipe.stages[0])
    assert relu == all(
        isinstance(layer.experts.activation, nn.ReLU) for layer in split_layers(model).values()
    )
    return model


LOSS_FORMS = {
    "relu_hoyer": lambda pre: splitting.hoyer(pre.clamp(min=0)),
    "relu_l1": lambda pre: splitting.l1(pre.clamp(min=0)),
    "gelu_clamped_l1": lambda pre: splitting.l1(splitting.above(pre, -10.0)),
    "gelu_clamped_hoyer": lambda pre: splitting.hoyer(splitting.above(pre, -10.0)),
}


@pytest.mark.parametrize("name", LOSS_FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_sparsity_losses_equal_the_papers_and_leave_padding_out(family, name):
    """On what the activation (of the gate) reads, of every real token."""
    recipe = sc.recipes.d2dmoe(E, router_dim=8, sparsity=name)
    relu = name.startswith("relu") or family == "opt"
    model, ids = sparsified(family, recipe, relu), batch(family)["input_ids"]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 7:], mask[2, 3:] = False, False
    seen = {}
    layers = split_layers(model)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, n=n: seen.__setitem__(n, args[0].detach()))
        for n, layer in layers.items()
    ]
    with sc.trace(model) as routing:
        model(input_ids=ids, attention_mask=mask.long())
    for hook in hooks:
        hook.remove()
    total, parts = auxiliary_loss(routing, {name: 1.0}, lambda layer: mask)
    wanted = []
    for n, layer in layers.items():
        tensors = layer.experts.dense()
        x_TD = seen[n].reshape(-1, D)[mask.reshape(-1)]
        pre = nn.functional.linear(x_TD, tensors["first"], tensors["first_bias"])[:, :F].detach()
        wanted.append(LOSS_FORMS[name](pre))
    assert total.dtype == torch.float32
    assert parts[name].item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    everything, _ = auxiliary_loss(routing, {name: 1.0})
    assert everything.item() != pytest.approx(total.item(), rel=1e-6)
    total.backward()
    first = layers[next(iter(layers))].experts.first
    m = F // E
    assert first.grad[:, :m].abs().max() > 0
    if FAMILIES[family].gated and family != "opt":
        own = list(layers.values())[-1].experts.first.grad[:, m:]
        assert own.abs().max() == 0, "the last layer's other branch is not penalized"


def test_sparsity_losses_need_the_whole_network_in_training():
    recipe = sc.recipes.d2dmoe(E, router_dim=8)
    model = sparsified("gpt2", recipe, relu=True)
    with sc.trace(model.eval()) as routing, torch.no_grad():
        model(**batch("gpt2"))
    with pytest.raises(RecipeError, match=r"in training with stage.runs='every'"):
        auxiliary_loss(routing, recipe.stages[0].losses)
    run(model.train(), "sparse")
    with sc.trace(model) as routing:
        model(**batch("gpt2"))
    with pytest.raises(RecipeError, match="recorded none"):
        auxiliary_loss(routing, recipe.stages[0].losses)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_lte_losses_are_finite_at_the_start_and_equal_the_papers(family):
    recipe = RECIPES["lte"].make()
    model, ids = sparsified(family, recipe, relu=family == "opt"), batch(family)["input_ids"]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 5:] = False
    with sc.trace(model) as routing:
        model(input_ids=ids, attention_mask=mask.long())
    total, parts = auxiliary_loss(routing, recipe.stages[0].losses, lambda layer: mask)
    gates = [r.logits_TE.sigmoid()[mask.reshape(-1)].tolist() for r in routing.values()]
    assert 0.8 < torch.tensor(gates).mean() < 0.95, "nearly dense"
    assert parts["lte_efficiency"].item() == pytest.approx(splitting.efficiency(gates), rel=1e-5)
    theirs = splitting.separability(gates, epsilon=1e-2)
    assert parts["lte_separability"].item() == pytest.approx(theirs, rel=1e-5)
    assert theirs == pytest.approx(splitting.separability(gates), rel=0.1), "epsilon is small there"
    total.backward()
    for layer in split_layers(model).values():
        assert layer.router.scorer.weight.grad.isfinite().all()
        assert layer.router.scorer.weight.grad.abs().max() > 0


def test_lte_separability_is_finite_on_the_threshold():
    zeros = torch.zeros(3, 5, requires_grad=True)
    routing = routing_of(torch.ones(3, 5), torch.ones(3, 5) > 0)
    routing = Routing(routing.weights_TK, routing.indices_TK, zeros, in_order=True)
    loss = LOSSES["lte_separability"](routing, None)
    loss.backward()
    assert loss.item() == pytest.approx(100.0) and zeros.grad.isfinite().all()
    assert splitting.separability([[[0.5 + 1e-9]]]) > 1e17


@pytest.mark.parametrize("schedule", ["constant", "linear", "linear_warmup"])
def test_the_schedule_of_the_losses(schedule):
    from sparsecraft.training.trainers import RoutedTrainerMixin

    found = [
        RoutedTrainerMixin._loss_factor(
            SimpleNamespace(
                stage=sc.Stage(loss_schedule=schedule),
                state=SimpleNamespace(global_step=step),
                args=SimpleNamespace(max_steps=10),
            )
        )
        for step in (0, 2, 5, 7, 10)
    ]
    wanted = {
        "constant": [1.0] * 5,
        "linear": [0.0, 0.2, 0.5, 0.7, 1.0],
        "linear_warmup": [0.0, 0.4, 1.0, 1.0, 1.0],
    }
    assert found == pytest.approx(wanted[schedule])


# ------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5_gated"])
@pytest.mark.parametrize("recipe", ["moefication", "d2dmoe", "cmoe"])
def test_relu_comes_when_its_stage_begins(family, recipe):
    model, inputs = dense(family), batch(family)
    start = logits(model, inputs)
    sc.convert(model, RECIPES[recipe].make())
    layers = split_layers(model).values()
    assert not any(isinstance(layer.experts.activation, nn.ReLU) for layer in layers)
    stage = model.sparsecraft.recipe.stages[0]
    begin_stage(model, stage)
    rectified = isinstance(stage, Stage) and stage.activation == "relu"
    assert rectified == (recipe != "cmoe")
    assert all(isinstance(layer.experts.activation, nn.ReLU) == rectified for layer in layers)
    run(model, "every")
    assert ((logits(model, inputs) - start).abs().max() > 1e-3) == rectified
    sc.revert(model)
    assert torch.equal(logits(model, inputs), start)


def test_the_dense_models_activation_module_is_not_touched_by_relu():
    """Families share one activation module between layers."""
    model = dense("llama")
    before = model.model.layers[1].mlp.act_fn
    sc.convert(model, sc.recipes.moefication(E, 2, paths="model.layers.0.*"))
    begin_stage(model, model.sparsecraft.recipe.stages[0])
    assert isinstance(model.model.layers[0].mlp.experts.activation, nn.ReLU)
    assert model.model.layers[1].mlp.act_fn is before and not isinstance(before, nn.ReLU)


def test_an_analytic_router_takes_the_activation_that_its_network_takes():
    recipe = sc.override(
        sc.recipes.d2dmoe(E),
        {"router.scorer": "analytic", "router.squash": "abs"},
    )
    model = dense("gpt2")
    sc.convert(model, recipe, certify=False)
    begin_stage(model, recipe.stages[0])
    for layer in split_layers(model).values():
        assert isinstance(layer.router.scorer.activation, nn.ReLU)


def test_stages_decide_what_runs():
    model = dense("gpt2")
    sc.convert(model, RECIPES["d2dmoe"].make(), certify=False)
    layer = next(iter(split_layers(model).values()))
    sparsify, router = model.sparsecraft.recipe.stages
    assert layer.router.runs == "every" and model.sparsecraft.running.budget == 1.0
    begin_stage(model, sparsify)
    end_stage(model, sparsify)
    assert layer.router.runs == "every", "its routers are not made yet"
    begin_stage(model, router)
    end_stage(model, router)
    assert layer.router.runs == "sparse" and model.sparsecraft.running.budget is None
    assert model.sparsecraft.running.stages == ["sparsify", "router"]


@pytest.mark.parametrize(
    "recipe",
    [
        "lte",
        pytest.param(
            "cmoe_tuned",
        ),
    ],
)
def test_a_sparse_stage_trains_by_the_recipes_own_rule(recipe):
    """Whatever budget the model ran at before."""
    model = dense("gpt2")
    sc.convert(model, RECIPES[recipe].make(), certify=False)
    first, last = model.sparsecraft.recipe.stages
    begin_stage(model, first)
    end_stage(model, first)
    set_budget(model, 1.0)
    begin_stage(model, last)
    for layer in split_layers(model).values():
        gate = layer.router
        assert gate.runs == "sparse"
        assert gate.k == gate.spec.k
        assert gate.spec.threshold is None or gate.threshold == pytest.approx(gate.spec.threshold)


def test_a_stage_that_comes_again_makes_what_follows_it_untrained():
    """Routers that were fitted before the network was trained on know another network."""
    model = dense("gpt2")
    sc.convert(model, RECIPES["d2dmoe"].make(), certify=False)
    sparsify, router = model.sparsecraft.recipe.stages
    for stage in (sparsify, router, sparsify):
        begin_stage(model, stage)
        end_stage(model, stage)
    assert model.sparsecraft.running.budget == 1.0


@pytest.fixture
def base(tmp_path):
    def folder(family):
        dense(family).save_pretrained(tmp_path / family)
        return type(dense(family)).from_pretrained(tmp_path / family).eval()

    return folder


@pytest.mark.parametrize("recipe", SPLITS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_checkpoint_keeps_neurons_means_stages_and_budget(base, tmp_path, family, recipe):
    model, inputs = base(family), batch(family)
    sc.convert(model, RECIPES[recipe].make(), certify=False)
    randomize_new(model)
    for stage in model.sparsecraft.recipe.stages:
        begin_stage(model, stage)
        end_stage(model, stage)
    choosy(model)
    layers = split_layers(model)
    for number, layer in enumerate(layers.values()):
        layer.experts.arrange(random_partition(F, E, seed=number + 20))
    set_budget(model, 0.5 if layer.router.spec.k else None)
    running = model.sparsecraft.running
    wanted = logits(model, inputs)
    sc.save(model, tmp_path / "out")
    loaded = sc.load(tmp_path / "out")
    assert torch.equal(logits(loaded, inputs), wanted)
    assert loaded.sparsecraft.running == running
    for name, other in split_layers(loaded).items():
        layer = layers[name]
        assert torch.equal(other.experts.neurons, layer.experts.neurons)
        assert other.experts.neurons.dtype == torch.long
        assert type(other.experts.activation) is type(layer.experts.activation)
        assert (other.router.k, other.router.runs) == (layer.router.k, layer.router.runs)
        assert other.router.threshold == layer.router.threshold
        if layer.experts.mean is not None:
            assert torch.equal(other.experts.mean, layer.experts.mean)
    again = tmp_path / "again"
    sc.save(loaded, again)
    assert torch.equal(logits(sc.load(again), inputs), wanted)
    half = sc.load(tmp_path / "out", dtype=torch.bfloat16)
    assert logits(half, inputs).isfinite().all()


def test_a_budget_of_one_is_kept_too(base, tmp_path):
    model, inputs = base("opt"), batch("opt")
    start = logits(model, inputs)
    sc.convert(model, RECIPES["d2dmoe"].make())
    for stage in model.sparsecraft.recipe.stages:
        end_stage(model, stage)
    set_budget(model, 1.0)
    sc.save(model, tmp_path / "out")
    loaded = sc.load(tmp_path / "out")
    assert loaded.sparsecraft.running.budget == 1.0
    assert (logits(loaded, inputs) - start).abs().max() <= 1e-5


def test_a_manifest_from_before_split_networks_is_read(base, tmp_path):
    from sparsecraft.checkpoint.jsonfile import json_digest

    model, inputs = base("llama"), batch("llama")
    sc.convert(model, RECIPES["camelidae"].make())
    randomize_new(model)
    sc.save(model, tmp_path / "out")
    path = tmp_path / "out" / "recipe.json"
    data = json.loads(path.read_text())
    assert data.pop("running") is None
    data["digest"] = json_digest({k: v for k, v in data.items() if k != "digest"})
    path.write_text(json.dumps(data))
    assert torch.equal(logits(sc.load(tmp_path / "out"), inputs), logits(model, inputs))


def test_a_save_warns_of_routers_that_nothing_has_made(base, tmp_path, caplog):
    model = base("llama")
    sc.convert(model, RECIPES["moefication"].make())
    sc.save(model, tmp_path / "whole")
    assert "not been trained" not in caplog.text
    set_budget(model, 0.5)
    sc.save(model, tmp_path / "half")
    assert "a budget of 0.5, and its routers have not been trained" in caplog.text


@families
def test_permuting_experts_with_their_router_changes_nothing(family):
    model, inputs = dense(family), batch(family)
    sc.convert(model, RECIPES["lte"].make(), certify=False)
    randomize_new(model)
    choosy(model)
    before = logits(model, inputs)
    order = torch.tensor([2, 0, 3, 1])
    for layer in split_layers(model).values():
        layer.experts.arrange(layer.experts.neurons[order])
    assert (logits(model, inputs) - before).abs().max() > 1e-4, "experts alone"
    with torch.no_grad():
        for layer in split_layers(model).values():
            for parameter in layer.router.scorer.parameters():
                parameter.data = parameter.data[order]
    assert (logits(model, inputs) - before).abs().max() <= 1e-5


@forms
def test_counted_products_are_those_of_the_papers_formula(family):
    from sparsecraft.moe.cost import split_flops

    model = dense(family)
    gated = FAMILIES[family].gated
    whole = 2 * (3 if gated else 2) * D * F
    for recipe, router in (
        ("moefication", splitting.mlp_router(D, E)),
        ("d2dmoe", splitting.norm_router(D, 16, E)),
        ("moefication_random", splitting.linear_router(D, E)),
    ):
        sc.convert(model, RECIPES[recipe].make(), certify=False)
        layer = next(iter(split_layers(model).values()))
        for k in range(1, E):
            ratio = splitting.flops_ratio(D, F, E, k, gated, router)
            assert split_flops(layer, k / E) == pytest.approx(ratio * whole)
        assert split_flops(layer, 1) == whole
        sc.revert(model)


# ------------------------------------------------------------------- what stages leave behind them


def attended(activation: str = "relu_hoyer") -> torch.nn.Module:
    model = dense("llama")
    sc.convert(model, sc.recipes.d2dmoe(E, sparsity=activation, attention_experts=2))
    return model


@pytest.mark.parametrize("order", [("distill", "sparsify"), ("sparsify", "distill")])
def test_relu_and_imitations_outlive_a_checkpoint_in_any_order_of_stages(order, tmp_path):
    model = attended()
    stages = {stage.name: stage for stage in model.sparsecraft.recipe.stages}
    for name in order:
        with staged(model, stages[name]):
            pass
    sc.save(model.eval(), tmp_path / "saved")
    again = sc.load(tmp_path / "saved")
    assert again.sparsecraft.running == model.sparsecraft.running
    assert all(isinstance(la.experts.activation, torch.nn.ReLU) for la in again.sparsecraft.layers)
    assert torch.equal(logits(again, batch("llama")), logits(model, batch("llama")))


def test_a_stage_that_fails_leaves_the_model_running_as_before():
    model = dense("llama")
    sc.convert(model, sc.recipes.lte(E))
    start = logits(model, batch("llama"))
    with pytest.raises(KeyError), staged(model, model.sparsecraft.recipe.stages[0]):
        raise KeyError
    assert torch.equal(logits(model, batch("llama")), start)
    assert model.sparsecraft.running.stages == []


def test_a_stage_that_needs_routers_is_refused_before_they_are_made():
    model = dense("llama")
    sc.convert(model, sc.recipes.lte(E))
    with (
        pytest.raises(SparsecraftError, match="--stages soft hard"),
        staged(model, model.sparsecraft.recipe.stages[1]),
    ):
        pass


def test_losses_of_imitations_are_averaged_apart_and_added():
    model = attended("relu_l1").train()
    for layer in model.sparsecraft.layers:
        layer.experts.imitates = layer.place == "imitate"
    with sc.trace(model) as routing:
        model(**batch("llama"))
    groups = {name: model.get_submodule(name).place for name in routing}
    total, _ = auxiliary_loss(routing, {"relu_l1": 1.0}, groups=groups.__getitem__)
    means = [
        torch.stack([r.pre_TF.relu().sum(-1).mean() for n, r in routing.items() if groups[n] == g])
        for g in ("replace", "imitate")
    ]
    torch.testing.assert_close(total, sum(mean.mean() for mean in means))


def test_a_rule_that_is_changed_at_loading_takes_no_thresholds_of_another(tmp_path, caplog):
    model = dense("llama")
    sc.convert(model, sc.recipes.d2dmoe(E))
    model.sparsecraft.running.calibration = [(0.2, 0.8), (0.9, 0.1)]
    set_budget(model, 0.5)
    sc.save(model, tmp_path / "saved")
    again = sc.load(tmp_path / "saved", override={"router.threshold": 0.3})
    assert "changed at loading" in caplog.text
    gates = [layer.router for layer in split_layers(again).values()]
    assert all(gate.threshold == pytest.approx(0.3) for gate in gates)
    assert again.sparsecraft.running.budget is None
    assert again.sparsecraft.running.calibration == []
