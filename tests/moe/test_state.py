"""What changes the function of a converted model is in its `state_dict`."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import sparsecraft as sc
from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.extra_state import BLOCK, pack, unpack
from sparsecraft.moe.names import unique_tensors
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
        ("router", lambda s: changed(s, threshold=float("nan")), "threshold=nan"),
        ("router", lambda s: changed(s, threshold="0.1"), "threshold='0.1'"),
        ("router", lambda s: changed(s, running={"budget": 0.5}), "running="),
        ("experts", lambda s: torch.zeros(8, dtype=torch.uint8), "split network cannot be read"),
        ("experts", lambda s: pack({"rectified": 1, "imitates": False}), "rectified=1"),
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


def changed(state: torch.Tensor, **fields) -> torch.Tensor:
    checks = dict.fromkeys(json.loads(bytes(state.tolist())), lambda value: True)
    return pack(unpack(state, "gate", checks) | fields)


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
