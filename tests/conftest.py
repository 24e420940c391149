"""One environment for every test: no network, one thread, a fixed seed, our warnings are errors."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import cases

torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Leave out the families that a recipe does not work on."""

    def fits(item) -> bool:
        found = getattr(item, "callspec", None) and item.callspec.params
        recipe = found and (cases.RECIPES | cases.RUNNING).get(found.get("recipe"))
        return not recipe or found.get("family", "llama") in recipe.families

    left_out = [item for item in items if not fits(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if fits(item)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
