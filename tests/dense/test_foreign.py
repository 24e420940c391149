"""Modules that a model's configuration does not build are refused before any work."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import sparsecraft as sc
from sparsecraft.dense.foreign import check_own
from sparsecraft.errors import SurgeryError
from tests.cases.families import FAMILIES, dense


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    return get_peft_model(model, config).base_model.model


def pruned(model):
    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", amount=0.2)
    return model


def parametrized(model):
    parametrizations.weight_norm(model.model.layers[1].mlp.down_proj)
    return model


def spectral(model):
    parametrizations.spectral_norm(model.lm_head)
    return model


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def another_class(model):
    old = model.model.layers[0].self_attn.o_proj
    new = Scaled(old.in_features, old.out_features, bias=old.bias is not None)
    new.load_state_dict(old.state_dict())
    model.model.layers[0].self_attn.o_proj = new
    return model


def another_activation(model):
    model.model.layers[0].mlp.act_fn = nn.GELU()
    return model


def a_head_in_parts(model):
    model.lm_head = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 96))
    return model


def wrapped(model):
    model.model.norm = torch.compile(model.model.norm)
    return model


def without_a_layer(model):
    del model.model.layers[1]
    return model


CHANGES = {
    with_lora: ("q_proj", "merge the adapter first", "merge_and_unload"),
    pruned: ("model.layers.0.mlp.up_proj", "prune.remove"),
    parametrized: ("model.layers.1.mlp.down_proj", "remove_parametrizations"),
    spectral: ("lm_head",),
    another_class: ("model.layers.0.self_attn.o_proj (Scaled)",),
    another_activation: ("model.layers.0.mlp.act_fn (GELU)",),
    a_head_in_parts: ("lm_head",),
    wrapped: ("model.norm",),
    without_a_layer: ("model.layers", "holds 1 modules", "says 2", "num_hidden_layers"),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_the_configuration_does_not_build_is_refused_by_name(change):
    model = change(dense("llama"))
    modules = list(model.modules())
    with pytest.raises(SurgeryError) as refusal:
        sc.convert(model, sc.recipes.upcycling(num_experts=2))
    assert all(words in str(refusal.value) for words in CHANGES[change]), str(refusal.value)
    assert list(model.modules()) == modules


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_builds_passes(family):
    check_own(dense(family))
    check_own(dense(family).to(torch.bfloat16).train())


def test_another_size_of_the_same_class_passes():
    model = dense("llama")
    model.resize_token_embeddings(100)
    model.lm_head = nn.Linear(32, 100, bias=False)
    check_own(model)


def test_a_merged_adapter_passes():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(dense("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    check_own(adapted.merge_and_unload())


def test_a_class_of_the_users_own_that_wants_more_is_not_judged():
    """Nothing can be built to compare with; a save refuses it, as no class of transformers."""
    import transformers

    class Mine(transformers.LlamaForCausalLM):
        def __init__(self, config, tea):
            super().__init__(config)

    check_own(Mine(dense("llama").config, "green"))
