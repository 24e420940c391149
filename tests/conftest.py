"""One environment for every test: no network, one thread, a fixed seed, our warnings are errors."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests import cases

torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Leave out the families that a recipe does not work on."""

    known = cases.RECIPES | cases.RUNNING

    def fits(item) -> bool:
        found = item.callspec.params if hasattr(item, "callspec") else {}
        name = found.get("recipe")
        recipe = known.get(name) if isinstance(name, str) else None
        return recipe is None or found.get("family", "llama") in recipe.families

    config.hook.pytest_deselected(items=[item for item in items if not fits(item)])
    items[:] = [item for item in items if fits(item)]


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """The tests write thousands of folders, and no power fails meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsecraft.checkpoint.renames._fsync", lambda path: None)
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
