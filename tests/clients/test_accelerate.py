"""accelerate: its ways to write a model, to read one, and to offload it."""

from __future__ import annotations

import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    disk_offload,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)

import sparsecraft as sc
from tests.clients.starting import IDS, RECIPES, checkpoint, converted, logits

pytestmark = pytest.mark.slow
recipes = pytest.mark.parametrize("recipe", RECIPES)


def prepared(model: torch.nn.Module) -> tuple[Accelerator, torch.nn.Module]:
    accelerator = Accelerator(cpu=True)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(IDS, labels=IDS).loss)
    optimizer.step()
    return accelerator, model


@recipes
def test_the_documented_way_to_save(recipe, tmp_path):
    accelerator, model = prepared(converted(tmp_path, recipe))
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "out",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
        max_shard_size="100KB",
        safe_serialization=True,
    )
    assert torch.equal(logits(sc.load(tmp_path / "out")), logits(model))


@recipes
def test_states_and_weights_of_its_own(recipe, tmp_path):
    accelerator, model = prepared(converted(tmp_path, recipe))
    wanted = logits(model)
    accelerator.save_state(tmp_path / "state")
    accelerator.save_model(model, tmp_path / "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(logits(model), wanted)
    fresh = converted(tmp_path, recipe)
    fresh = load_checkpoint_and_dispatch(fresh, tmp_path / "weights", strict=False)
    assert torch.equal(logits(fresh), wanted)


@recipes
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_folder_of_ours_is_read_into_a_converted_model(recipe, size, tmp_path):
    model = converted(tmp_path, recipe)
    model.save_pretrained(tmp_path / "out", max_shard_size=size)
    index = tmp_path / "out" / "model.safetensors.index.json"
    fresh = sc.hub.load_dense(str(tmp_path / "base"))
    sc.convert(fresh, RECIPES[recipe]())
    load_checkpoint_in_model(fresh, index, strict=True)
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_checkpoint_in_model(sc.hub.load_dense(str(tmp_path / "base")), index, strict=True)
    if recipe != "moefication":  # whose settings accelerate has no place for, and says so
        fresh = load_checkpoint_and_dispatch(converted(tmp_path, recipe), index, {"": "cpu"})
        assert torch.equal(logits(fresh), logits(model))


def test_settings_of_split_networks_are_not_lost_where_there_is_a_device_map(tmp_path):
    model = converted(tmp_path, "moefication")
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="_extra_state"):
        load_checkpoint_and_dispatch(model, tmp_path / "out", {"": "cpu"})


@recipes
def test_offloaded_it_computes_and_saves_the_same(recipe, tmp_path):
    folder = checkpoint(tmp_path, recipe)
    wanted = logits(sc.load(folder))
    model = sc.load(folder)
    cpu_offload(model, "cpu", state_dict={n: t.clone() for n, t in model.state_dict().items()})
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(sc.load(tmp_path / "again")), wanted)
    model = sc.load(folder)
    disk_offload(model, tmp_path / "disk", "cpu")
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "from disk")
    assert torch.equal(logits(sc.load(tmp_path / "from disk")), wanted)


def test_an_offloaded_base_is_refused_in_one_sentence(tmp_path):
    converted(tmp_path, "molora")
    dense = sc.hub.load_dense(str(tmp_path / "base"))
    disk_offload(dense, tmp_path / "disk", "cpu")
    with pytest.raises(sc.SparsecraftError, match=r"offloaded or on the meta.*convert it"):
        sc.convert(dense, RECIPES["molora"]())
