"""Fitting routers: what is captured, what is regressed, what stays as it was; stages of `train`.

Shapes: T tokens, D width, E experts, F neurons.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

import sparsecraft as sc
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.split_report import summary
from sparsecraft.moe.init.balanced import balanced_kmeans
from sparsecraft.moe.routers.part_scorers import targets
from sparsecraft.recipe.stages import Fit
from sparsecraft.surgery.budget import run, set_budget, split_layers
from sparsecraft.training import train as training
from sparsecraft.training.fit import fit as fitting
from sparsecraft.training.fit import regression
from sparsecraft.training.fit.capture import capture
from sparsecraft.training.fit.regression import _scaled, degree_of
from sparsecraft.training.progress import ProgressBar
from sparsecraft.training.staging import begin_stage
from tests import tiny
from tests.cases import RECIPES, SPLITS, VOCAB, D, F, batch, dense, logits, t5
from tests.reference import splitting

SPEC = Fit(tokens=200, epochs=2, batch_tokens=32, learning_rate=0.01)
masks_of = training._masks_of


def batches(family: str = "llama", count: int = 8, length: int = 12):
    """Rows of random ids, the second of each three padded."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        ids = torch.randint(3, VOCAB, (3, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, length // 2 :] = 0
        yield {"input_ids": ids, "attention_mask": mask}


def converted(family: str = "llama", recipe: str = "gmoefication", **changes) -> nn.Module:
    model = dense(family)
    sc.convert(model, sc.override(RECIPES[recipe].make(), changes), certify=False)
    return model


def fit(model: nn.Module, spec: Fit = SPEC, data=None, **kwargs):
    return fitting.fit(model, data or batches(), spec, masks=masks_of, **kwargs)


def captured(model: nn.Module, tokens: int, data, folder, masks=masks_of):
    return capture(model, split_layers(model), data, tokens, masks, folder)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ------------------------------------------------------------------------------------------ capture


@pytest.mark.parametrize("tokens", [7, 30, 100, 239])
def test_capture_keeps_what_the_networks_read_in_order_and_without_padding(tmp_path, tokens):
    model = converted()
    run(model, "sparse")
    found = captured(model, tokens, batches(), tmp_path)
    seen = {name: [] for name in found}
    original = dense("llama")
    for name in found:
        original.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0])
        )
    for inputs in batches():
        with torch.no_grad():
            original(**inputs)
        real = inputs["attention_mask"].bool()
        for values in seen.values():
            values[-1] = values[-1][real]
    for name, values in seen.items():
        wanted = torch.cat(values)
        assert len(found[name]) == tokens < len(wanted) == 240
        assert (found[name] - wanted[:tokens]).abs().max() <= 1e-5
    assert {layer.router.runs for layer in split_layers(model).values()} == {"sparse"}


def test_capture_stops_when_it_has_enough_and_takes_less_where_there_is_less(tmp_path):
    model = converted()

    def endless():
        yield from batches(count=2)
        raise AssertionError("read on")

    assert {len(x) for x in captured(model, 60, endless(), tmp_path).values()} == {60}
    few = captured(model, 1000, batches(count=2), tmp_path)
    assert {len(x) for x in few.values()} == {60}


def test_capture_leaves_no_hook_and_no_mode_behind(tmp_path):
    model = converted().train()

    def broken():
        yield from batches(count=1)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        captured(model, 1000, broken(), tmp_path)
    assert model.training and all(m.training for m in model.modules())
    assert not any(layer._forward_pre_hooks for layer in split_layers(model).values())
    assert torch.is_grad_enabled()


def test_inputs_that_memory_does_not_hold_go_to_a_file(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="sparsecraft")
    model, other = converted(), converted()
    memory = captured(model, 100, batches(), tmp_path)
    wanted = fit(model)
    with monkeypatch.context() as patch:
        full = SimpleNamespace(available=0, total=0)
        patch.setattr("sparsecraft.training.fit.capture.psutil.virtual_memory", lambda: full)
        disk = captured(other, 100, batches(), tmp_path)
        assert len(list(tmp_path.iterdir())) == len(disk)
        found = fit(other)
    assert "on disk for the while" in caplog.text
    for name, values in memory.items():
        assert torch.equal(values, disk[name])
    assert found == wanted
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in other.state_dict().items())


def test_data_without_a_token_is_refused(tmp_path):
    model = converted()
    padding = [{"input_ids": torch.ones(2, 5, dtype=torch.long),
                "attention_mask": torch.zeros(2, 5, dtype=torch.long)}]  # fmt: skip
    before = state_of(model)
    for data in ([], padding):
        with pytest.raises(DataError, match=r"gave no token to 'model\.layers\.0\.mlp'"):
            fit(model, data=iter(data))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_too_few_tokens_are_refused_before_anything_is_changed():
    model = converted()
    before = state_of(model)
    with pytest.raises(DataError, match="1 tokens are too few"):
        fit(model, dataclasses.replace(SPEC, tokens=1))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_an_encoder_and_a_decoder_leave_out_padding_of_their_own(tmp_path):
    model = converted("t5")
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = ids[:, :6].clone()
    labels[0, 2:] = -100
    data = [{"input_ids": ids, "attention_mask": mask, "labels": labels}]
    found = captured(model, 100, data, tmp_path)
    seen = {}
    for name in found:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0])
        )
    with torch.no_grad():
        model(**data[0])
    for name, values in found.items():
        real = mask.bool() if name.startswith("encoder") else labels != -100
        assert torch.equal(values, seen[name][real]), name
        assert len(values) == (13 if name.startswith("encoder") else 8)
    report = fit(model, data=iter(data), spec=dataclasses.replace(SPEC, holdout=0.3))
    assert len(report["layers"]) == 4 and report["tokens"] in (8, 13)


@pytest.mark.parametrize("recipe", ["gmoefication", "d2dmoe", "cmoe"])
def test_images_are_captured_whole(recipe):
    model = converted("vit", recipe)
    pixels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    spec = dataclasses.replace(SPEC, loss=model.sparsecraft.recipe.stages[-1].loss)
    report = fit(model, spec, [{"pixel_values": pixels[:3]}, {"pixel_values": pixels[3:]}])
    assert report["tokens"] == 6 * 17, "16 patches and a class token"
    assert model(pixel_values=pixels).logits.isfinite().all()


# --------------------------------------------------------------------------------------- regression


def by_hand(scorer: nn.Module, x_TD, y_TE, loss: str, spec: Fit, seed: int):
    """Adam on one router, an epoch and a batch at a time: the best epoch's weights, its loss."""
    measure = {"bce": functional.binary_cross_entropy_with_logits, "mse": functional.mse_loss}[loss]
    optimizer = torch.optim.Adam(scorer.parameters(), lr=spec.learning_rate)
    held = len(x_TD) - max(1, round(len(x_TD) * spec.holdout))

    def held_out() -> float:
        with torch.no_grad():
            return measure(scorer(x_TD[held:]), y_TE[held:]).item()

    torch.manual_seed(seed)
    first = best = held_out()
    kept = copy.deepcopy(scorer.state_dict())
    for _ in range(spec.epochs):
        order = torch.randperm(held)
        for start in range(0, held, spec.batch_tokens):
            index = order[start : start + spec.batch_tokens]
            optimizer.zero_grad()
            measure(scorer(x_TD[index]), y_TE[index]).backward()
            optimizer.step()
        if (found := held_out()) < best:
            best, kept = found, copy.deepcopy(scorer.state_dict())
    return kept, first, best


@pytest.mark.parametrize(
    ("family", "recipe", "loss"),
    [("llama", "gmoefication", "bce"), ("gpt2", "d2dmoe", "mse"), ("opt", "moefication", "bce")],
)
@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_layers_fitted_together_equal_each_fitted_alone(tmp_path, family, recipe, loss, rate):
    model = converted(family, recipe, partition="contiguous")
    spec = dataclasses.replace(SPEC, loss=loss, epochs=4, learning_rate=rate)
    before = copy.deepcopy(model)
    report = fit(model, spec, seed=3)
    inputs = captured(before, spec.tokens, batches(), tmp_path)
    for name, layer in split_layers(model).items():
        scorer = split_layers(before)[name].router.scorer
        y_TE = targets(layer.experts, inputs[name], layer.router.spec.target)
        if loss == "bce":
            y_TE = y_TE / inputs[name].norm(dim=-1, keepdim=True) ** layer.experts.parts
            y_TE = y_TE / y_TE.max()
        else:
            y_TE = y_TE / y_TE.mean()
        scorer.requires_grad_(True)  # frozen in the first stage of some
        kept, first, best = by_hand(scorer, inputs[name], y_TE, loss, spec, seed=3)
        assert report["layers"][name]["loss_before"] == pytest.approx(first, rel=1e-5)
        assert report["layers"][name]["loss"] == pytest.approx(best, rel=1e-4)
        for key, value in layer.router.scorer.state_dict().items():
            tolerance = 1e-5 if rate < 1 else 1e-3
            assert (value - kept[key]).abs().max() <= tolerance * max(1, kept[key].abs().max()), key
    assert report["tokens"] == 200 and report["steps"] == 4 * 6


def test_the_best_epoch_is_kept_even_if_it_is_the_start():
    model = converted("gpt2", "d2dmoe")
    before = state_of(model)
    found = fit(model, dataclasses.replace(SPEC, learning_rate=1e4))
    for name, layer in found["layers"].items():
        assert layer["loss"] == layer["loss_before"]
        for key in ("first", "second"):
            key = f"{name}.router.scorer.{key}"
            assert torch.equal(model.state_dict()[key], before[key])


@pytest.mark.parametrize("loss", ["bce", "mse"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
def test_targets_are_scaled_into_a_range_and_keep_their_ranks(family, loss):
    model = converted(family, "moefication")
    bank = next(iter(split_layers(model).values())).experts
    x_TD = 5 * torch.randn(30, D)
    wanted = targets(bank, x_TD, "mass")
    scaled = _scaled(x_TD, wanted, Fit(loss=loss))
    assert (scaled >= 0).all() and scaled.isfinite().all()
    assert torch.equal(scaled.argsort(dim=-1, stable=True), wanted.argsort(dim=-1, stable=True))
    if loss == "mse":
        assert scaled.mean().item() == pytest.approx(1.0, rel=1e-5)
        return
    assert scaled.max().item() == 1.0
    if family == "t5":  # ReLU without biases: the targets of MoEfication, which reads x / |x|
        unit = functional.normalize(x_TD, dim=-1)
        theirs = targets(bank, unit, "mass")
        assert torch.allclose(scaled, theirs / theirs.max(), atol=1e-5)


def test_the_captured_mass_counts_no_shared_expert():
    model = converted("llama", "gmoefication", **{"router.shared": 2})
    layer = next(iter(split_layers(model).values()))
    x_TD = torch.randn(20, D, generator=torch.Generator().manual_seed(2))
    wanted_TE = targets(layer.experts, x_TD, "deviation")
    changed_TE = wanted_TE.clone()
    changed_TE[:, :2] *= 1000  # what shared experts matter
    found, again = (fitting.captured_masses(layer, x_TD, y) for y in (wanted_TE, changed_TE))
    for name in ("router", "oracle", "similarity"):
        assert found[f"mass_{name}"] == again[f"mass_{name}"] > 0
    kept = [splitting.largest(row.tolist(), 1) for row in wanted_TE[:, 2:]]
    assert found["mass_oracle"] == pytest.approx(
        splitting.captured(wanted_TE[:, 2:].tolist(), kept), rel=1e-4
    )


@pytest.mark.parametrize("target", ["mass", "squared_deviation"])
@pytest.mark.parametrize("family", ["t5", "t5_gated"])
def test_scaled_targets_are_of_directions_alone(family, target):
    """A token that is ten times as long has the same targets, gated or not."""
    model = converted(family, "moefication", **{"experts.compensate": True, "target": target})
    layer = next(iter(split_layers(model).values()))
    layer.experts.activation = nn.ReLU()
    x_TD = torch.randn(30, D, generator=torch.Generator().manual_seed(4))
    sizes_T1 = torch.logspace(-1, 1, 30)[:, None]
    found = [
        _scaled(x, targets(layer.experts, x, target), Fit(loss="bce"), degree_of(layer))
        for x in (x_TD, sizes_T1 * x_TD)
    ]
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_targets_of_routed_experts_are_scaled_among_themselves(loss, monkeypatch):
    model = converted("llama", "gmoefication", **{"router.shared": 2})
    aims = []
    monkeypatch.setattr(
        regression,
        "_descend",
        lambda names, modules, loss, inputs, found, spec: aims.extend(found) or [{}] * len(names),
    )
    fit(model, dataclasses.replace(SPEC, loss=loss))
    assert len(aims) == len(split_layers(model))
    for y_TR in aims:
        assert y_TR.shape[1] == RECIPES["gmoefication"].make().edits[0].experts.num_experts - 2
        assert (y_TR.max() if loss == "bce" else y_TR.mean()).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(("steps", "same"), [(1, True), (2, False)])
def test_the_sparsity_of_imitations_rises_from_zero(steps, same, tmp_path):
    """The first step of a run has no Hoyer loss, the second half of it where there are two."""
    found = []
    for sparsity in (1e-3, 1e6):
        model = dense("llama")
        recipe = sc.recipes.d2dmoe(4, attention_experts=4)
        sc.convert(model, recipe, certify=False)
        spec = dataclasses.replace(
            recipe.stages[0], sparsity=sparsity, tokens=40 * steps, epochs=1, batch_tokens=36,
            holdout=0.1,
        )  # fmt: skip
        fit(model, spec)
        layers = [x for x in split_layers(model).values() if x.is_imitation]
        found.append(torch.cat([x.experts.first.flatten() for x in layers]))
    assert torch.equal(*found) is same


def test_kmeans_of_a_gated_network_reads_the_gate():
    """D2DMoE: "because they are actually sparse". Gate rows and up rows form other clusters."""
    model = dense("llama")
    generator = torch.Generator().manual_seed(1)
    centers = torch.eye(D)[:4]
    by_gate = torch.randperm(F, generator=generator) % 4
    by_up = torch.randperm(F, generator=generator) % 4
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.copy_(centers[by_gate])
            layer.mlp.up_proj.weight.copy_(centers[by_up])
    sc.convert(model, sc.recipes.moefication(4, relu=False), certify=False)
    fit(model, dataclasses.replace(SPEC, loss="none"))
    for layer in split_layers(model).values():
        purity = {"gate": [], "up": []}
        for neurons in layer.experts.neurons:
            for name, labels in (("gate", by_gate), ("up", by_up)):
                purity[name].append(labels[neurons].bincount().max().item() / len(neurons))
        assert sum(purity["gate"]) >= 3 > 2.5 > sum(purity["up"])


def test_the_report_is_of_tokens_that_were_held_out(tmp_path, monkeypatch):
    model = converted()
    seen = []
    real = fitting.captured_masses
    monkeypatch.setattr(
        fitting, "captured_masses", lambda layer, x, y: seen.append((x, y)) or real(layer, x, y)
    )
    spec = dataclasses.replace(SPEC, holdout=0.25)
    fit(model, spec)
    inputs = captured(model, 200, batches(), tmp_path)
    for (x_TD, y_TE), wanted in zip(seen, inputs.values(), strict=True):
        assert torch.allclose(x_TD, wanted[150:], atol=1e-5) and len(x_TD) == len(y_TE) == 50


def test_a_router_without_weights_cannot_be_fitted():
    model = converted("opt", "moefication_random")
    with pytest.raises(SparsecraftError, match=r"similarity scorer.*set loss='none'"):
        fit(model)
    report = fit(model, dataclasses.replace(SPEC, loss="none"))
    assert report["steps"] == 0
    layer = next(iter(report["layers"].values()))
    assert layer["mass_router"] == layer["mass_similarity"]


def test_a_model_without_split_networks_cannot_be_fitted():
    model = dense("llama")
    sc.convert(model, RECIPES["camelidae"].make(), certify=False)
    with pytest.raises(SparsecraftError, match="no split networks"):
        fit(model)


# -------------------------------------------------------------------------------- what is planted


def planted(seed: int = 0) -> transformers.OPTForCausalLM:
    """Twelve groups of four neurons, each of one direction and one size.

    A group's activation is its size times a product with its direction: the directions alone tell
    a part of it, the sizes the rest.
    """
    model = dense("opt")
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.decoder.layers:
        directions = functional.normalize(torch.randn(12, D, generator=generator), dim=-1)
        sizes = torch.logspace(-0.3, 0.3, 12)[torch.randperm(12, generator=generator)]
        noise = 0.02 * torch.randn(F, D, generator=generator)
        rows = directions.repeat_interleave(4, 0) + noise
        with torch.no_grad():
            layer.fc1.weight.copy_(sizes.repeat_interleave(4)[:, None] * rows)
            layer.fc1.bias.zero_()
    return model


@pytest.fixture(scope="module")
def fitted():
    model = planted()
    recipe = sc.override(sc.recipes.moefication(12, 2), {"partition": "contiguous"})
    sc.convert(model, recipe, certify=False)
    spec = Fit(loss="bce", tokens=2000, epochs=30, batch_tokens=128, learning_rate=0.01)
    return model, fit(model, spec, batches(count=70))


def test_a_fitted_router_captures_more_than_similarity_and_similarity_than_chance(fitted):
    _, report = fitted
    for layer in report["layers"].values():
        oracle, router, similarity, chance = (
            layer[f"mass_{n}"] for n in ("oracle", "router", "similarity", "chance")
        )
        assert chance == pytest.approx(2 / 12, abs=0.04)
        assert chance + 0.3 < similarity < router - 0.01
        assert router <= oracle < 1
        assert layer["loss"] < layer["loss_before"] - 0.01
    assert "oracle" in summary(report)


def test_the_reported_masses_are_the_papers(fitted, tmp_path):
    model, report = fitted
    found = captured(model, 2000, batches(count=70), tmp_path)
    for name, layer in split_layers(model).items():
        bank = layer.experts
        x_TD = found[name][1800:]
        wanted_TE = targets(bank, x_TD, "mass")
        for source, scores_TE in (("oracle", wanted_TE), ("router", layer.router.scorer(x_TD))):
            kept = [splitting.largest(row.tolist(), 2) for row in scores_TE]
            theirs = splitting.captured(wanted_TE.tolist(), kept)
            assert report["layers"][name][f"mass_{source}"] == pytest.approx(theirs, rel=1e-4)


def test_the_more_experts_run_the_nearer_is_the_output_to_the_dense_one(fitted):
    model, inputs = copy.deepcopy(fitted[0]), next(iter(batches(count=1)))
    start, errors = logits(planted(), inputs), []
    for share in (1 / 12, 1 / 4, 1 / 2, 3 / 4, 1.0):
        set_budget(model, share)
        errors.append((logits(model, inputs) - start).norm().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] <= 1e-4 < 0.1 < errors[0]


# ------------------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize("recipe", SPLITS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_the_dense_weights_are_untouched(family, recipe):
    if recipe == "lte":
        pytest.skip("LTE's routers are trained, not fitted")
    model = converted(family, recipe)
    start = logits(model, batch(family))
    before, banks = state_of(model), {}
    for name, layer in split_layers(model).items():
        banks[name] = layer.experts.dense()
    requires = {n: p.requires_grad for n, p in model.named_parameters()}
    data = [batch(family, labels=True)] * 6
    spec = dataclasses.replace(
        next(s for s in model.sparsecraft.recipe.stages if isinstance(s, Fit)), tokens=200, epochs=1
    )
    fit(model, spec, data)
    for name, tensor in model.state_dict().items():
        if ".router." not in name and not any(
            name.startswith(f"{layer}.experts.") for layer in banks
        ):
            assert torch.equal(tensor, before[name]), name
    for name, layer in split_layers(model).items():
        for key, tensor in layer.experts.dense().items():
            assert (tensor is None) == (banks[name][key] is None)
            assert tensor is None or torch.equal(tensor, banks[name][key]), (name, key)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == requires
    run(model, "every")
    assert (logits(model, batch(family)) - start).abs().max() <= 1e-5


@pytest.mark.parametrize("recipe", ["moefication", "d2dmoe", "cmoe", "moefication_random"])
def test_the_seed_decides_and_the_global_state_is_left_alone(recipe):
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(42)
        model = converted("opt", recipe)
        drawn = torch.get_rng_state()
        spec = dataclasses.replace(model.sparsecraft.recipe.stages[-1], tokens=150, epochs=2)
        report = fit(model, spec, seed=seed)
        assert torch.equal(torch.get_rng_state(), drawn)
        runs.append((report, state_of(model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(t, runs[1][1][n]) for n, t in runs[0][1].items())
    if recipe != "cmoe":  # which draws nothing but the chance that it is compared with
        assert any(not torch.equal(t, runs[2][1][n]) for n, t in runs[0][1].items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_means_are_those_of_the_captured_tokens(tmp_path, family):
    model = converted(family, "gmoefication")
    fit(model)
    inputs = captured(model, 200, batches(), tmp_path)
    for name, layer in split_layers(model).items():
        tensors = layer.experts.dense()
        first = functional.linear(inputs[name], tensors["first"], tensors["first_bias"])
        hidden = layer.experts.activation(first[:, :F])
        hidden = hidden * first[:, F:] if first.shape[1] > F else hidden
        wanted = hidden.double().mean(0)[layer.experts.neurons]
        assert (layer.experts.mean - wanted).abs().max() <= 1e-5
        assert layer.experts.mean.abs().max() > 1e-2


def test_the_partition_is_made_again_from_the_weights_as_they_are():
    model = converted("opt", "moefication")
    bank = next(iter(split_layers(model).values())).experts
    with torch.no_grad():
        bank.first.copy_(torch.randn(bank.first.shape, generator=torch.Generator().manual_seed(8)))
    before, tensors = bank.neurons.clone(), bank.dense()
    fit(model, dataclasses.replace(SPEC, loss="bce"), seed=4)
    rows = tensors["first"].float()
    wanted = balanced_kmeans(rows, 4, seed=4, start=before)
    assert torch.equal(bank.neurons, wanted)
    assert not torch.equal(bank.neurons, before)
    center = splitting.centers(rows, bank.neurons.tolist())
    model = converted("opt", "moefication", **{"router.scorer": "similarity"})
    fit(model, dataclasses.replace(SPEC, loss="none"))
    layer = next(iter(split_layers(model).values()))
    center = splitting.centers(layer.experts.dense()["first"], layer.experts.neurons.tolist())
    assert torch.allclose(layer.router.scorer.centers, center, atol=1e-6), "and its router with it"


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_cmoe_shares_the_neurons_that_are_active_most_often(tmp_path, family):
    model = converted(family, "cmoe")
    fit(model, dataclasses.replace(SPEC, loss="none"))
    inputs = captured(model, 200, batches(), tmp_path)
    for name, layer in split_layers(model).items():
        bank = layer.experts
        (hidden_TF,) = fitting.activations(bank, inputs[name])
        marks_TF = torch.zeros_like(hidden_TF)
        for t, row in enumerate(hidden_TF.abs()):
            marks_TF[t, row.topk(10).indices] = 1
        rates = marks_TF.sum(0)
        assert rates[bank.neurons[0]].min() >= rates[bank.neurons[1:].flatten()].max()
        partition = bank.neurons.tolist()
        chosen = splitting.representatives(marks_TF, partition)[1:]
        places = [partition[e + 1].index(j) for e, j in enumerate(chosen)]
        rows = bank.first.unflatten(1, (-1, F // 4))
        for e, i in enumerate(places):
            assert torch.equal(layer.router.scorer.rows[e], rows[e + 1, :, i])


@pytest.mark.parametrize("recipe", ["moefication", "gmoefication"])
def test_a_model_in_training_mode_is_fitted_as_one_in_evaluation(recipe):
    """As `train` leaves it after its first stage."""
    found = []
    for training_mode in (False, True):
        model = converted("t5", recipe).train(training_mode)
        fit(model, dataclasses.replace(SPEC, loss="bce"), [batch("t5", labels=True)] * 6)
        assert model.training == training_mode
        found.append(state_of(model))
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())


@pytest.mark.parametrize("recipe", ["gmoefication", "d2dmoe", "cmoe"])
def test_bf16_models_are_fitted(recipe):
    model = dense("llama").bfloat16()
    sc.convert(model, RECIPES[recipe].make(), certify=False)
    loss = next(s.loss for s in model.sparsecraft.recipe.stages if isinstance(s, Fit))
    report = fit(model, dataclasses.replace(SPEC, loss=loss))
    for layer in report["layers"].values():
        assert layer["mass_oracle"] >= layer["mass_router"] > 0
    run(model, "sparse")
    output = logits(model, batch("llama"))
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


# ------------------------------------------------------------------------------------------- stages

FAST = {"steps": 6, "batch_size": 4, "micro_batch": 2, "max_length": 64, "learning_rate": 1e-2,
        "fit_tokens": 150, "log_every": 2, "progress": False}  # fmt: skip


@pytest.fixture
def rows(tmp_path) -> str:
    return tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())


def llama(recipe: sc.Recipe) -> nn.Module:
    model = tiny.llama()
    sc.convert(model, recipe, certify=False)
    return model


def train(model, rows, out, **options):
    return sc.train(model, rows, out, tokenizer=tiny.tokenizer(), **{**FAST, **options})


def d2dmoe(**changes) -> sc.Recipe:
    return sc.recipes.d2dmoe(8, 0.3, router_dim=8, **changes)


def history_of(model) -> dict[str, dict]:
    return {entry["stage"]: entry for entry in model.sparsecraft.report["training"]}


def test_two_stages_sparsify_and_then_fit(tmp_path, rows):
    model = llama(d2dmoe(sparsity_coef=0.01))
    before = state_of(model)
    report = train(model, rows, tmp_path / "out")
    history = history_of(model)
    losses = [entry["loss"] for entry in history["sparsify"]["log"] if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert "relu_hoyer_loss" in history["sparsify"]["log"][0]
    assert history["router"]["fit"]["tokens"] == 150 and report.out == tmp_path / "out"
    assert model.sparsecraft.running.stages == ["sparsify", "router"]
    assert model.sparsecraft.running.budget is None
    ids = torch.arange(3, 40)[None]
    for layer in split_layers(model).values():
        assert layer.router.runs == "sparse" and isinstance(layer.experts.activation, nn.ReLU)
    moved = [n for n, t in model.state_dict().items() if n in before and t.dtype.is_floating_point
             and not torch.equal(t, before[n])]  # fmt: skip
    assert any("self_attn" in n for n in moved) and any(".experts.down" in n for n in moved)
    loaded = sc.load(tmp_path / "out")
    assert torch.equal(logits(loaded, {"input_ids": ids}), logits(model, {"input_ids": ids}))
    assert not list(tmp_path.glob("out.training"))
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["stage"] for entry in saved["training"]] == ["sparsify", "router"]


def test_the_stages_apart_equal_the_stages_together(tmp_path, rows):
    whole, apart = llama(d2dmoe()), llama(d2dmoe())
    train(whole, rows, tmp_path / "whole")
    train(apart, rows, tmp_path / "one", stages=("sparsify",))
    assert apart.sparsecraft.running.stages == ["sparsify"]
    assert apart.sparsecraft.running.budget == 1.0
    between = state_of(apart)
    train(apart, rows, tmp_path / "two", stages=("router",))
    wanted = state_of(whole)
    for name, tensor in state_of(apart).items():
        assert torch.equal(tensor, wanted[name]), name
        if ".experts." not in name and ".router." not in name:
            assert torch.equal(tensor, between[name]), name
    second = sc.load(tmp_path / "one")
    train(second, rows, tmp_path / "three", stages=("router",))
    for name, tensor in state_of(second).items():
        # A product rounds by where its tensors lie in memory, on some processors.
        torch.testing.assert_close(tensor, wanted[name], msg=f"from the checkpoint: {name}")


def test_a_stage_that_does_not_exist_is_refused(tmp_path, rows):
    with pytest.raises(SparsecraftError, match=r"no stage 'routers'.*Did you mean 'router'"):
        train(llama(d2dmoe()), rows, tmp_path / "out", stages=("routers",))
    assert not list(tmp_path.glob("out*"))


def test_several_processes_cannot_fit(tmp_path, rows, monkeypatch):
    model = llama(sc.recipes.gmoefication(8))
    before = state_of(model)
    monkeypatch.setattr(training, "processes", lambda: 2)
    with pytest.raises(SparsecraftError, match=r"Stage 'router' fits routers in one process.*2"):
        train(model, rows, tmp_path / "out")
    assert all(torch.equal(t, before[n]) for n, t in state_of(model).items())
    assert not (tmp_path / "out").exists()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("when", ["sparsify", "router"])
def test_a_run_of_two_stages_is_resumed_exactly(tmp_path, rows, monkeypatch, when):
    whole, options = llama(d2dmoe(sparsity_coef=0.01)), {"save_every": 2}
    train(whole, rows, tmp_path / "whole", **options)

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Interrupted

    def broken(*args, **kwargs):
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        if when == "sparsify":
            patch.setattr(ProgressBar, "on_step_end", interrupt)
        else:
            patch.setattr(training, "fit", broken)
        train(llama(d2dmoe(sparsity_coef=0.01)), rows, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    resumed = llama(d2dmoe(sparsity_coef=0.01))
    train(resumed, rows, tmp_path / "out", resume=True, **options)
    wanted = state_of(whole)
    for name, tensor in state_of(resumed).items():
        assert torch.equal(tensor, wanted[name]), name
    assert resumed.sparsecraft.running == whole.sparsecraft.running


def test_lte_trains_softly_and_then_hard(tmp_path, rows):
    model = llama(sc.recipes.lte(8, efficiency=1.0, separability=0.01))
    routers = {n: t for n, t in state_of(model).items() if ".router.scorer." in n}
    train(model, rows, tmp_path / "one", stages=("soft",))
    soft = {n: t for n, t in state_of(model).items() if ".router.scorer." in n}
    assert all(not torch.equal(t, routers[n]) for n, t in soft.items())
    train(model, rows, tmp_path / "two", stages=("hard",))
    hard = {n: t for n, t in state_of(model).items() if ".router.scorer." in n}
    assert all(torch.equal(t, soft[n]) for n, t in hard.items()), "its routers are frozen"
    log = history_of(model)["soft"]["log"]
    efficiency = [entry["lte_efficiency_loss"] for entry in log if "lte_efficiency_loss" in entry]
    assert efficiency[-1] < efficiency[0] < 0.9
    ids = {"input_ids": torch.arange(3, 40)[None]}
    assert torch.equal(logits(sc.load(tmp_path / "two"), ids), logits(model, ids))


def test_cmoe_is_built_without_a_gradient_and_then_tuned(tmp_path, rows):
    model = llama(sc.recipes.cmoe(8, 3, shared=3, variant="finetuned"))
    before = {n: layer.experts.dense() for n, layer in split_layers(model).items()}
    train(model, rows, tmp_path / "out", router_learning_rate=0.05)
    for name, layer in split_layers(model).items():
        for key, tensor in layer.experts.dense().items():
            assert tensor is None or torch.equal(tensor, before[name][key]), "frozen"
        assert layer.router.gain.abs().max() > 1e-3
        assert layer.router.k == 3 and layer.router.runs == "sparse"
    with sc.trace(model) as routing:
        model(torch.arange(3, 40)[None])
    for record in routing.values():
        runs = record.indices_TK < 8
        assert (runs.sum(-1) == 6).all() and runs[:, :3].all()
        assert (record.weights_TK[:, :3] == 1).all()
    assert sc.load(tmp_path / "out").sparsecraft.running.stages == ["build", "tune"]


def test_t5_goes_through_both_stages(tmp_path):
    """Its decoder's padding is that of the labels."""
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(t5(feed_forward_proj="relu"))
    model.resize_token_embeddings(len(tiny.tokenizer()))
    sc.convert(model, sc.recipes.moefication(8, 2), certify=False)
    pairs = [{"prompt": f"say {w}", "completion": w} for w in tiny.WORDS * 4]
    path = tiny.write_rows(tmp_path / "pairs.jsonl", pairs)
    train(model, path, tmp_path / "out", batch_size=8)
    layers = history_of(model)["router"]["fit"]["layers"]
    assert {name.split(".")[0] for name in layers} == {"encoder", "decoder"}
    ids = torch.arange(3, 20)[None]
    loaded = sc.load(tmp_path / "out")
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_on_a_cpu_fewer_tokens_are_captured_and_said(tmp_path, rows, caplog):
    caplog.set_level("INFO", logger="sparsecraft")
    model = llama(sc.recipes.gmoefication(8))
    train(model, rows, tmp_path / "out", fit_tokens=None)
    assert "by default: routers are fitted to 16384 tokens" in caplog.text
    for bad in (0, 2.5, -1):
        with pytest.raises(SparsecraftError, match="fit_tokens"):
            train(model, rows, tmp_path / "other", fit_tokens=bad)


def test_a_stage_again_takes_back_what_was_calibrated(tmp_path, rows):
    model = llama(d2dmoe())
    train(model, rows, tmp_path / "one")
    model.sparsecraft.running.calibration[:] = [(0.2, 0.9), (0.8, 0.1)]
    begin_stage(model, model.sparsecraft.recipe.stages[1])
    train(model, rows, tmp_path / "two", stages=("router",))
    assert model.sparsecraft.running.calibration == []
    assert model.sparsecraft.running.stages == ["sparsify", "router"]


def test_an_interrupted_run_is_not_resumed_with_other_stages(tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())
    model = tiny.llama()
    sc.convert(model, sc.recipes.d2dmoe(8, router_dim=8))
    options = {"tokenizer": tiny.tokenizer(), "steps": 1, "batch_size": 4, "max_length": 64,
               "save_every": 1, "progress": False}  # fmt: skip
    with pytest.raises(DataError, match="--fit-tokens"):
        sc.train(model, rows, tmp_path / "out", fit_tokens=1, **options)
    with pytest.raises(SparsecraftError, match="without --stages"):
        sc.train(model, rows, tmp_path / "out", resume=True, stages=("router",), **options)
    sc.train(model, rows, tmp_path / "out", resume=True, fit_tokens=300, **options)
    assert model.sparsecraft.running.stages == ["sparsify", "router"]
