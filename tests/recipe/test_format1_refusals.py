"""A file of format 1 is refused for what the code that wrote format 1 refused."""

from __future__ import annotations

from typing import Any

import pytest

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.formats import from_json

SPLIT = {"weighting": "one", "scorer": "mlp"}


def old(router: dict[str, Any], experts: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    """A recipe of format 1."""
    kind = "ffn" if router.get("weighting", "softmax") == "softmax" else "split"
    edit = {"experts": {"kind": kind, "num_experts": 4, **experts}, "router": router}
    words = dict.fromkeys(("name", "title", "paper"), "old")
    return {
        "format_version": 1, **words, "exact_at_start": False, "edits": [edit],
        "stages": [{"name": "s", **stage}],
    }  # fmt: skip


def refused(data: dict[str, Any], *words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        from_json(data)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("router", "name"),
    [
        ({"select": "soft", "top_k": 2}, "top_k"),
        ({"select": "soft"}, "top_k"),
        ({"select": "sample", "top_k": 2}, "top_k"),
        ({"select": "sample", "top_k": None}, "top_k"),
        ({"select": "top_k", "top_k": None}, "top_k"),
        ({"threshold": 0.5}, "threshold"),
        ({**SPLIT, "init": []}, "init"),
        ({**SPLIT, "init": "hidden"}, "init"),
        ({**SPLIT, "init": "uniform"}, "init"),
        ({**SPLIT, "init_std": -1.0}, "init_std"),
        ({**SPLIT, "encoder": 5}, "encoder"),
        ({**SPLIT, "encoder": "self"}, "encoder"),
        ({**SPLIT, "select": "share", "top_k": None}, "threshold"),
        ({"init_std": -1.0}, "init_std"),
        ({"target": "nope"}, "target"),
        ({"sentence_dim": 0}, "sentence_dim"),
        ({"renormalize": 1, "select": "soft", "top_k": None}, "renormalize"),
        ({"scorer": "domain"}, "init"),
        *(({name: value}, name) for name in ("select", "scorer", "init", "decides", "weighting")
          for value in ({}, ["soft"])),
    ],
)  # fmt: skip
def test_an_idle_field_makes_sense(router, name):
    refused(old(router, {}, {}), f"edits.0.router.{name} is")


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ({"differ": {}}, "recipe.edits.0.experts has no field 'differ'"),
        ({"init": "zeros"}, "recipe.edits.0.experts.init is 'zeros'"),
        ({"kind": {}}, "recipe.edits.0.experts.kind is {}"),
        ({"kind": ["ffn"]}, "recipe.edits.0.experts.kind is ['ffn']"),
    ],
)
def test_experts_have_the_fields_of_format_1(experts, words):
    refused(old({}, experts, {}), words)


def test_the_other_fields_of_a_fit_make_sense():
    fit = {"fit": {"tokens": 64}}
    assert from_json(old(SPLIT, {}, fit | {"optimizer": "adafactor"})).stages[0].tokens == 64
    refused(old(SPLIT, {}, fit | {"optimizer": "nope"}), "recipe.stages.0.optimizer is 'nope'")
    refused(old(SPLIT, {}, fit | {"learning_rate": -1.0}), "learning_rate is -1.0")
