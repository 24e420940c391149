"""What PEFT's own functions ask of the layers of any method, beyond a model of transformers."""

from __future__ import annotations

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from torch import nn

import sparsecraft as sc
from sparsecraft.errors import SurgeryError
from sparsecraft.interop.peft.configs import config_of
from sparsecraft.interop.peft.layer import layers_of
from tests.cases import families
from tests.cases.recipes import RECIPES
from tests.clients.peft_suite.models import Blocks
from tests.interop.peft.test_tuner import randomize

NAMES = ("camelidae", "adapter", "mov", "molora", "lora", "hydralora", "mixlora", "smola")
AT_BLOCKS = ("camelidae", "adapter", "molora", "lora", "hydralora", "smola")


def config(name: str) -> sc.SparsecraftConfig:
    return config_of(RECIPES[name].make())


@pytest.mark.parametrize("name", AT_BLOCKS)
def test_a_model_that_is_not_of_transformers_is_adapted_trained_and_read_back(tmp_path, name):
    torch.manual_seed(0)
    dense = Blocks().eval()
    x = torch.rand(5, 10)
    wanted = dense(x)
    torch.manual_seed(0)
    model = get_peft_model(Blocks(), config(name))
    assert torch.equal(model.eval()(x), wanted) or RECIPES[name].exact is False
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    randomize(model)
    adapted = model.eval()(x)
    assert not torch.allclose(adapted, wanted)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(dense, tmp_path)(x), adapted)
    assert torch.equal(model.unload()(x), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
@pytest.mark.parametrize("name", NAMES)
def test_layers_say_how_wide_their_dense_module_is(name, family):
    model = get_peft_model(families.dense(family), config(name))
    layers = layers_of(model)
    assert layers
    read: dict[nn.Module, tuple[int, int]] = {}

    def widths(layer, inputs, output):
        read[layer] = inputs[0].shape[-1], output.shape[-1]

    for layer in layers:
        layer.register_forward_hook(widths)
    families.logits(model, families.batch(family))
    assert read == {layer: (layer.in_features, layer.out_features) for layer in layers}


def test_casting_of_inputs_is_turned_off_and_on_as_in_other_methods():
    model = get_peft_model(families.dense("llama"), config("camelidae")).eval()
    inputs = families.batch("llama")
    wanted = families.logits(model, inputs)
    with disable_input_dtype_casting(model):
        assert torch.equal(families.logits(model, inputs), wanted)


@pytest.mark.parametrize("name", ["camelidae", "mov", "lora"])
def test_a_compiled_model_has_its_tensors_under_the_same_names(name):
    model = get_peft_model(families.dense("llama"), config(name))
    plain = get_peft_model_state_dict(model)
    compiled = torch.compile(model, backend="eager")
    found = get_peft_model_state_dict(compiled)
    assert found.keys() == plain.keys()
    assert all(name.startswith("base_model.model.") for name in found)


def test_a_peft_model_around_adapters_of_ours_is_refused_and_they_stay():
    model = get_peft_model(families.dense("llama"), config("molora")).eval()
    randomize(model)
    inputs = families.batch("llama")
    wanted = families.logits(model, inputs)
    with (
        pytest.warns(UserWarning, match="second time"),
        pytest.raises(SurgeryError, match="add_adapter"),
    ):
        get_peft_model(model, config("lora"))
    assert torch.equal(families.logits(model, inputs), wanted)
    around = get_peft_model(
        get_peft_model(families.dense("llama"), peft.LoraConfig(target_modules=["q_proj"])),
        config("molora"),
    )
    assert layers_of(around)
