"""What changes the function of a converted model is in its `state_dict`."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

import sparsecraft as sc
from sparsecraft.errors import CheckpointError, SparsecraftError
from sparsecraft.moe.extra_state import BLOCK, pack, unpack
from sparsecraft.moe.names import unique_tensors
from sparsecraft.moe.routers.running import Running, is_running
from sparsecraft.surgery.budget import imitate, rectify, set_budget, split_layers
from tests.cases import RECIPES, SPLITS, E, batch, choosy, dense, logits, randomize_new

KEY = "_extra_state"
CALIBRATION = [(0.25, 0.5), (0.5, 0.2), (1.0, 0.0)]

splits = pytest.mark.parametrize("recipe", SPLITS)


def imitating() -> sc.Recipe:
    return sc.recipes.d2dmoe(E, 0.7, router_dim=16, attention_experts=2)


def fresh(recipe: str, family: str = "llama") -> nn.Module:
    model = dense(family)
    sc.convert(model, imitating() if recipe == "imitating" else RECIPES[recipe].make())
    return model


def running(recipe: str, share: float | None = 0.5, relu: bool = True) -> nn.Module:
    """A model of which everything is moved and set that can be."""
    model = fresh(recipe)
    randomize_new(model)
    choosy(model)
    model.sparsecraft.running.calibration = list(CALIBRATION)
    model.sparsecraft.running.stages = [model.sparsecraft.recipe.stages[0].name]
    if relu:
        rectify(model)
    if recipe == "imitating":
        imitate(model)
    set_budget(model, share)
    return model


def extra(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if name.endswith(KEY)}


def assert_same(other: nn.Module, model: nn.Module) -> None:
    inputs = batch("llama")
    assert torch.equal(logits(other, inputs), logits(model, inputs))
    assert other.sparsecraft.running == model.sparsecraft.running
    pairs = zip(split_layers(model).values(), split_layers(other).values(), strict=True)
    for ours, theirs in pairs:
        for name in ("runs", "k", "share", "threshold"):
            assert getattr(ours.router, name) == getattr(theirs.router, name), name
        assert ours.imitates == theirs.imitates
        assert theirs.router.running is other.sparsecraft.running


# ----------------------------------------------------------------------- it gives the same function


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("share", [0.5, 1.0, None])
@pytest.mark.parametrize("recipe", [*SPLITS, "imitating"])
def test_a_strict_load_gives_the_same_function(recipe, share, relu):
    model, other = running(recipe, share, relu), fresh(recipe)
    wanted = logits(model, batch("llama"))
    assert not torch.equal(logits(other, batch("llama")), wanted)
    found = other.load_state_dict(model.state_dict())
    assert not found.missing_keys and not found.unexpected_keys
    assert_same(other, model)


@pytest.mark.parametrize("recipe", ["dsti", "imitating", "cmoe"])
def test_what_was_set_is_taken_back_too(recipe):
    """A state dict of the dense function, loaded into a model that runs its parts with ReLU."""
    model, other = fresh(recipe), running(recipe)
    randomize_new(model)
    other.load_state_dict(model.state_dict())
    assert_same(other, model)


@splits
def test_one_gate_set_by_hand_comes_back_by_hand(recipe):
    model, other = running(recipe), fresh(recipe)
    gate = [layer.router for layer in split_layers(model).values()][1]
    gate.runs = "soft" if gate.spec.weighting == "score" else "every"
    gate.threshold, gate.share = 0.125, 0.75
    other.load_state_dict(model.state_dict())
    assert_same(other, model)


@pytest.mark.parametrize("recipe", ["dsti", "cmoe", "imitating"])
def test_what_was_loaded_is_saved_and_set_on(recipe, tmp_path):
    model, other = running(recipe), fresh(recipe)
    other.load_state_dict(model.state_dict())
    assert_same(sc.load(sc.save(other, tmp_path / "out")), model)
    set_budget(model, 0.75)
    set_budget(other, 0.75)
    assert_same(other, model)


# ----------------------------------------------------------------------------- every way to load it


@pytest.mark.parametrize("recipe", ["dsti", "cmoe_tuned", "imitating"])
def test_it_goes_through_every_kind_of_state_dict(recipe, tmp_path):
    model = running(recipe)
    state = model.state_dict()

    other = fresh(recipe)
    other.load_state_dict(state, assign=True)
    assert_same(other, model)

    assert_same(copy.deepcopy(model), model)

    torch.save(state, tmp_path / "state.pt")
    other = fresh(recipe)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(other, model)

    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    other = fresh(recipe)
    safetensors.torch.load_model(other, str(tmp_path / "model.safetensors"))
    assert_same(other, model)


@pytest.mark.parametrize("recipe", ["dsti", "cmoe_tuned", "imitating"])
def test_it_goes_through_torchs_distributed_state_dict(recipe, tmp_path):
    model = running(recipe)
    state = get_model_state_dict(model)
    assert extra(state).keys() == extra(model.state_dict()).keys()
    other = fresh(recipe)
    set_model_state_dict(other, state)
    assert_same(other, model)

    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    other = fresh(recipe)
    room = get_model_state_dict(other)
    dcp.load(room, checkpoint_id=tmp_path / "dcp", no_dist=True)
    set_model_state_dict(other, room)
    assert_same(other, model)


def test_transformers_own_save_pretrained_writes_it(tmp_path):
    model = running("dsti")
    type(model).save_pretrained(model, tmp_path)
    held = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert extra(held).keys() == extra(model.state_dict()).keys()
    other = fresh("dsti")
    other.load_state_dict(held, strict=False)
    assert_same(other, model)


# --------------------------------------------------------------------------------- where it is held


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_split_networks_and_their_gates_have_such_keys(recipe):
    model = fresh(recipe)
    names = {
        f"{path}.{part}.{KEY}" for path in split_layers(model) for part in ("experts", "router")
    }
    state = model.state_dict()
    assert extra(state).keys() == names
    assert state.keys() - names <= {
        n for n, _ in model.named_parameters(remove_duplicate=False)
    } | {n for n, _ in model.named_buffers(remove_duplicate=False)}
    assert all(t.dtype == torch.uint8 and t.numel() % BLOCK == 0 for t in extra(state).values())


def test_a_checkpoint_holds_it_in_its_manifest_alone(tmp_path):
    model = running("dsti")
    sc.save(model, tmp_path / "out")
    held = safetensors.torch.load_file(tmp_path / "out" / "moe.safetensors")
    assert not extra(held) and held.keys() <= unique_tensors(model).keys()
    manifest = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert manifest["running"] == model.sparsecraft.running.to_dict()
    assert_same(sc.load(tmp_path / "out"), model)


# -------------------------------------------------------------------------------- what does not fit


def test_a_state_dict_without_it_is_incomplete_and_changes_nothing_else():
    model, other = running("dsti"), running("dsti", share=0.25)
    state = {n: t for n, t in model.state_dict().items() if not n.endswith(KEY)}
    with pytest.raises(RuntimeError, match="_extra_state"):
        other.load_state_dict(state)
    other.load_state_dict(state, strict=False)
    assert other.sparsecraft.running.budget == 0.25


@splits
def test_a_state_that_comes_in_parts_is_taken_over_as_a_whole(recipe):
    """accelerate gives torch one file of a checkpoint after the other."""
    model, other = running(recipe), fresh(recipe)
    state, options = get_model_state_dict(model), StateDictOptions(full_state_dict=True)
    for part in (extra(state), {n: t for n, t in state.items() if not n.endswith(KEY)}):
        set_model_state_dict(other, part, options=options)
    assert_same(other, model)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("router", lambda s: torch.zeros(8, dtype=torch.uint8), "gate of 4 experts cannot be read"),
        ("router", lambda s: torch.zeros(BLOCK), "torch.float32 of shape"),
        ("router", lambda s: {"k": 2}, "cannot be read"),
        ("router", lambda s: pack({}), "should hold rule, runs, k"),
        ("router", lambda s: changed(s, k=E + 1), "k=5"),
        ("router", lambda s: changed(s, k=None), "k=None"),
        ("router", lambda s: changed(s, k=True), "k=True"),
        ("router", lambda s: changed(s, runs="all"), "runs='all'"),
        ("router", lambda s: changed(s, share=2.0), "share=2.0"),
        ("router", lambda s: changed(s, threshold=float("nan")), "NaN is no number"),
        ("router", lambda s: changed(s, threshold="0.1"), "threshold='0.1'"),
        ("router", lambda s: changed(s, running={"budget": 0.5}), "running="),
        ("experts", lambda s: torch.zeros(8, dtype=torch.uint8), "split network cannot be read"),
        ("router", lambda s: changed(s, threshold=10**400), "401 digits"),
        ("router", lambda s: changed(s, threshold=1e300), r"threshold=1e\+300"),
        ("router", lambda s: changed(s, threshold=float("inf")), "Infinity is no number"),
        ("router", lambda s: s.to("meta"), "on the meta device"),
        ("router", lambda s: pack({}).new_tensor([91] * 100_000), "cannot be read"),
        ("router", lambda s: recorded(s, calibration=[[0.5, 0.1], [0.25, 0.2]]), "running="),
        ("router", lambda s: recorded(s, calibration=[[0.5, 10**400]]), "401 digits"),
        ("router", lambda s: recorded(s, calibration=[[1.5, 0.1]]), "running="),
        ("experts", lambda s: changed(s, rectified=1), "rectified=1"),
        ("experts", lambda s: changed(s, imitates=True), "imitates=True"),
        ("experts", lambda s: changed(s, activation=None), "activation=None"),
        ("experts", lambda s: s.to("meta"), "on the meta device"),
        ("experts", lambda s: pack({"rectified": True}), "should hold rectified, imitates"),
    ],
)
def test_wrong_content_is_one_sentence(part, change, words):
    model, other = running("gmoefication"), fresh("gmoefication")
    state = model.state_dict()
    name = next(n for n in extra(state) if f".{part}." in n)
    state[name] = change(state[name])
    with pytest.raises(SparsecraftError, match=words) as error:
        other.load_state_dict(state)
    assert "the same recipe" in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "threshold"), [("dsti", -1.0), ("dsti", 2.0), ("d2dmoe", -1.0), ("d2dmoe", 1.5)]
)
def test_a_threshold_that_the_rule_cannot_have_is_refused(recipe, threshold):
    model, other = running(recipe), fresh(recipe)
    state = model.state_dict()
    name = next(n for n in extra(state) if ".router." in n)
    state[name] = changed(state[name], threshold=threshold)
    with pytest.raises(SparsecraftError, match=f"threshold={threshold}"):
        other.load_state_dict(state)


def recorded(state: torch.Tensor, **fields) -> torch.Tensor:
    found = json.loads(bytes(state.tolist()))["running"]
    return changed(state, running=found | fields)


def changed(state: torch.Tensor, **fields) -> torch.Tensor:
    checks = dict.fromkeys(json.loads(bytes(state.tolist())), lambda value: True)
    return pack(unpack(state, "gate", checks) | fields)


def test_what_a_new_model_runs_is_a_state_that_is_read():
    assert Running().budget == 1 and is_running(Running().to_dict())


def banks(model: nn.Module) -> list:
    return [layer.experts for layer in split_layers(model).values()]


def test_an_activation_set_by_hand_is_no_relu():
    """It is put in again before a load, or else the state is refused; it comes back as it was."""
    model, other = running("gmoefication", relu=False), fresh("gmoefication")
    for bank in banks(model):
        bank.activation = nn.GELU()
    wanted, state = logits(model, batch("llama")), model.state_dict()
    with pytest.raises(SparsecraftError, match=r"activation GELU\(approximate='none'\).*has SiLU"):
        other.load_state_dict(state)
    for bank in banks(other):
        bank.activation = nn.GELU()
    other.load_state_dict(state)
    assert torch.equal(logits(other, batch("llama")), wanted)
    other.load_state_dict(fresh("gmoefication").state_dict())
    assert all(bank.has_own_activation for bank in banks(other))


def test_an_activation_set_by_hand_is_not_merged_as_the_dense_one():
    model = fresh("gmoefication")
    banks(model)[0].activation = nn.GELU()
    with pytest.raises(SparsecraftError, match="its activation is GELU"):
        sc.merge(model)


# ---------------------------------------------------------- what one record of the model cannot say


def one_k(model: nn.Module) -> None:
    next(iter(split_layers(model).values())).router.k = 1


def one_threshold(model: nn.Module) -> None:
    next(iter(split_layers(model).values())).router.threshold = 0.125


def one_dense(model: nn.Module) -> None:
    next(iter(split_layers(model).values())).router.runs = "every"


def one_rectified(model: nn.Module) -> None:
    banks(model)[0].rectify()


def one_not_rectified(model: nn.Module) -> None:
    rectify(model)
    banks(model)[1].rectify(undo=True)


def one_gelu(model: nn.Module) -> None:
    banks(model)[0].activation = nn.GELU()


def one_not_imitating(model: nn.Module) -> None:
    next(bank for bank in banks(model) if bank.imitates).imitates = False


def one_sparse(model: nn.Module) -> None:
    set_budget(model, 1.0)
    next(iter(split_layers(model).values())).router.runs = "sparse"


@pytest.mark.parametrize(
    ("recipe", "change", "words"),
    [
        ("gmoefication", one_k, "k=1, and the budget of 0.5 that the model's record names 2"),
        ("dsti", one_threshold, "threshold=0.125, and the budget of 0.5"),
        ("dsti", one_dense, "some 'sparse'"),
        ("dsti", one_sparse, "it runs by its rule, and the model's record says that every"),
        ("dsti", one_rectified, "its activation is ReLU.*says the dense network's own"),
        ("dsti", one_not_rectified, "its activation is SiLU.*says ReLU"),
        ("dsti", one_gelu, "its activation is GELU"),
        ("imitating", one_not_imitating, "imitates=False, and the model's record says True"),
    ],
)
def test_a_model_that_its_record_does_not_describe_is_not_saved(recipe, change, words, tmp_path):
    model = running(recipe, relu=False)
    change(model)
    with pytest.raises(CheckpointError, match=words) as error:
        sc.save(model, tmp_path / "out")
    assert "sc.set_budget(model, share)" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_top_k_from_another_recipe_is_not_saved_as_this_ones(tmp_path):
    wider = sc.override(RECIPES["gmoefication"].make(), {"router.top_k": 3})
    model, other = dense("llama"), fresh("gmoefication")
    sc.convert(model, wider, certify=False)
    set_budget(model, None)
    other.load_state_dict(model.state_dict())
    with pytest.raises(CheckpointError, match=r"k=3, and the recipe's own rule .* names 2"):
        sc.save(other, tmp_path / "out")
    set_budget(other, 0.75)
    assert_same(sc.load(sc.save(other, tmp_path / "out")), other)


def test_the_state_of_another_rule_is_refused():
    """Of the same shapes, so that no tensor tells them apart."""
    other = sc.override(RECIPES["gmoefication"].make(), {"router.weighting": "score"})
    model = dense("llama")
    sc.convert(model, other, certify=False)
    with pytest.raises(SparsecraftError, match=r"rule=.*'weighting': 'score'"):
        fresh("gmoefication").load_state_dict(model.state_dict())


def test_another_top_k_of_the_same_rule_comes_with_it():
    wider = sc.override(RECIPES["gmoefication"].make(), {"router.top_k": 3})
    model, other = dense("llama"), fresh("gmoefication")
    sc.convert(model, wider, certify=False)
    set_budget(model, None)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, batch("llama")), logits(model, batch("llama")))


def test_gates_that_a_merge_keeps_share_what_the_model_runs():
    model = fresh("imitating")
    randomize_new(model)
    imitate(model)
    sc.merge(model, partial=True)
    gates = [layer.router for layer in split_layers(model).values()]
    assert gates and all(gate.running is model.sparsecraft.running for gate in gates)
    assert model.sparsecraft.running.imitates
