"""The two tables that the suite multiplies: tiny dense models by family, and recipes.

What tests import from here; `families`, `formulas` and `recipes` hold it.
"""

from tests.cases.families import (
    BERT_LIKE,
    FAMILIES,
    LAYERS,
    LLAMA_LIKE,
    POSITIONS,
    VOCAB,
    D,
    F,
    batch,
    dense,
    layers,
    logits,
    moved,
    randomize_new,
    t5,
)
from tests.cases.formulas import (
    EMBEDDING,
    E,
    K,
    R,
)
from tests.cases.recipes import (
    RECIPES,
    RUNNING,
    SPLITS,
    choosy,
)

__all__ = [
    "BERT_LIKE",
    "EMBEDDING",
    "FAMILIES",
    "LAYERS",
    "LLAMA_LIKE",
    "POSITIONS",
    "RECIPES",
    "RUNNING",
    "SPLITS",
    "VOCAB",
    "D",
    "E",
    "F",
    "K",
    "R",
    "batch",
    "choosy",
    "dense",
    "layers",
    "logits",
    "moved",
    "randomize_new",
    "t5",
]
