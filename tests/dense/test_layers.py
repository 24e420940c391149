"""Layers by number: the blocks of the lists of blocks that a recipe stands in."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from sparsecraft.dense.layers import layers_at
from sparsecraft.dense.sites import find_sites
from tests.cases import FAMILIES, dense


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_and_their_linears_have_the_number_of_their_block(family):
    model = dense(family)
    networks = [site.path for site in find_sites(model, "ffn")]
    layers, numbers = layers_at(model, networks)
    assert numbers == list(range(len(layers)))
    assert len(layers) == FAMILIES[family].ffns
    linears = [site.path for site in find_sites(model, "linear")]
    again, of_linears = layers_at(model, linears)
    assert again == layers
    for path, number in zip(linears, of_linears, strict=True):
        assert path.startswith(f"{layers[number]}.")


def test_a_block_without_a_site_counts_and_a_list_without_one_does_not():
    model = dense("t5")
    layers, numbers = layers_at(model, ["decoder.block.1.layer.2.DenseReluDense"])
    assert layers == ["decoder.block.0", "decoder.block.1"]
    assert numbers == [1]
    assert layers_at(model, ["encoder.block.1", "decoder.block.0"])[1] == [1, 2]


def test_lists_of_lists_are_numbered_through():
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=2
    )
    model = transformers.SwinModel(config)
    paths = [site.path for site in find_sites(model, "ffn")]
    layers, numbers = layers_at(model, paths)
    assert numbers == [0, 1, 2]
    assert layers[2] == "encoder.layers.1.blocks.1"


def test_what_stands_in_no_block_is_a_layer_of_its_own():
    model = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    assert layers_at(model, ["a", "b"]) == (["b", "a"], [1, 0])
