"""A folder counts only once the same model has been built from it."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from torch import nn

import sparsecraft as sc
from sparsecraft.checkpoint import rebuild
from sparsecraft.dense.origin import Origin
from sparsecraft.errors import CheckpointError
from sparsecraft.moe import cost
from tests.cases.families import batch, dense, logits
from tests.cases.members import member_inputs, member_model, member_outputs


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


@pytest.mark.parametrize("family", ["led", "prophetnet", "clip", "siglip"])
def test_a_model_that_its_longest_probe_does_not_run_is_saved(family, tmp_path):
    """Positions by other names, a look at the next one, and images that are missing."""
    model, inputs = member_model(family), member_inputs(family)
    sc.convert(model, sc.recipes.molora(num_experts=2, rank=2))
    sc.save(model, tmp_path / "out")
    wanted, found = (member_outputs(m, inputs) for m in (model, sc.load(tmp_path / "out")))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


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


def test_a_model_that_only_its_own_inputs_run_is_compared_by_tensors(tmp_path, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise ValueError("these are no inputs of mine")

    monkeypatch.setattr(rebuild, "wide_outputs", refuse)
    with caplog.at_level("INFO", "sparsecraft"):
        sc.save(model_on(), tmp_path / "out")
    assert (tmp_path / "out" / "recipe.json").is_file()
    assert "tensors and buffers are equal; its outputs were not compared" in caplog.text
    assert "all is equal" not in caplog.text
    refused(far_off(neo()), tmp_path / "other", "attention.bias", "is in no file")


# ----------------------------------------------------------------------- what a short probe misses


def neo():
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
        max_position_embeddings=64, window_size=48, attention_types=[[["local"], 2]],
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.GPTNeoForCausalLM(config).eval()
    sc.convert(model, sc.recipes.upcycling(num_experts=2))
    return model


def far_off(model):
    """A window of 20 in a buffer that is in no file, and of 48 in the configuration."""
    for block in model.transformer.h:
        attention = block.attn.attention
        attention.bias = torch.bitwise_xor(attention.bias, torch.tril(attention.bias, -20))
    return model


def test_a_buffer_that_is_in_no_file_is_seen(tmp_path):
    sc.save(neo(), tmp_path / "good")
    refused(far_off(neo()), tmp_path / "out", "attn.attention.bias", "in no file")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "behind"), [("llama", 40), ("neo", 30)])
def test_what_differs_in_later_tokens_is_seen(name, behind, dtype, tmp_path):
    model = (neo() if name == "neo" else model_on()).to(dtype)
    block = model.transformer.h[1] if name == "neo" else model.model.layers[1]
    forward = block.forward

    def late(hidden, *args, **kwargs):
        hidden = hidden.clone()
        hidden[:, behind:] *= 1.01
        return forward(hidden, *args, **kwargs)

    block.forward = late
    refused(model, tmp_path / "out", "its tensors are equal and its outputs differ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_no_setting(dtype, tmp_path):
    model = model_on().to(dtype)
    model.model.layers[0].self_attn.scaling *= 1.02
    refused(model, tmp_path / "out", "its outputs differ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_that_a_cast_has_rounded_are_no_difference(dtype, tmp_path, caplog):
    """The folder gives the exact ones, as transformers does of a dense model's."""
    model = dense("llama").to(dtype).float()
    sc.convert(model, sc.recipes.camelidae(2, adapter_dim=4))
    with caplog.at_level("INFO"):
        sc.save(model, tmp_path / "out")
    assert "all is equal" in caplog.text


def test_frequencies_that_have_grown_are_no_difference(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, **heads, rope_parameters=rope)
    ).eval()
    sc.convert(model, sc.recipes.upcycling(num_experts=2))
    before = model.model.rotary_emb.inv_freq.clone()
    model(torch.zeros(1, 100, dtype=torch.long))
    assert not torch.equal(model.model.rotary_emb.inv_freq, before)
    sc.save(model, tmp_path / "out")
