"""Bases that are packed in a way that would not come back are refused, without their packages."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsecraft as sc
from sparsecraft.dense.quantization import packing_of
from sparsecraft.errors import HubError, RecipeError, SurgeryError
from tests import tiny

ADAPTERS = sc.recipes.camelidae(num_experts=2, adapter_dim=4, lora_rank=2)
RECIPES = {
    "camelidae": ADAPTERS, "molora": sc.recipes.molora(2), "mov": sc.recipes.mov(2),
    "upcycling": sc.recipes.upcycling(num_experts=2),
}  # fmt: skip
BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", ["torchao", "fp8", "gptq", "awq", "mxfp4", "hqq", "fbgemm_fp8"])
def test_other_packings_are_refused_at_convert(method, recipe):
    for settings in ({"quant_method": method}, SimpleNamespace(quant_method=method)):
        model = tiny.llama()
        if isinstance(settings, dict):
            model.config.quantization_config = settings
        else:  # as transformers has it
            settings.to_dict = lambda: {"quant_method": method}
            model.hf_quantizer = SimpleNamespace(quantization_config=settings)
        with pytest.raises(SurgeryError, match=f"quantized by {method}, .* could not give it back"):
            sc.convert(model, RECIPES[recipe])
        assert not hasattr(model, "sparsecraft")


def test_weights_that_were_packed_by_hand_are_refused():
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        model = tiny.llama()
        linear = model.model.layers[0].mlp.up_proj
        linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        with pytest.raises(SurgeryError, match=r"Parameter at model\.layers\.0\.mlp\.up_proj"):
            sc.convert(model, ADAPTERS)


def test_what_comes_back_has_a_word():
    model = tiny.llama()
    assert packing_of(model) is None
    words = {
        "nf4": BITS | {"bnb_4bit_quant_type": "nf4"},
        "fp4": BITS,
        "int8": {"load_in_8bit": True},
    }
    for word, settings in words.items():
        model.config.quantization_config = settings
        assert packing_of(model) == word
    model.config.quantization_config = BITS
    with pytest.raises(RecipeError, match="'nf4' and the model was loaded with 'fp4'"):
        sc.convert(model, sc.override(ADAPTERS, {"backbone": "nf4"}))
    model.config.quantization_config = {"quant_method": "gguf"}  # which transformers unpacks
    sc.convert(model, ADAPTERS)


def test_a_packed_folder_without_its_package_is_one_sentence(tmp_path, monkeypatch):
    tiny.save_dense(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HubError, match="cannot be loaded"):
        sc.hub.load_dense(tmp_path)
