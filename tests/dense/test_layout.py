"""Files that hold a tensor in parts, as each expert's own: read whole, and a base to stand on."""

from __future__ import annotations

import pytest
import torch

import sparsecraft as sc
from sparsecraft.checkpoint.jsonfile import read_json
from sparsecraft.dense.origin import Origin
from tests.cases.members import member_inputs, member_model, member_outputs

MIXTURES = ("mixtral", "qwen2_moe", "deepseek_v3", "jamba", "gpt_oss", "granitemoe", "phimoe")


@pytest.mark.parametrize("family", [*MIXTURES, "vit", "gpt2"])
def test_every_tensor_is_read_as_transformers_loads_it(family, tmp_path):
    member_model(family).save_pretrained(tmp_path)
    model = sc.hub.load_dense(str(tmp_path))
    origin = Origin.of(model)
    for name, tensor in model.named_parameters():
        assert origin.shape(model, name) == tuple(tensor.shape), name
        assert torch.equal(origin.tensor(model, name), tensor), name
    assert origin.holds(model, {name: p.shape for name, p in model.named_parameters()})


@pytest.mark.parametrize("family", MIXTURES)
def test_a_checkpoint_stands_on_a_mixture_in_a_folder(family, tmp_path):
    member_model(family).save_pretrained(tmp_path / "base")
    model = sc.hub.load_dense(str(tmp_path / "base"))
    assert sc.convert(model, sc.recipes.camelidae(4, 2, adapter_dim=8)).certificate.exact
    sc.save(model, tmp_path / "out")
    assert read_json(tmp_path / "out" / "recipe.json")["base"]["name"] == str(tmp_path / "base")
    inputs = member_inputs(family)
    again = sc.load(tmp_path / "out")
    assert torch.equal(member_outputs(again, inputs), member_outputs(model, inputs))
    sc.revert(again)
    dense = member_outputs(member_model(family), inputs)
    assert torch.equal(member_outputs(again, inputs), dense)


def test_parts_that_are_not_all_there_are_no_tensor(tmp_path):
    from safetensors.torch import load_file, save_file

    member_model("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    model, tensors = sc.hub.load_dense(str(tmp_path)), load_file(path)
    del tensors["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    origin, name = Origin.of(model), "model.layers.0.mlp.experts.gate_up_proj"
    assert origin.tensor(model, name) is None and origin.shape(model, name) is None
