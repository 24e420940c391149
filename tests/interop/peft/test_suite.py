"""What `make peft-suite` runs and lists; the suite itself is fetched, and none of these tests."""

from __future__ import annotations

import pytest

from sparsecraft.interop.peft.configs import why_no_adapter
from tests.cases.recipes import RECIPES
from tests.clients.peft_suite.configurations import AT_LINEARS, CONFIGURATIONS, of_classes
from tests.clients.peft_suite.failures import FAILURES, Failure, of


def test_every_recipe_that_can_be_an_adapter_is_in_the_suite():
    recipes = [case.make() for case in RECIPES.values()]
    wanted = {recipe.name for recipe in recipes if why_no_adapter(recipe) is None}
    made = [kind(**kwargs).checked_recipe() for kind, kwargs in CONFIGURATIONS.values()]
    assert {recipe.name for recipe in made} == wanted


def test_the_list_names_configurations_that_exist_and_gives_each_reason_once():
    named = {name for failure in FAILURES for name in failure.configurations}
    assert named <= CONFIGURATIONS.keys()
    reasons = [failure.reason for failure in FAILURES]
    assert len(set(reasons)) == len(reasons) and all(failure.count for failure in FAILURES)


@pytest.mark.parametrize(
    ("nodeid", "meant"),
    [
        ("x/test_seq_classifier.py::TestA::test_b[lora-y/tiny-Bert]", True),
        ("x/test_seq_classifier.py::TestA::test_b[True-lora-y/tiny-Bert]", True),
        ("x/test_seq_classifier.py::TestA::test_b[pesc_lora-y/tiny-Bert]", False),
        ("x/test_seq_classifier.py::TestA::test_b[lora-y/tiny-Llama]", False),
        ("x/test_seq_classifier.py::TestA::test_bc[lora-y/tiny-Bert]", False),
        ("x/test_config.py::TestA::test_b[lora-y/tiny-Bert]", False),
    ],
)
def test_a_row_of_the_list_means_its_own_tests_alone(nodeid, meant):
    row = Failure(("seq_*::TestA::test_b",), "", "", 1, ("lora",), ("*-y/*Bert",))
    assert row.is_of(nodeid) is meant


def test_ids_as_pytest_prints_them_are_found():
    case = "test_merge_layers[lora-peft-internal-testing/tiny-random-OPTForCausalLM]"
    found = of(f"peft_tests/test_decoder_models.py::TestDecoderModels::{case}")
    assert len(found) == 1 and "merge_adapter" in found[0].reason


@pytest.mark.parametrize("paths", [["layers.0.lin0"], ["layers.0.lin0", "layers.2.lin0"]])
def test_target_modules_of_pefts_tests_become_paths(paths):
    for row in of_classes():
        recipe = row.values[0](target_modules=paths).checked_recipe()
        assert {edit.paths for edit in recipe.edits} <= {"layers.0.lin0", "layers.[02].lin0"}
    assert len(of_classes()) == len(AT_LINEARS)
