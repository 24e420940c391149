"""Families by recipes: exact, in part or refused, and never silently wrong.

A few cells here; all of them by `make families`, which writes docs/families.md.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsecraft as sc
from tests.cases import examine as examining
from tests.cases.examine import ROUNDING, ZOO_RECIPES, examine, in_general
from tests.cases.members import member_inputs, member_model, member_outputs
from tests.cases.zoo import ZOO

# (family, recipe) -> the verdict, and a word of the reason.
CELLS = {
    ("llama", "camelidae"): ("exact", ""),
    ("llama", "bam"): ("exact", ""),
    ("gpt_neox", "molora"): ("exact", ""),
    ("mixtral", "camelidae"): ("part", "experts"),
    ("gpt_oss", "molora"): ("part", "experts"),
    ("mamba", "molora"): ("part", "without calling"),
    ("mamba", "upcycling"): ("refused", "MambaForCausalLM"),
    ("mixtral", "upcycling"): ("refused", "own mixtures"),
    ("jamba", "upcycling"): ("part", "mamba"),
    ("albert", "molora"): ("part", "outside"),
    ("bart", "molora"): ("exact", ""),
    ("vit", "gmoefication"): ("exact", ""),
    ("t5", "mov"): ("exact", ""),
}


# Not `family` and `recipe`: conftest leaves out pairs that the tables of the suite do not have.
@pytest.mark.parametrize(("member", "method"), CELLS)
def test_a_cell_is_what_the_page_says(member, method):
    cell = examine(member, method)
    verdict, word = CELLS[member, method]
    assert cell.verdict == verdict, cell
    assert word in f"{cell.reason} {cell.left_out}"


@pytest.mark.slow
@pytest.mark.parametrize("method", ZOO_RECIPES)
@pytest.mark.parametrize("member", ZOO)
def test_no_cell_is_wrong(member, method):
    cell = examine(member, method)
    assert cell.verdict != "WRONG", cell.reason


def test_the_zoo_is_large_and_its_models_are_alive():
    assert len(ZOO) >= 90 and len({member.group for member in ZOO.values()}) == 8
    for family in ("clip", "llava", "qwen3_vl", "wav2vec2", "whisper"):
        model, inputs = member_model(family), member_inputs(family)
        outputs = member_outputs(model, inputs)
        assert outputs.isfinite().all() and outputs.std() > 1e-3
        assert torch.equal(outputs, member_outputs(member_model(family), inputs))


# What an examination must see: a conversion that is wrong in one way each.


def _scales_a_network(model: nn.Module) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down.mul_(0.98)


def _forgets_a_layer(model: nn.Module) -> None:
    layer = model.model.layers[1].mlp
    layer.forward = lambda x: layer.base(x)


def _keeps_a_change(model: nn.Module) -> None:
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3


@pytest.mark.parametrize(
    ("harm", "method", "word"),
    [
        (_scales_a_network, "upcycling", "outputs differ"),
        (_forgets_a_layer, "camelidae", "no output follows the experts at model.layers.1.mlp"),
        (_keeps_a_change, "molora", "not as they were"),
    ],
)
def test_a_wrong_conversion_is_found(monkeypatch, harm, method, word):
    def convert(model: nn.Module, recipe: sc.Recipe) -> object:
        report = sc.conversion.convert.convert(model, recipe)
        harm(model)
        return report

    monkeypatch.setattr(examining.sc, "convert", convert)
    cell = examine("llama", method)
    assert cell.verdict == "WRONG" and word in cell.reason, cell


def test_like_reasons_are_one():
    reason = "LlamaForCausalLM has none at 'model.layers.0.mlp' and model.layers.13.mlp."
    wanted = "The model has none at 'model.layers.*.mlp' and model.layers.*.mlp."
    assert in_general(reason, "LlamaForCausalLM") == wanted
    assert 0 < ROUNDING <= 1e-4
