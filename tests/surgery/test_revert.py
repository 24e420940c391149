"""revert of models whose modules share parameters: all as it was, the sharing too."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from torch import nn

import sparsecraft as sc
from sparsecraft.surgery.left_out import UNTIED
from tests import tiny
from tests.cases import RECIPES, randomize_new


def zamba() -> nn.Module:
    """Two blocks that are one, as its class ties them."""
    torch.manual_seed(0)
    config = transformers.ZambaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, attn_layer_period=3, attn_layer_offset=2,
        mamba_d_state=8, mamba_dt_rank=4, n_mamba_heads=2, use_mamba_kernels=False, pad_token_id=0,
    )  # fmt: skip
    return transformers.ZambaForCausalLM(config).eval()


def tied_by_hand() -> nn.Module:
    model = tiny.llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    return model


def snapshot(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[list[str]]]:
    """All tensors, and the names of those that are one."""
    ties: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        ties.setdefault(parameter, []).append(name)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [names for names in ties.values() if len(names) > 1]


def assert_as_before(model: nn.Module, before) -> None:
    tensors, ties = snapshot(model)
    assert ties == before[1]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before[0].items())


@pytest.mark.parametrize("recipe", ["upcycling", "moefication", "btx", "bam", "molora"])
def test_blocks_that_are_one_come_back_as_one(recipe, tmp_path, caplog):
    model = zamba()
    model.save_pretrained(tmp_path / "base")
    model = sc.hub.load_dense(str(tmp_path / "base"))
    before = snapshot(model)
    with caplog.at_level(logging.WARNING, "sparsecraft"):
        report = sc.convert(model, RECIPES[recipe].make())
    replaces = recipe != "molora"
    assert (UNTIED in report.left_out) == (UNTIED in caplog.text) == replaces
    if replaces:
        assert "model.layers.*.shared_transf.feed_forward (2)" in report.left_out[UNTIED]
    randomize_new(model)
    sc.save(model, tmp_path / "out")
    loaded = sc.load(tmp_path / "out")
    for converted in (model, loaded):
        assert_as_before(sc.revert(converted), before)


@pytest.mark.parametrize("paths", ["*", "model.layers.0.*", "model.layers.1.*"])
def test_a_tensor_that_two_networks_share_comes_back_as_one(paths):
    """Whether both networks, the first or the second has experts."""
    model = tied_by_hand()
    before = snapshot(model)
    report = sc.convert(model, sc.recipes.upcycling(2, paths=paths))
    assert len(report.left_out[UNTIED]) == 1
    assert_as_before(sc.revert(model), before)


def test_a_tie_that_was_cut_since_is_no_longer_one(tmp_path):
    model = sc.hub.load_dense(tiny.save_dense(tmp_path / "base"))
    sc.convert(model, sc.recipes.molora(2))
    head = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(head.detach() + 1)
    with pytest.raises(sc.SparsecraftError, match=r"1 tensors .* lm_head\.weight among them"):
        sc.revert(model)
