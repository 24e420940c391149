"""Parameters that a token meets, and the products it takes, against counts made another way."""

from __future__ import annotations

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparsecraft as sc
from sparsecraft.moe import cost
from tests.cases.members import member_model


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("family", "experts", "share"),
    [
        ("mixtral", "model.layers.*.mlp.experts", 1 / 2),
        ("qwen2_moe", "model.layers.*.mlp.experts", 1 / 2),
        ("gpt_oss", "model.layers.*.mlp.experts", 1 / 2),
        ("deepseek_v3", "model.layers.1.mlp.experts", 1 / 2),
        ("llama4", "model.layers.1.feed_forward.experts", 1 / 2),
        ("ernie4_5_moe", "model.layers.1.mlp.experts", 1 / 2),
        ("granitemoe", "model.layers.*.block_sparse_moe.experts", 1 / 2),
    ],
)
def test_a_token_meets_the_best_of_the_models_own_experts(family, experts, share):
    model = member_model(family)
    own = sum(size(model.get_submodule(experts.replace("*", str(i)))) for i in _layers(experts))
    counted = cost.count(model)
    assert counted.total == size(model)
    assert counted.active == size(model) - round((1 - share) * own)
    report = sc.convert(model, sc.recipes.molora(2, 2), certify=False)
    assert report.cost.total - report.cost.active == counted.total - counted.active


def test_ours_and_the_models_own_experts_are_counted_apart():
    model = member_model("mixtral")
    own = sum(size(model.get_submodule(f"model.layers.{i}.mlp.experts")) for i in range(2))
    adapters = sc.recipes.camelidae(4, 2, adapter_dim=8, lora_rank=0)
    counted = sc.convert(model, adapters, certify=False).cost
    ours = sum(size(layer.experts) for layer in model.modules() if isinstance(layer, sc.MoELayer))
    assert counted.total - counted.active == own // 2 + ours // 2


def test_experts_that_are_rows_of_tables_are_counted_as_experts():
    """Doge's: of 16 rows of two tables a token meets two, which are products with it."""
    model = member_model("doge_moe")
    tables = [m for n, m in model.named_modules() if n.endswith(("down_embed", "up_embed"))]
    counted, own = cost.count(model), sum(map(size, tables))
    assert len(tables) == 4 and counted.total - counted.active == own - own // 8
    linears = sum(size(m) for m in model.modules() if isinstance(m, nn.Linear))
    assert counted.flops_per_token == 2 * (linears + own // 8)


@pytest.mark.parametrize(
    "family", ["llama", "bert", "gpt2", "t5", "bloom", "opt", "whisper", "clip", "vit", "siglip"]
)
def test_only_matrices_are_products(family):
    """No norm, bias, embedding or table of positions is one; a head that shares it is."""
    model = member_model(family)
    kinds = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)
    matrices = {id(m.weight): m.weight for m in model.modules() if isinstance(m, kinds)}
    products = sum(weight.numel() for weight in matrices.values())
    products += sum(  # nn.MultiheadAttention has one that is no module's
        p.numel() for name, p in model.named_parameters() if name.endswith("in_proj_weight")
    )
    assert cost.count(model).flops_per_token == 2 * products


@pytest.mark.parametrize("recipe", [sc.recipes.upcycling(2, 1), sc.recipes.btx(2)])
def test_biases_of_experts_are_no_products(recipe):
    model = member_model("gpt2")
    dense = cost.count(model).flops_per_token
    width, hidden = model.config.n_embd, model.config.n_inner
    slots = recipe.edits[0].router.slots
    counted = sc.convert(model, recipe, certify=False).cost
    networks = (slots - 1) * 2 * width * hidden + 2 * width  # and the router of two
    assert counted.flops_per_token == dense + 2 * model.config.n_layer * networks


def _layers(pattern: str) -> range:
    return range(2 if "*" in pattern else 1)
