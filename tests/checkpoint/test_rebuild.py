"""A folder counts only once the same model has been built from it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import sparsecraft as sc
from sparsecraft.checkpoint import rebuild
from sparsecraft.dense.origin import Origin
from sparsecraft.errors import CheckpointError
from sparsecraft.moe import cost
from tests.cases.families import batch, dense, logits


def model_on(base=None, recipe=None):
    model = sc.hub.load_dense(str(base)) if base else dense("llama")
    sc.convert(model, recipe or sc.recipes.upcycling(num_experts=2))
    return model


def refused(model, out, *words):
    with pytest.raises(CheckpointError) as refusal:
        sc.save(model, out)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)
    assert not out.exists() and not [*out.parent.glob(f"*{out.name}*")]


def base_of(tmp_path):
    dense("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("on_base", [True, False], ids=["base", "standalone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_back_is_the_model(on_base, dtype, tmp_path, caplog):
    model = model_on(base_of(tmp_path) if on_base else None).to(dtype)
    torch.manual_seed(5)
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    with caplog.at_level("INFO", "sparsecraft"):
        sc.save(model, tmp_path / "out")
    assert "Rebuilt from the folder: all is equal" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    again, inputs = sc.load(tmp_path / "out"), batch("llama")
    # In bfloat16 the cast has rounded the rotary frequencies too, which are in no file.
    near = 1e-6 if dtype == torch.float32 else 0.1
    assert torch.allclose(logits(again, inputs), logits(model, inputs), rtol=0, atol=near)


def test_the_base_is_loaded_as_load_does(tmp_path, monkeypatch):
    """With the settings that packed it, and hashed no second time."""
    model, seen, hashed = model_on(base_of(tmp_path)), [], []
    settings = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    monkeypatch.setattr("sparsecraft.checkpoint.base.settings_of", lambda model: settings)
    for module in (rebuild, sys.modules["sparsecraft.checkpoint.load"]):
        load_on = module.load_on

        def spy(origin, recipe, packed=None, load_on=load_on, **kwargs):
            seen.append((origin, recipe, packed, kwargs["dtype"], kwargs["config"].to_dict()))
            return load_on(origin, recipe, **kwargs)

        monkeypatch.setattr(module, "load_on", spy)
    fingerprint = Origin.fingerprint
    monkeypatch.setattr(Origin, "fingerprint", lambda o: hashed.append(o) or fingerprint(o))
    sc.save(model, tmp_path / "out")
    assert len(hashed) == 1
    sc.load(tmp_path / "out")
    assert seen[0] == seen[1] and seen[0][2] == settings


def test_a_module_that_came_in_after_the_conversion_is_seen(tmp_path):
    """Nothing that is in the folder says that it stands there."""
    model = model_on()
    model.model.norm.register_parameter("shift", nn.Parameter(torch.ones(32)))
    refused(model, tmp_path / "out", "'model.norm.shift'", "no place for")


def test_a_setting_of_the_model_alone_is_seen(tmp_path):
    """Its tensors and its configuration are equal."""
    model = model_on()
    model.model.layers[0].self_attn.scaling *= 3
    refused(model, tmp_path / "out", "its tensors are equal and its outputs differ")


def test_an_activation_that_was_exchanged_is_seen(tmp_path):
    model = model_on(recipe=sc.recipes.molora(num_experts=2))
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    refused(model, tmp_path / "out", "its outputs differ")


def test_a_layer_that_was_taken_out_is_seen(tmp_path):
    model = model_on(recipe=sc.recipes.upcycling(num_experts=2))
    del model.model.layers[1]
    refused(model, tmp_path / "out", "model.layers.1")


def test_a_tensor_that_was_written_wrong_is_seen(tmp_path, monkeypatch):
    """The digests are those of the file, so that they agree."""
    model = model_on(base_of(tmp_path))
    kept = rebuild.read_tensors

    def other(again, *args, **kwargs):
        kept(again, *args, **kwargs)
        with torch.no_grad():
            again.model.layers[1].mlp.experts.down[0, 0, 0] += 1e-3

    monkeypatch.setattr(rebuild, "read_tensors", other)
    refused(model, tmp_path / "out", "model.layers.1.mlp.experts.down", "another one")


def test_a_large_model_is_compared_by_names_and_shapes(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(rebuild, "MOST_BYTES", 0)
    model = model_on()
    with caplog.at_level("INFO", "sparsecraft"):
        sc.save(model, tmp_path / "out")
    assert "names and shapes agree" in caplog.text
    del model.model.layers[1]
    refused(model, tmp_path / "other", "model.layers.1")


def test_a_gpu_is_used_if_it_has_room_for_as_much_again(monkeypatch):
    cuda, size = torch.device("cuda"), 10
    for free, place in ((2 * size + 2**30, "cuda"), (2 * size + 2**30 - 1, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        assert rebuild._place(cuda, size).type == place
    assert rebuild._place(torch.device("cpu"), size).type == "cpu"


def test_a_little_memory_compares_names_and_shapes(tmp_path, monkeypatch, caplog):
    model = model_on()
    size = cost.bytes_of(model)
    for memory, words in ((2 * size, "names and shapes agree"), (2 * size + 1, "all is equal")):
        caplog.clear()
        monkeypatch.setattr(rebuild, "main_memory", lambda memory=memory: memory)
        with caplog.at_level("INFO", "sparsecraft"):
            sc.save(model, tmp_path / "out", overwrite=True)
        assert words in caplog.text


def test_a_model_that_only_its_own_inputs_run_is_compared_by_tensors(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("these are no inputs of mine")

    monkeypatch.setattr(rebuild, "outputs", refuse)
    sc.save(model_on(), tmp_path / "out")
    assert (tmp_path / "out" / "recipe.json").is_file()
