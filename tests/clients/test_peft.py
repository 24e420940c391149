"""A user's own LoRA on a converted model."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import sparsecraft as sc
from tests.clients.starting import RECIPES, checkpoint, converted, logits

pytestmark = pytest.mark.slow


def adapted(model: torch.nn.Module, **settings) -> PeftModel:
    torch.manual_seed(3)
    targets = ["lm_head", "self_attn.o_proj"]
    if not any(name.endswith("self_attn.o_proj.weight") for name in model.state_dict()):
        targets = ["lm_head"]
    lora = LoraConfig(target_modules=targets, init_lora_weights=False, **settings)
    return get_peft_model(model, lora)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_way_back_gives_the_lora_on_the_converted_model(recipe, tmp_path):
    folder = checkpoint(tmp_path, recipe)
    model = adapted(sc.load(folder), task_type="CAUSAL_LM")
    wanted = logits(model)
    assert not torch.equal(wanted, logits(sc.load(folder)))
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    named = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == folder
    for back in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora"),
        PeftModel.from_pretrained(sc.load(folder), tmp_path / "lora"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "lora"),
        LlamaForCausalLM.from_pretrained(tmp_path / "lora"),
    ):
        torch.testing.assert_close(logits(back), wanted, rtol=0, atol=1e-6)


def test_on_a_model_that_is_not_saved_it_leads_nowhere(tmp_path):
    model = adapted(converted(tmp_path, "molora"), task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    with pytest.raises(Exception, match=r"not saved yet: call sc\.save"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_lora_on_experts_own_tensors_is_refused(recipe, tmp_path):
    model = converted(tmp_path, recipe)
    names = [n for n, p in model.named_parameters() if ".experts." in n and p.ndim == 3]
    lora = LoraConfig(target_modules=["lm_head"], target_parameters=names)
    with pytest.raises(sc.SparsecraftError, match=r"ParamWrapper cannot take.*target_modules"):
        get_peft_model(model, lora)


def test_merged_it_is_part_of_the_checkpoint(tmp_path):
    folder = checkpoint(tmp_path, "camelidae")
    merged = adapted(sc.load(folder), task_type="CAUSAL_LM").merge_and_unload()
    wanted = logits(merged)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(sc.load(tmp_path / "merged")), wanted)
