"""Every recipe on every family: what is true of all of them."""

from __future__ import annotations

import pytest
import torch

import sparsecraft as sc
from sparsecraft.moe import cost
from sparsecraft.moe.experts.base import set_dispatch
from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.losses import auxiliary_loss
from sparsecraft.moe.names import dense_name
from sparsecraft.moe.routers.router import Router
from sparsecraft.recipe.stages import Fit
from sparsecraft.surgery.trainable import set_trainable
from sparsecraft.training.staging import begin_stage
from tests.cases import (
    FAMILIES,
    RECIPES,
    RUNNING,
    D,
    E,
    K,
    batch,
    dense,
    logits,
    randomize_new,
)

EVERY = [(f, r) for f in FAMILIES for r in RECIPES]
every = pytest.mark.parametrize(("family", "recipe"), EVERY, ids=["-".join(c) for c in EVERY])

# One family of each kind, where a behavior does not touch how a family names its parts.
KINDS = ("llama", "phi3", "gpt2", "opt", "bert", "t5", "vit")
kinds = pytest.mark.parametrize("family", KINDS)
# Both are of the same parts as their neighbors in the table.
KINDS_OF_RECIPES = [n for n in RECIPES if n not in ("dsti", "moefication_random")]
recipes = pytest.mark.parametrize("recipe", KINDS_OF_RECIPES)
routed = pytest.mark.parametrize("recipe", [name for name, case in RECIPES.items() if case.routed])
METHODS = pytest.mark.parametrize(
    "recipe",
    ["camelidae", "upcycling", "upcycling_raw", "mov_released", "molora", "mixlora", "smola_slots"],
)
# Split networks whole, and as their routers run them.
ALL = RECIPES | RUNNING
SOME_RUNNING = ["gmoefication_sparse", "d2dmoe_sparse", "lte_sparse", "cmoe_tuned_sparse"]
states = pytest.mark.parametrize("recipe", [*KINDS_OF_RECIPES, *SOME_RUNNING])
METHODS_RUNNING = pytest.mark.parametrize(
    "recipe", [*METHODS.args[1], "attentive_samples", "moepp", "mpoe", "nexus", *SOME_RUNNING]
)


def converted(family: str, recipe: str, moved: bool = True, **kwargs) -> torch.nn.Module:
    """A converted model; `moved` takes its new parameters away from their start."""
    model = dense(family)
    sc.convert(model, ALL[recipe].make(), **kwargs)
    if moved:
        randomize_new(model)
    ALL[recipe].ready(model)
    return model


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[n], right[n]) for n in left)


def losses_of(recipe: sc.Recipe, model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """The task loss plus the recipe's auxiliary losses, as the trainer adds them."""
    with sc.trace(model, inputs=True) as routing:
        loss = model(**inputs).loss
        auxiliary, _ = auxiliary_loss(routing, recipe.stages[0].losses)
    return loss if auxiliary is None else loss + auxiliary


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        scale = max(1.0, left[name].abs().max().item())
        assert (left[name] - right[name]).abs().max() <= 2e-5 * scale, name


# ----------------------------------------------------------------------- the start and the way back


@every
def test_starts_as_claimed_with_the_claimed_parameters_and_reverts(family, recipe):
    case, model, inputs = RECIPES[recipe], dense(family), batch(family)
    start, state = logits(model, inputs), snapshot(model)
    names = [name for name, _ in model.named_modules()]

    report = sc.convert(model, case.make())
    difference = (logits(model, inputs) - start).abs().max().item()
    assert report.exact_at_start is case.exact
    assert report.certificate.exact is case.exact
    if case.exact:
        assert difference <= 1e-5
        assert report.certificate.max_difference <= 1e-5
    else:
        assert difference > 1e-2, "the claim 'not exact' has to be true as well"
    assert report.cost.new == case.new(FAMILIES[family])
    total = sum(p.numel() for p in model.parameters())
    assert report.cost.total == total

    randomize_new(model)
    assert (logits(model, inputs) - start).abs().max() > 1e-2, "the new parameters do nothing"
    sc.revert(model)
    assert same(snapshot(model), state)
    assert torch.equal(logits(model, inputs), start)
    assert [name for name, _ in model.named_modules()] == names
    assert not hasattr(model, "sparsecraft")
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize("path", ["loop", "grouped", "dense"])
@pytest.mark.parametrize("recipe", ["camelidae", "camelidae_no_lora"])
@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_adapters_start_as_the_dense_model_on_every_path(family, recipe, path):
    model, inputs = dense(family), batch(family)
    start = logits(model, inputs)
    sc.convert(model, RECIPES[recipe].make())
    set_dispatch(model, path)
    assert (logits(model, inputs) - start).abs().max() <= 1e-5


@kinds
def test_camelidae_reverts_after_training_because_its_base_is_frozen(family):
    model, inputs = dense(family), batch(family, labels=True)
    start, state = logits(model, batch(family)), snapshot(model)
    sc.convert(model, RECIPES["camelidae"].make())
    fit(model, RECIPES["camelidae"].make(), inputs, steps=2)
    assert (logits(model, batch(family)) - start).abs().max() > 1e-4
    sc.revert(model.eval())
    assert same(snapshot(model), state)
    assert torch.equal(logits(model, batch(family)), start)


@kinds
@recipes
def test_requires_grad_and_modes_come_back(family, recipe):
    model = dense(family).train()
    frozen = next(n for n, _ in model.named_parameters())
    model.get_parameter(frozen).requires_grad_(False)
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    sc.convert(model, RECIPES[recipe].make())
    assert all(module.training for module in model.modules())
    sc.revert(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert all(module.training for module in model.modules())


# --------------------------------------------------------------------------------------- fast paths


@kinds
@pytest.mark.parametrize(
    ("recipe", "path"),
    [
        (n, p)
        for n, c in ALL.items()
        if n in RECIPES or n in SOME_RUNNING
        for p in c.paths
        if c.routed
    ],
)
def test_fast_paths_equal_the_loop_forward_and_backward(family, recipe, path):
    model, inputs = converted(family, recipe), batch(family, labels=True)
    model.requires_grad_(True)
    results = {}
    for name in ("loop", path):
        set_dispatch(model, name)
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        results[name] = {"logits": output.logits.detach(), **gradients(model)}
    assert any(".experts." in n for n in results["loop"])
    assert any(".router." in n for n in results["loop"]) == ALL[recipe].learns_router
    assert_close(results["loop"], results[path])


@kinds
@pytest.mark.parametrize("recipe", SOME_RUNNING)
def test_reading_only_the_selected_experts_equals_the_loop(family, recipe):
    model, inputs = converted(family, recipe), batch(family)
    results = {}
    for name in ("loop", "gather"):
        for module in model.modules():
            if isinstance(module, SplitExperts):
                module.dispatch = name
        results[name] = {"logits": logits(model, inputs)}
    assert_close(results["loop"], results["gather"])


# ----------------------------------------------------------------------------------------- training


def fit(model, recipe: sc.Recipe, inputs: dict, steps: int, rate: float = 5e-3) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    history = []
    torch.manual_seed(0)
    model.train()
    begin_stage(model, recipe.stages[0])
    for _ in range(steps):
        optimizer.zero_grad()
        loss = losses_of(recipe, model, inputs)
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def quiet_loss(model: torch.nn.Module, inputs: dict) -> float:
    """The task loss without dropout, whose noise could hide or fake a fall."""
    with torch.no_grad():
        return model.eval()(**inputs).loss.item()


@kinds
@recipes
def test_only_the_named_parameters_train_and_the_loss_falls(family, recipe):
    case, inputs = RECIPES[recipe], batch(family, labels=True)
    model = dense(family)
    spec = case.make()
    sc.convert(model, spec)
    model.train()  # before the optimizer, which cannot step views
    new = {n for n, _ in model.named_parameters() if dense_name(model, n) is None}
    named = {n for n, p in model.named_parameters() if p.requires_grad}
    every = set(dict(model.named_parameters()))
    routers = {n for n in every if ".router." in n}
    stage = spec.stages[0]
    assert named == set(set_trainable(model, stage.trains))
    if isinstance(stage, Fit):
        assert named == routers, "fitted, not trained: see test_fitting.py"
        return
    if "model" in stage.trains:
        assert named == every - routers
        new -= routers
    else:
        assert named == (every if case.trains_base else new)
    begin_stage(model, stage)

    before, start = snapshot(model), quiet_loss(model, inputs)
    fit(model, spec, inputs, steps=2)
    grads = gradients(model)
    for name in named:
        assert name in grads and grads[name].isfinite().all(), name
    # `down` behind a zero `up` has no gradient in the first step, and has one in the second. The
    # router of the released variant has no balance loss to learn from while its experts are equal;
    # and experts for visual tokens see none here.
    for name in new:
        idle = ".router." in name and recipe == "camelidae_released"
        if not idle and recipe != "smola_modalities":
            assert grads[name].abs().max() > 0, name
    after = model.state_dict()
    for name, tensor in before.items():
        if name not in named and name in dict(model.named_parameters()):
            assert torch.equal(after[name], tensor), f"{name} is frozen and moved"
    assert any(not torch.equal(after[n], before[n]) for n in named if n in before)

    fit(model, spec, inputs, steps=10, rate=case.rate)
    assert quiet_loss(model, inputs) < start - 0.02


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
@pytest.mark.parametrize("recipe", [*METHODS.args[1], "lte", "moefication"])
def test_same_seed_gives_the_same_bits(family, recipe):
    runs = []
    for seed in (0, 0, 1):
        model = converted(family, recipe, moved=False, seed=seed)
        history = fit(model, RECIPES[recipe].make(), batch(family, labels=True), steps=3)
        runs.append((history, snapshot(model)))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
    made = runs[0][1].keys() - dense(family).state_dict().keys()
    drawn = recipe != "moefication"  # its routers start from the weights
    assert not drawn or not same(runs[0][1], runs[2][1]), f"the seed does nothing to {made}"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "t5"])
@pytest.mark.parametrize(
    "recipe",
    [
        *METHODS.args[1],
        "attentive_samples",
        "mpoe",
        "nexus",
        "lte",
        "d2dmoe",
        "gmoefication_sparse",
    ],
)
def test_activation_checkpointing_changes_nothing(family, recipe):
    """Losses, auxiliary losses, gradients and routing are the same bits with dropout on."""
    spec, inputs = ALL[recipe].make(), batch(family, labels=True)
    results = []
    for on in (False, True):
        model = converted(family, recipe).train()
        model.requires_grad_(True)
        if recipe in RECIPES:
            begin_stage(model, spec.stages[0])
        if on:
            kwargs = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            assert model.is_gradient_checkpointing
        torch.manual_seed(0)
        with sc.trace(model, inputs=True) as routing:
            loss = model(**inputs).loss
            auxiliary, _ = auxiliary_loss(routing, spec.stages[0].losses or {"switch": 0.01})
            count = len(routing)
            (loss + auxiliary).backward()
            assert len(routing) == count, "recomputation must overwrite, not append"
        results.append((loss, auxiliary, gradients(model), dict(routing.items())))
    (loss, auxiliary, grads, routing), (loss2, auxiliary2, grads2, routing2) = results
    assert torch.equal(loss, loss2) and torch.equal(auxiliary, auxiliary2)
    assert_close(grads, grads2)
    if recipe not in ("d2dmoe", "gmoefication_sparse"):  # whose scores have no gradient
        assert any(".router." in n and g.abs().max() > 0 for n, g in grads2.items())
    assert all(torch.equal(routing[n].indices_TK, routing2[n].indices_TK) for n in routing)


# ---------------------------------------------------------------------------------------- inference


@kinds
@states
def test_evaluation_is_deterministic_with_dropout_configured(family, recipe):
    model, inputs = converted(family, recipe), batch(family)
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    model.train()
    torch.manual_seed(0)
    first = logits(model, inputs)
    assert not ALL[recipe].dropout or not torch.equal(first, logits(model, inputs)), (
        "dropout is configured and does nothing in training"
    )
    assert torch.equal(logits(model.eval(), inputs), logits(model, inputs))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@METHODS_RUNNING
def test_padding_changes_nothing(family, recipe, side):
    """Neither the logits of real tokens nor the masked losses."""
    model, ids = converted(family, recipe), batch(family)["input_ids"]
    spec = ALL[recipe].make()
    # Those of activations read what training records: see test_split.py.
    losses = {n: c for n, c in spec.stages[0].losses.items() if not n.startswith(("relu", "gelu"))}
    count, length = ids.shape
    pads = torch.full((count, 5), 0)
    padded = torch.cat([pads, ids] if side == "left" else [ids, pads], dim=1)
    real = torch.zeros_like(padded, dtype=torch.bool)
    real[:, 5:] = True
    real = real if side == "left" else real.flip(1)
    positions = torch.arange(length).expand(count, -1)
    zeros = torch.zeros_like(pads)
    shifted = torch.cat([zeros, positions] if side == "left" else [positions, zeros], dim=1)
    runs = []
    for inputs, mask in (
        ({"input_ids": ids, "position_ids": positions}, None),
        ({"input_ids": padded, "position_ids": shifted, "attention_mask": real.long()}, real),
    ):
        with sc.trace(model, inputs=True) as routing, torch.no_grad():
            output = model(**inputs).logits
            coefficients = {**losses, "switch": 1.0, "z": 1.0}
            _, parts = auxiliary_loss(routing, coefficients, lambda _, mask=mask: mask)
        load = {n: r.load_E(mask) for n, r in routing.items()}
        runs.append((output[real] if mask is not None else output.flatten(0, 1), parts, load))
    (plain, parts, load), (with_pads, parts2, load2) = runs
    assert (plain - with_pads).abs().max() <= 2e-5
    assert len(parts) >= 2
    for name in parts:
        assert abs(parts[name] - parts2[name]) <= 1e-5, name
    assert all((load[n] - load2[n]).abs().max() <= 1e-6 for n in load)


@kinds
@states
def test_bf16_is_finite_forward_and_backward(family, recipe):
    model, inputs = dense(family).to(torch.bfloat16), batch(family, labels=True)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    sc.convert(model, ALL[recipe].make())
    randomize_new(model)
    ALL[recipe].ready(model)
    model.requires_grad_(True)  # the first stage of some is fitted and has no gradient
    with sc.trace(model, inputs=True) as routing:
        output = model(**inputs)
        output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(model).values())
    for layer in routing.values():
        assert layer.logits_TE.dtype == layer.weights_TK.dtype == torch.float32


@pytest.mark.parametrize("family", [name for name, f in FAMILIES.items() if f.decodes])
@METHODS_RUNNING
def test_generation_with_cache_equals_without(family, recipe):
    model, ids = converted(family, recipe), batch(family, length=6)["input_ids"]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(ids, use_cache=True, **settings)
    assert with_cache.shape[1] >= 8
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **settings))


# ---------------------------------------------------------------------------------------- structure


@kinds
@recipes
def test_the_state_holds_no_surprise_names(family, recipe):
    original = dense(family)
    known = set(original.state_dict())
    model = converted(family, recipe, moved=False)
    leaves = {"experts.lora_A", "experts.lora_B", "experts.down", "experts.up"}
    leaves |= {"experts.gate_up", "experts.up_bias", "experts.down_bias", "experts.gate_up_bias"}
    leaves |= {"router.scorer.weight", "experts.vectors"}
    leaves |= {"router.scorer.query", "router.scorer.key"}
    leaves |= {f"experts.{p}.lora_{x}" for p in ("gate", "up", "down") for x in "AB"}
    leaves |= {f"experts.{x}" for x in ("first", "first_bias", "neurons", "mean")}
    cores = ("1", "2", "central", "4", "5", "bias")
    leaves |= {f"experts.{p}_{x}" for p in ("gate", "up", "down") for x in cores}
    of_attention = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    leaves |= {f"experts.attention.{p}.{x}" for p in of_attention for x in ("weight", "bias")}
    scorers = ("first", "second", "rows", "bias", "centers", "domains")
    leaves |= {"router.gain", "router._extra_state", "experts._extra_state"}
    leaves |= {f"router.scorer.{x}" for x in scorers}
    leaves |= {"router.balance.values_E", "router.balance.value", "router.coefficient.value"}
    leaves |= {"experts.mix", "experts.constants", "router.scorer.previous"}
    leaves |= {f"experts.networks.{x}" for x in ("gate_up", "up", "down")}
    leaves |= {f"experts.networks.{x}_bias" for x in ("gate_up", "up", "down")}
    shared = set()
    for name in model.state_dict():
        origin = dense_name(model, name)
        if origin is None:
            assert ".".join(name.split(".")[1:]) and any(name.endswith(f".{x}") for x in leaves)
        else:
            shared.add(origin)
    assert shared <= known
    assert shared == known or any(e.place == "replace" for e in model.sparsecraft.recipe.edits)
    attention = [n for n in model.state_dict() if ".q_proj.experts." in n]
    assert all("lora" in n for n in attention)


@kinds
@METHODS
def test_permuting_experts_with_their_router_rows_changes_nothing(family, recipe):
    model, inputs = converted(family, recipe), batch(family)
    before = logits(model, inputs)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, MoELayer) and layer.router is not None:
                for parameter in [*layer.experts.parameters(), layer.router.scorer.weight]:
                    parameter.data = parameter.data[order]
    assert (logits(model, inputs) - before).abs().max() <= 1e-5
    with torch.no_grad():  # and a permutation of the experts alone does
        for layer in model.modules():
            if isinstance(layer, MoELayer) and layer.router is not None:
                layer.router.scorer.weight.data = layer.router.scorer.weight.data[order]
    assert (logits(model, inputs) - before).abs().max() > 1e-4


@kinds
@pytest.mark.parametrize("recipe", ["camelidae_no_lora", "upcycling"])
def test_soft_equals_top_k_of_all_experts(family, recipe):
    outputs = []
    for changes in ({"top_k": 4}, {"select": "soft"}):
        model = dense(family)
        sc.convert(model, sc.override(RECIPES[recipe].make(), changes))
        randomize_new(model)
        outputs.append(logits(model, batch(family)))
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5


@kinds
def test_k_experts_are_active(family):
    """The reported active parameters are those that one token can meet."""
    case = RECIPES["camelidae_no_lora"]
    model = dense(family)
    size = sum(p.numel() for p in model.parameters())
    report = sc.convert(model, case.make())
    bank = 2 * D * 16
    assert report.cost.active == size + FAMILIES[family].ffns * (K * bank + 4 * D)
    assert report.cost.trainable == report.cost.new == report.cost.total - size


@kinds
def test_experts_that_are_mixed_first_are_all_active(family):
    """Their ranks are all computed, whatever the router's top-k."""
    model = dense(family)
    report = sc.convert(model, RECIPES["molora_raw"].make())
    assert report.cost.active == report.cost.total
    report = sc.convert(sc.revert(model), RECIPES["mixlora"].make())
    inside = [m for m in model.modules() if isinstance(m, MoELayer) and m.place == "inside"]
    again = (K - 1) * sum(p.numel() for layer in inside for p in layer.experts.parameters())
    dense_flops = cost.count(dense(family)).flops_per_token
    assert report.cost.flops_per_token == dense_flops + 2 * (report.cost.new + again)


@kinds
def test_a_router_that_decides_for_every_head_is_counted_for_each(family, monkeypatch):
    """One matrix (E, head width), as many products as the keys and values have heads."""
    model = dense(family)
    counted = sc.convert(model, RECIPES["mov_released"].make()).cost.flops_per_token
    monkeypatch.setattr(Router, "repeated", lambda self, width: 0)
    heads = FAMILIES[family].kv // FAMILIES[family].head
    again = 2 * FAMILIES[family].attentions * (heads - 1) * E * FAMILIES[family].head
    assert counted == sc.count(model).flops_per_token + 2 * again


@pytest.mark.parametrize(("rank", "rate"), [(1, 1e-3), (4, 5e-4), (16, 2.5e-4)])
def test_a_tuned_lora_keeps_its_scale_and_steps_as_measured(rank, rate):
    recipe = sc.recipes.lora(rank, variant="tuned")
    assert recipe.edits[0].experts.alpha == 4 * rank
    assert recipe.stages[0].learning_rate == pytest.approx(rate)
    assert sc.recipes.lora(rank).edits[0].experts.alpha == 16
