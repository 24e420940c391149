"""Budgets of split networks, the search for thresholds, and what they cost."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sparsecraft as sc
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.budget.loads import Source, ffn_flops, model_flops, observe
from sparsecraft.evaluation.budget.thresholds import Search, critical
from sparsecraft.kernels.selection import select
from sparsecraft.moe import cost
from sparsecraft.moe.experts.base import set_dispatch
from sparsecraft.recipe.experts import SplitSpec
from sparsecraft.recipe.routers import GateSpec
from sparsecraft.recipe.scorers import MLP, Analytic, LinearParts, Norm, PartScorerSpec, Similarity
from sparsecraft.recipe.selections import Above, Relative, Rule, Share, TopK
from sparsecraft.surgery.budget import (
    Running,
    set_budget,
    share_of,
    split_layers,
    state_of,
    threshold_of,
    unchanged,
)
from sparsecraft.training.staging import begin_stage, end_stage, staged
from tests import cases, tiny

E = 8
RECIPES = {
    "moefication": lambda: sc.recipes.moefication(E, 2, relu=False),
    "gmoefication": lambda: sc.recipes.gmoefication(E, 2),
    "cmoe": lambda: sc.recipes.cmoe(E, 2, shared=2),
    "cmoe_tuned": lambda: sc.recipes.cmoe(E, 2, shared=2, variant="finetuned"),
    "dsti": lambda: sc.recipes.dsti(E, sparsity="none", router_dim=4),
    "d2dmoe": lambda: sc.recipes.d2dmoe(E, sparsity="none", router_dim=4),
    "lte": lambda: sc.recipes.lte(E),
}
BY_THRESHOLD = ("dsti", "d2dmoe", "lte")


def made(model, seed: int = 3):
    """The model with random routers, and all stages of its recipe noted as done."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in split_layers(model).values():
            for parameter in layer.router.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    for stage in model.sparsecraft.recipe.stages:
        end_stage(model, stage)
    return model


def split(recipe: sc.Recipe, family: str = "llama"):
    """A converted tiny model as if its stages had been through, with random routers."""
    model = cases.dense(family)
    sc.convert(model, recipe, certify=False)
    return made(model)


@functools.cache
def tokens() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, cases.VOCAB, (6, 16), generator=generator) for _ in range(3)]


def gates(model) -> list:
    return [layer.router for layer in split_layers(model).values()]


# ------------------------------------------------------------------------------------- set_budget


@pytest.mark.parametrize("name", RECIPES)
def test_a_budget_of_one_is_the_dense_function_and_none_the_recipes_rule(name):
    inputs = cases.batch("llama")
    wanted = cases.logits(cases.dense("llama"), inputs)
    model = split(RECIPES[name]())
    for gate in gates(model):  # whatever the router says, and however its experts are weighted
        if gate.gain is not None:
            gate.gain.data.fill_(0.7)
    routed = cases.logits(model, inputs)
    assert model.sparsecraft.running.budget is None
    assert (routed - wanted).abs().max() > 1e-3
    set_budget(model, 1.0)
    assert {gate.runs for gate in gates(model)} == {"every"}
    torch.testing.assert_close(cases.logits(model, inputs), wanted, rtol=1e-5, atol=1e-5)
    set_budget(model, None)
    assert torch.equal(cases.logits(model, inputs), routed)
    spec = gates(model)[0].spec
    assert gates(model)[0].k == spec.k
    if spec.threshold is not None:
        assert gates(model)[0].threshold == pytest.approx(spec.threshold)


@pytest.mark.parametrize("share", [1 / E, 0.2, 0.25, 0.3, 0.5, 0.51, 0.999])
def test_top_k_takes_the_share_rounded_up_shared_experts_among_them(share):
    for name in ("moefication", "cmoe"):
        model = split(RECIPES[name]())
        shared = gates(model)[0].spec.shared
        if math.ceil(share * E) <= shared:
            with pytest.raises(SparsecraftError, match=r"2 shared ones of 8; the least is 0\.375"):
                set_budget(model, share)
            continue
        set_budget(model, share)
        with sc.trace(model) as routing:
            cases.logits(model, cases.batch("llama"))
        for found in routing.values():
            assert ((found.indices_TK < E).sum(-1) == math.ceil(share * E)).all()
        active = [cost.active_share(layer) for layer in split_layers(model).values()]
        assert active == [math.ceil(share * E) / E] * len(active)


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan"), "half", True])
def test_a_budget_outside_of_its_range_is_refused(share):
    model = split(RECIPES["moefication"]())
    with pytest.raises(SparsecraftError, match="above 0 and at most 1"):
        set_budget(model, share)
    assert model.sparsecraft.running.budget is None


def test_models_without_split_networks_have_no_budget():
    with pytest.raises(SparsecraftError, match="no split networks"):
        set_budget(cases.dense("llama"), 0.5)
    model = cases.dense("llama")
    sc.convert(model, sc.recipes.lora(4), certify=False)
    with pytest.raises(SparsecraftError, match="no split networks"):
        set_budget(model, 0.5)
    with pytest.raises(SparsecraftError, match="no split networks"):
        sc.calibrate(model, tokens())


@pytest.mark.parametrize("name", BY_THRESHOLD)
def test_rules_by_threshold_need_a_calibration(name):
    model = split(RECIPES[name]())
    before = [gate.threshold for gate in gates(model)]
    with pytest.raises(SparsecraftError, match="sparsecraft calibrate DIR"):
        set_budget(model, 0.5)
    running: Running = model.sparsecraft.running
    assert running.budget is None and [gate.threshold for gate in gates(model)] == before
    running.calibration = [(0.2, 0.8), (0.6, 0.4)]
    set_budget(model, 0.5)
    assert gates(model)[0].threshold == pytest.approx(0.5) and running.budget == 0.5
    assert cost.active_share(next(iter(split_layers(model).values()))) == 0.5
    for outside in (0.19, 0.61):
        with pytest.raises(SparsecraftError, match=r"outside of what was calibrated, 0\.200 to 0"):
            set_budget(model, outside)
    assert running.budget == 0.5


def test_thresholds_between_two_points_lie_on_the_line():
    points = [(0.2, 0.9), (0.4, 0.5), (0.8, 0.1)]
    assert threshold_of(0.4, points) == 0.5 and threshold_of(0.8, points) == 0.1
    assert threshold_of(0.3, points) == pytest.approx(0.7)
    assert share_of(0.7, points) == pytest.approx(0.3)
    assert share_of(0.95, points) is None and share_of(0.5, []) is None


def test_the_recipes_rule_has_the_share_that_was_calibrated_for_its_threshold():
    model = split(RECIPES["d2dmoe"]())
    rule = gates(model)[0].spec.threshold
    model.sparsecraft.running.calibration = [(0.3, rule + 0.1), (0.5, rule - 0.1)]
    set_budget(model, None)
    assert gates(model)[0].share == pytest.approx(0.4)


def test_unchanged_gives_budget_thresholds_and_calibration_back():
    model = split(RECIPES["d2dmoe"]())
    running = model.sparsecraft.running
    running.calibration = [(0.2, 0.8), (0.6, 0.4)]
    set_budget(model, 0.3)
    before = state_of(model), gates(model)[0].threshold
    with pytest.raises(KeyError), unchanged(model):
        running.calibration.append((0.7, 0.1))
        set_budget(model, 1.0)
        gates(model)[0].threshold = 0.123
        raise KeyError
    assert (state_of(model), gates(model)[0].threshold) == before
    assert gates(model)[0].runs == "sparse"


# ----------------------------------------------------------------------------------------- counting


def routed(scorer: PartScorerSpec, select: Rule = TopK(3), **changes) -> sc.Recipe:
    """A recipe with this scorer; its router is made by nothing."""
    recipe = sc.recipes.moefication(E, 3, relu=False)
    router = GateSpec(scorer=scorer, select=select, weighting="one", **changes)
    (edit,) = recipe.edits
    experts = SplitSpec(num_experts=E, partition="contiguous")
    return dataclasses.replace(
        recipe, edits=(dataclasses.replace(edit, experts=experts, router=router),)
    )


SCORERS = {
    "linear": lambda: routed(LinearParts()),
    "sigmoid": lambda: routed(LinearParts(bias=0.1), Above(0.5), squash="sigmoid"),
    "similarity": lambda: routed(Similarity()),
    "mlp": lambda: routed(MLP(hidden=5)),
    "norm": lambda: routed(Norm(hidden=5), Relative(0.3)),
    "norm_share": lambda: routed(Norm(hidden=5), Share(0.6)),
    "analytic": lambda: routed(Analytic(), TopK(2), shared=2),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("scorer", SCORERS)
def test_counted_flops_are_the_formula(family, scorer):
    """torch's own counter on the loop, where only the experts run that were chosen."""
    model = split(SCORERS[scorer](), family)
    set_dispatch(model, "loop")
    for layer in split_layers(model).values():
        x = torch.randn(40, cases.D)
        with torch.no_grad(), sc.trace(layer) as routing:
            layer(x)  # what is computed once
            with FlopCounterMode(display=False) as counter:
                layer(x)
        pairs = (routing[""].indices_TK < E).sum().item()
        assert 0 < pairs < 40 * E
        products = 40 * layer.router.products + pairs * layer.experts.products // E
        assert counter.get_total_flops() == 2 * products
        # Of a token, where the mean need not be whole.
        assert cost.split_flops(layer, pairs / (40 * E)) == round(2 * products / 40)


def test_the_share_of_flops_adds_the_router_and_leaves_padding_out():
    model = split(SCORERS["norm"]())
    ids = tokens()[0].clone()
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    padded = [{"input_ids": ids * mask, "attention_mask": mask}]
    with_padding, without = observe(model, padded), observe(model, [{"input_ids": ids[:, :10]}])
    for name in with_padding.loads:
        torch.testing.assert_close(with_padding.loads[name], without.loads[name])
    assert with_padding.loss == pytest.approx(without.loss, abs=1e-5)
    layers = split_layers(model)
    dense = 2 * (3 if "llama" else 2) * cases.D * cases.F
    router = 2 * (5 * cases.D + E * 5)
    wanted = sum(with_padding.shares[n] + router / dense for n in layers) / len(layers)
    found = ffn_flops(model, with_padding.shares)
    assert found == pytest.approx(wanted) and found > with_padding.share
    # The rest of the model stays.
    total = cost.count(cases.dense("llama")).flops_per_token
    assert model_flops(model, found) == pytest.approx(
        (total - (1 - found) * dense * len(layers)) / total
    )


def test_what_several_tokens_run_together_is_at_least_what_one_runs():
    model = split(SCORERS["norm"]())
    seen = observe(model, [{"input_ids": ids} for ids in tokens()], groups=(1, 4, 16))
    assert seen.unions[1] == pytest.approx(seen.share, abs=1e-6)
    assert seen.unions[1] < seen.unions[4] < seen.unions[16] <= 1
    assert seen.load_cv > 0
    set_budget(model, 1.0)
    dense = observe(model, [{"input_ids": ids} for ids in tokens()], groups=(4,))
    assert dense.share == 1 and dense.unions == {4: 1.0} and dense.load_cv == 0


# -------------------------------------------------------------------------------------- calibrating


@pytest.mark.parametrize("rule", ["share", "relative", "threshold"])
def test_an_expert_begins_to_run_at_its_critical_threshold(rule):
    scores_TE = torch.rand(50, E).double()
    runs_at = critical(scores_TE, rule)
    for threshold in (0.1, 0.35, 0.7, 0.95):
        chosen = select(scores_TE, rule, 1, torch.tensor(threshold, dtype=torch.float64))[0] > 0
        wanted = runs_at < threshold if rule == "share" else runs_at >= threshold
        assert torch.equal(chosen, wanted)


@pytest.mark.parametrize("name", BY_THRESHOLD)
def test_calibrate_reaches_the_flops_and_stores_what_it_measured(name):
    model = split(RECIPES[name]())
    targets = (0.6, 0.8, 0.45)
    found = sc.calibrate(model, tokens(), target_flops=targets)
    running = model.sparsecraft.running
    for setting, target in zip(found.settings, targets, strict=True):
        assert target - 0.03 <= setting.ffn_flops <= target  # few tokens: shares come in steps
    shares, thresholds = zip(*running.calibration, strict=True)
    assert list(shares) == sorted(set(shares))
    falls = list(thresholds) == sorted(set(thresholds), reverse=True)
    assert falls or (name == "dsti" and list(thresholds) == sorted(set(thresholds)))
    # The first target is set, and running it again measures the same.
    assert running.budget == found.settings[0].share
    seen = observe(model, Source(model, tokens(), None, None, "train").batches())
    assert seen.share == pytest.approx(found.settings[0].share, abs=1e-9)
    assert seen.loss == pytest.approx(found.settings[0].loss, abs=1e-6)
    # Budgets between what was measured run about what they say, in order.
    ran = []
    for part in (0, 0.2, 0.5, 0.8, 1):
        share = shares[0] * (1 - part) + shares[-1] * part
        set_budget(model, share)
        ran.append(observe(model, [{"input_ids": ids} for ids in tokens()]).share)
        assert ran[-1] == pytest.approx(share, abs=0.08)
    assert ran == sorted(ran)


def test_calibrate_by_top_k_follows_the_formula():
    model = split(RECIPES["moefication"]())
    found = sc.calibrate(model, tokens(), target_flops=0.5)
    (setting,) = found.settings
    layers = split_layers(model)

    def flops(k):
        dense = sum(cost.split_flops(layer, 1.0) for layer in layers.values())
        return sum(cost.split_flops(layer, k / E) for layer in layers.values()) / dense

    assert setting.k == max(k for k in range(1, E) if flops(k) <= 0.5)
    assert setting.ffn_flops == pytest.approx(flops(setting.k), rel=1e-6)
    assert found.points == () and {gate.k for gate in gates(model)} == {setting.k}
    assert f"k {setting.k}" in str(found) and "dense" in str(found)


@pytest.mark.parametrize(
    ("name", "target", "said"),
    [
        ("moefication", 0.05, r"routers alone take 0\.\d+; with the fewest .* least is 0\.\d+"),
        ("d2dmoe", 0.1, r"least is 0\.\d+"),
        ("d2dmoe", 1.5, "above 0 and at most 1"),
        ("d2dmoe", (), "target_flops is empty"),
    ],
)
def test_targets_out_of_reach_are_refused_before_anything_changes(name, target, said):
    model = split(RECIPES[name]())
    before = state_of(model)
    with pytest.raises(SparsecraftError, match=said):
        sc.calibrate(model, tokens(), target_flops=target)
    assert state_of(model) == before


def test_a_target_that_the_data_does_not_give_says_what_it_gives(monkeypatch):
    model = split(RECIPES["lte"]())
    for gate in gates(model):  # all scores alike: all experts or none
        gate.scorer.weight.data.zero_()
        gate.scorer.bias.data.zero_()
    before = state_of(model)
    monkeypatch.setattr(Search, "threshold_at", lambda self, place: 0.4)
    with pytest.raises(SparsecraftError, match=r"The target is 0\.5 and the least .* is 1\.\d+"):
        sc.calibrate(model, tokens(), target_flops=0.5)
    assert state_of(model) == before and gates(model)[0].threshold == 0.5


def test_untrained_routers_are_not_calibrated():
    model = cases.dense("llama")
    sc.convert(model, RECIPES["d2dmoe"](), certify=False)
    with pytest.raises(SparsecraftError, match="sparsecraft train DIR"):
        sc.calibrate(model, tokens())


def test_calibrating_needs_data_and_a_tokenizer(tmp_path):
    model = split(RECIPES["d2dmoe"]())
    with pytest.raises(DataError, match="no batch"):
        sc.calibrate(model, [])
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows(4))
    with pytest.raises(DataError, match="tokenizer"):
        sc.calibrate(model, rows)
    encoder = split(RECIPES["d2dmoe"](), "bert")
    with pytest.raises(DataError, match="iterable of dicts"):
        sc.calibrate(encoder, rows, tokenizer=tiny.tokenizer())
    found = sc.calibrate(encoder, [cases.batch("bert")], target_flops=0.7)
    assert found.settings[0].loss is None and 0.6 < found.settings[0].ffn_flops <= 0.7


@pytest.mark.parametrize("family", ["t5", "vit"])
def test_families_with_other_inputs_are_calibrated(family):
    model = split(RECIPES["d2dmoe"](), family)
    found = sc.calibrate(model, [cases.batch(family, labels=True)], target_flops=0.7)
    assert 0.6 < found.settings[0].ffn_flops <= 0.7
    assert (found.settings[0].loss is None) == (family == "vit")
    if family == "t5":
        with pytest.raises(DataError, match="labels"):
            sc.calibrate(model, [cases.batch(family)], target_flops=0.7)


def test_a_calibration_is_saved_and_loaded(tmp_path):
    model = tiny.llama()
    sc.convert(model, RECIPES["d2dmoe"](), certify=False)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows(30))
    options = {"tokenizer": tiny.tokenizer(), "max_length": 64}
    sc.save(made(model), tmp_path / "made", tokenizer=tiny.tokenizer())
    sc.calibrate(tmp_path / "made", rows, target_flops=(0.6, 0.8), max_length=64)
    loaded = sc.load(tmp_path / "made")
    running = loaded.sparsecraft.running
    assert len(running.calibration) >= 2 and running.stages == ["router"]
    assert running.budget in [share for share, _ in running.calibration]
    assert loaded.sparsecraft.report["calibration"]["settings"][0]["target_flops"] == 0.6
    again = sc.calibrate(model, rows, target_flops=(0.6, 0.8), **options)
    assert running.calibration == list(again.points)
    between = (running.calibration[0][0] + running.calibration[-1][0]) / 2
    ids = {"input_ids": torch.randint(3, 300, (2, 9))}
    for share in (running.budget, between, 1.0, None):
        set_budget(loaded, share)
        set_budget(model, share)
        assert torch.equal(cases.logits(loaded, ids), cases.logits(model, ids))
    set_budget(loaded, between)
    sc.save(loaded, tmp_path / "between")
    assert sc.load(tmp_path / "between").sparsecraft.running.budget == between
    # Training again changes the weights that the thresholds are of.
    end_stage(loaded, loaded.sparsecraft.recipe.stages[0])
    assert running.calibration == [] and running.budget is None


# -------------------------------------------------------------------------------------- not trained


def test_an_untrained_split_warns_before_it_is_saved(tmp_path, caplog):
    model = tiny.llama()
    sc.convert(model, RECIPES["moefication"](), certify=False)
    with caplog.at_level(logging.WARNING, "sparsecraft"):
        sc.save(model, tmp_path / "whole")
        assert not caplog.messages  # every expert runs
        set_budget(model, 0.5)
        sc.save(model, tmp_path / "half")
        (message,) = caplog.messages
        assert "budget of 0.5" in message and "not been trained" in message
        assert "sparsecraft train DIR" in message
        caplog.clear()
        set_budget(model, None)
        sc.save(model, tmp_path / "rule")
        assert "by its recipe's rule" in caplog.messages[0]
        caplog.clear()
        for stage in model.sparsecraft.recipe.stages:
            end_stage(model, stage)
        sc.save(model, tmp_path / "made")
        assert not caplog.messages


def test_a_calibration_does_not_outlive_its_rule(tmp_path):
    model = split(RECIPES["d2dmoe"]())
    model.sparsecraft.running.calibration = [(0.2, 0.8), (0.9, 0.1)]
    sc.set_budget(model, 1.0)
    sc.save(model, tmp_path / "out")
    changed = sc.load(tmp_path / "out", override={"router.select": "share"})
    assert changed.sparsecraft.running.budget == 1.0
    with pytest.raises(SparsecraftError, match="needs thresholds that were measured"):
        sc.set_budget(changed, 0.5)
    assert sc.load(tmp_path / "out").sparsecraft.running.calibration == [(0.2, 0.8), (0.9, 0.1)]


def test_a_measured_share_gives_its_own_threshold():
    points = [(0.497, 0.30), (0.4995, 0.29), (0.9, 0.1)]
    assert threshold_of(0.4995, points) == 0.29
    assert threshold_of(0.494, points) == 0.30  # as it was printed
    assert threshold_of(0.904, points) == 0.1
    with pytest.raises(SparsecraftError, match="lies outside"):
        threshold_of(0.49, points)


def test_a_failed_stage_leaves_the_share_as_it_was():
    model = split(RECIPES["lte"]())
    sc.calibrate(model, tokens(), target_flops=0.7)
    before = [gate.share for gate in gates(model)]
    (stage,) = [s for s in model.sparsecraft.recipe.stages if s.name == "hard"]
    with pytest.raises(RuntimeError), staged(model, stage):
        raise RuntimeError
    assert [gate.share for gate in gates(model)] == before and None not in before


def test_routers_are_not_fitted_before_the_relu_that_they_are_for():
    model = cases.dense("llama")
    sc.convert(model, sc.recipes.moefication(E, 2), certify=False)
    (stage,) = [s for s in model.sparsecraft.recipe.stages if s.name == "router"]
    with pytest.raises(SparsecraftError, match="--stages sparsify router"):
        begin_stage(model, stage)
    opt = cases.dense("opt")  # has ReLU of its own
    sc.convert(opt, sc.recipes.moefication(E, 2), certify=False)
    begin_stage(opt, stage)


def test_a_similarity_router_is_counted():
    model = cases.dense("llama")
    recipe = sc.recipes.moefication(E, 2, router="similarity", relu=False)
    dense = sc.convert(model, recipe, certify=False).cost
    assert dense.new == 0
    sc.set_budget(model, 0.5)
    layers = split_layers(model).values()
    saved = sum(layer.experts.products // 2 - layer.router.products for layer in layers)
    assert sum(layer.router.products for layer in layers) == 2 * E * cases.D
    assert dense.flops_per_token - cost.count(model).flops_per_token == 2 * saved


def test_a_budget_of_untrained_routers_is_warned_of(caplog):
    from sparsecraft.cli.options import set_for

    model = cases.dense("llama")
    sc.convert(model, sc.recipes.gmoefication(E, 2), certify=False)
    set_for(model, 1.0)
    assert not caplog.records
    set_for(model, 0.5)
    assert "routers have not been trained" in caplog.text


def test_the_means_own_output_follows_every_change():
    model = split(RECIPES["gmoefication"]())
    sc.set_budget(model, 0.5)
    bank = next(iter(split_layers(model).values())).experts.eval()
    with torch.no_grad():
        first = bank._constant().clone()
        bank.mean.data.fill_(1.0)
        bank.eval()
        assert torch.equal(bank._constant(), bank._summed())
        assert not torch.equal(bank._constant(), first)
    with torch.inference_mode():
        bank.mean = bank.mean.clone()
        bank.mean.fill_(2.0)
        once = bank._constant().clone()
        bank.mean.fill_(3.0)
        assert not torch.equal(bank._constant(), once)


def test_the_dense_flops_leave_out_a_similarity_router():
    model = cases.dense("llama")
    whole = cost.count(model).flops_per_token
    recipe = sc.recipes.moefication(E, 2, router="similarity", relu=False)
    sc.convert(model, recipe, certify=False)
    sc.set_budget(model, 0.5)
    ffns = sum(cost.split_flops(layer, 1) for layer in split_layers(model).values())
    assert model_flops(model, 0.5) == pytest.approx(1 - 0.5 * ffns / whole)
