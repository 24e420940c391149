"""Kinds of options are entered whole or not at all, and what cannot be one is one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch

import sparsecraft as sc
from sparsecraft.errors import RecipeError
from sparsecraft.moe.experts import build as experts
from sparsecraft.moe.experts.ffn import FFNExperts
from sparsecraft.moe.experts.lora import LoRAExperts
from sparsecraft.moe.experts.vector import VectorExperts
from sparsecraft.moe.routers import build as routers
from sparsecraft.moe.routers.scorers import LinearScorer
from sparsecraft.moe.routers.starts import draw
from sparsecraft.recipe import scorers, selections
from sparsecraft.recipe.experts import ExpertsSpec, FFNSpec, VectorSpec
from sparsecraft.recipe.formats import from_json, to_json
from sparsecraft.recipe.kinds import FAMILIES, add_kind
from sparsecraft.recipe.overrides import override
from tests.cases import dense


@dataclass(frozen=True, kw_only=True, slots=True)
class FreshOrLora(ExpertsSpec):
    kind: Literal["fresh", "lora"] = "fresh"
    num_experts: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Wordless(ExpertsSpec):
    num_experts: int = 2


@dataclass(frozen=True)
class NoField(scorers.Start):
    std: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Number(ExpertsSpec):
    kind: int = 3
    num_experts: int = 2


class Plain(ExpertsSpec):
    kind = "plain"


class PlainBelow(VectorSpec):
    """A class below a dataclass that is a kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole(ExpertsSpec):
    kind: Literal["whole"] = "whole"
    num_experts: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnStart(scorers.Start):
    kind: Literal["own_start"] = "own_start"


def known() -> list:
    tables = (*FAMILIES.values(), experts.BANKS, *routers.TABLES.values())
    return [dict(table) for table in tables]


REFUSED = {
    "a bank that is there": (
        lambda: experts.register(FFNSpec, LoRAExperts),
        "What computes FFNSpec is named already (FFNExperts)",
    ),
    "a second word that is taken": (
        lambda: experts.register(FreshOrLora, VectorExperts),
        "kind 'lora' of FreshOrLora is that of LoRASpec",
    ),
    "a kind without a word": (
        lambda: experts.register(Wordless, VectorExperts),
        "it needs a field kind with a default or a Literal",
    ),
    "no field kind": (
        lambda: routers.register(NoField, print),
        "it needs a field kind with a default or a Literal",
    ),
    "a kind that is no word": (lambda: add_kind(Number), "Number has no kind"),
    "the base of a family": (lambda: add_kind(ExpertsSpec), "ExpertsSpec has no kind"),
    "no dataclass": (
        lambda: experts.register(Plain, VectorExperts),
        "Plain is no kind of options: it must be a dataclass",
    ),
    "no dataclass below one": (
        lambda: experts.register(PlainBelow, VectorExperts),
        "PlainBelow is no kind of options: it must be a dataclass",
    ),
    "no class for add_kind": (lambda: add_kind("x"), "'x' is no kind of options"),
    "a text of experts": (
        lambda: experts.register("x", VectorExperts),
        "'x' names no experts: it must be a dataclass below ExpertsSpec",
    ),
    "None of experts": (lambda: experts.register(None, VectorExperts), "None names no experts"),
    "an instance of experts": (
        lambda: experts.register(Whole(), VectorExperts),
        "Whole(kind='whole', num_experts=2) names no experts",
    ),
    "another family's option": (
        lambda: experts.register(scorers.Linear, VectorExperts),
        "Linear names no experts",
    ),
    "a bank that is none": (
        lambda: experts.register(Whole, LinearScorer),
        "LinearScorer is no bank for Whole: it must be a class below",
    ),
    "a bank that is no class": (lambda: experts.register(Whole, 3), "3 is no bank for Whole"),
    "a text of routers": (lambda: routers.register("x", print), "'x' is no part of a router"),
    "None of routers": (lambda: routers.register(None, print), "None is no part of a router"),
    "an instance of routers": (
        lambda: routers.register(OwnStart(), print),
        "is no part of a router: it must be a dataclass below one of ScorerSpec",
    ),
    "experts as a router": (
        lambda: routers.register(FFNSpec, print),
        "FFNSpec is no part of a router",
    ),
    "a start that cannot be called": (
        lambda: routers.register(OwnStart, 0.5),
        "0.5 computes nothing for OwnStart: it must be a class or a function",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_kind_is_refused_and_nothing_is_entered(case):
    make, words = REFUSED[case]
    before = known()
    with pytest.raises(RecipeError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value)
    assert known() == before


def test_the_same_again_is_fine():
    before = known()
    experts.register(FFNSpec, FFNExperts)
    routers.register(scorers.Linear, LinearScorer)
    add_kind(FFNSpec)
    assert known() == before


# ----------------------------------------------------------- a kind that nothing has been named for


@add_kind
@dataclass(frozen=True, slots=True, kw_only=True)
class BareScorer(scorers.ScorerSpec):
    kind: Literal["bare_scorer"] = "bare_scorer"


@add_kind
@dataclass(frozen=True, slots=True, kw_only=True)
class BarePart(scorers.PartScorerSpec):
    kind: Literal["bare_part"] = "bare_part"


@add_kind
@dataclass(frozen=True, slots=True, kw_only=True)
class BareStart(scorers.Start):
    kind: Literal["bare_start"] = "bare_start"


@add_kind
@dataclass(frozen=True, slots=True, kw_only=True)
class BareSelection(selections.Selection):
    kind: Literal["bare_selection"] = "bare_selection"


@pytest.mark.parametrize(
    ("recipe", "change", "lacks"),
    [
        ("upcycling", {"router.scorer": BareScorer()}, "BareScorer ('bare_scorer') has no scorer"),
        ("moefication", {"router.scorer": BarePart()}, "BarePart ('bare_part') has no scorer"),
        ("upcycling", {"router.init": BareStart()}, "BareStart ('bare_start') has no function"),
        ("upcycling", {"router.select": BareSelection()}, "BareSelection ('bare_selection') has"),
    ],
)
def test_a_kind_that_nothing_computes_is_one_sentence(recipe, change, lacks):
    made = override(getattr(sc.recipes, recipe)(4), change)
    with pytest.raises(RecipeError) as error:
        sc.convert(dense("llama"), made)
    assert lacks in str(error.value)
    assert "sparsecraft.moe.routers.build.register(option, made)" in str(error.value)


def test_a_start_that_nothing_computes_is_one_sentence():
    with pytest.raises(RecipeError, match=r"BareStart .* has no function that fills a weight"):
        draw(BareStart(), torch.empty(2, 2))


def test_a_recipe_of_a_kind_that_is_not_registered_says_what_to_import():
    data = to_json(sc.recipes.upcycling(4))
    data["edits"][0]["experts"] = {"kind": "elsewhere", "num_experts": 4}
    with pytest.raises(RecipeError, match=r"'elsewhere'.*must be registered first: import"):
        from_json(data)
