"""What stands where a recipe has something else is refused in one sentence, whatever it is."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import sparsecraft as sc
from sparsecraft.checkpoint.jsonfile import read_json
from sparsecraft.errors import CheckpointError, RecipeError, SparsecraftError
from sparsecraft.moe.extra_state import unpack
from sparsecraft.recipe.formats import from_json, to_json
from sparsecraft.recipe.stages import Fit, Stage
from tests.cases import RECIPES

CAMELIDAE = RECIPES["camelidae"]

DEEP = "[" * 200_000 + "]" * 200_000


def written(path: str, value: Any) -> dict[str, Any]:
    """The JSON of a recipe with one value changed."""
    data = json.loads(json.dumps(to_json(CAMELIDAE.make())))
    *parents, last = path.split(".")
    node = data
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[last] = value
    return data


def refused(call: Any, *words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("kind", [{}, {"a": 1}, [], ["soft"], 5, None])
@pytest.mark.parametrize("where", ["edits.0.experts", "edits.0.router.select", "stages.0"])
def test_a_kind_is_a_word(where, kind):
    data = written(f"{where}.kind", kind)
    refused(lambda: from_json(data), f"recipe.{where}.kind is {kind!r}", "Known: ")
    recipe = CAMELIDAE.make()
    refused(lambda: sc.override(recipe, {"router.select": {"kind": kind}}), f"kind is {kind!r}")


def test_a_family_of_one_kind_has_its_kind_said():
    data = written("backbone", {})
    refused(lambda: from_json(data), "recipe.backbone.kind is None", "nf4")


def test_a_lacking_field_is_named():
    router = {"kind": "gate", "select": {"kind": "share"}}
    data = written("edits.0.router", router)
    refused(lambda: from_json(data), "recipe.edits.0.router.select lacks threshold.")


@pytest.mark.parametrize("field", ["learning_rate", "weight_decay", "epochs"])
@pytest.mark.parametrize("value", [10**400, math.nan], ids=["long", "nan"])
def test_numbers_that_are_none_are_refused(field, value):
    refused(lambda: from_json(written(f"stages.0.{field}", value)), field)
    refused(lambda: Stage(**{field: value}), field)


@pytest.mark.parametrize("field", ["sparsity", "dropout", "learning_rate", "holdout"])
@pytest.mark.parametrize(
    "value", [-1.0, math.nan, math.inf, 10**400], ids=["-1", "nan", "inf", "long"]
)
def test_numbers_of_a_fit_have_their_range(field, value):
    refused(lambda: Fit(**{field: value}), field)


def test_nested_too_deeply(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text('{"a": ' + DEEP + "}")
    with pytest.raises(CheckpointError, match=r"recipe\.json cannot be read"):
        read_json(file)
    text = '{"kind": ' + DEEP + "}"
    refused(lambda: sc.override(CAMELIDAE.make(), {"select": text}), "is no JSON")
    state = torch.tensor(list(DEEP.encode()), dtype=torch.uint8)
    with pytest.raises(SparsecraftError, match="cannot be read"):
        unpack(state, "gate", {})
    deep: list = []
    for _ in range(200_000):
        deep = [deep]
    refused(lambda: from_json(written("title", "x") | {"title": deep}), "recipe.title")
    while deep:  # or its end would be as deep
        deep = deep.pop()


# ----------------------------------------------------------------------------------------- override


def test_an_item_of_a_list_changes_as_a_whole():
    changed = sc.override(CAMELIDAE.make(), {"stages.0": "fit", "stages.0.tokens": "64"})
    assert isinstance(changed.stages[0], Fit) and changed.stages[0].tokens == 64
    assert changed.stages[0].name == CAMELIDAE.make().stages[0].name
    back = sc.override(changed, {"stages.0": "train", "stages.0.losses": "switch=0.5"})
    assert isinstance(back.stages[0], Stage) and back.stages[0].losses == {"switch": 0.5}
    refused(lambda: sc.override(changed, {"stages.0": "rest"}), "stages.0.kind is 'rest'")


def test_any_dataclass_is_given_as_json():
    recipe = sc.override(CAMELIDAE.make(), {"deal": '{"sample": 0.5}'})
    assert recipe.stages[0].deal.sample == 0.5
    again = sc.override(recipe, {"deal": '{"sample": 0.25}', "deal.at_least": "3"})
    assert (again.stages[0].deal.sample, again.stages[0].deal.at_least) == (0.25, 3)
    assert sc.override(recipe, {"deal": "none"}).stages[0].deal is None


@pytest.mark.parametrize("changes", [{5: 1}, {None: 1}, {("a",): 1}, None, [("a", 1)], "top_k=1"])
def test_paths_are_text(changes):
    refused(lambda: sc.override(CAMELIDAE.make(), changes), "path")


def test_a_word_without_a_path_is_not_what_was_meant():
    recipe = sc.override(CAMELIDAE.make(), {"select": "soft"})
    with pytest.raises(RecipeError) as caught:
        sc.override(recipe, {"top_k": 2})
    said = str(caught.value)
    assert "has no field 'top_k'" in said
    assert "top_k" not in said.replace("has no field 'top_k'", "")
    refused(
        lambda: sc.override(recipe, {"experts.temperature": 1.0}),
        "Did you mean edits.0.router.temperature?",
    )
