"""The language of methods: edits, experts, routers, stages, and their JSON.

A recipe says which layers stand where, what their experts and routers are, and what trains.
It is data. It knows no tensor, no model and no paper, and imports no torch; `sparsecraft.recipes`
says the published methods in it.
"""

from sparsecraft.recipe.balancing import Bias, ByDropRate, BySparsity, Capacity, Hold
from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.experts import (
    AdapterSpec,
    AttentionSpec,
    Difference,
    FFNLoRASpec,
    FFNSpec,
    LoRASpec,
    MPOSpec,
    SplitSpec,
    VectorSpec,
)
from sparsecraft.recipe.heterogeneous import HeterogeneousSpec
from sparsecraft.recipe.recipe import ExpansionSpec, Quantize, Recipe, check_variant
from sparsecraft.recipe.residual import Residual
from sparsecraft.recipe.routers import GateSpec, RouterSpec
from sparsecraft.recipe.scorers import (
    MLP,
    Analytic,
    Attentive,
    Domain,
    Hidden,
    KaimingUniform,
    KMeans,
    Linear,
    LinearParts,
    Norm,
    Normal,
    Oracle,
    Ridge,
    Similarity,
    Uniform,
    Zeros,
)
from sparsecraft.recipe.selections import (
    Above,
    Head,
    Relative,
    ReLU,
    Sample,
    Sentence,
    Sequence,
    Share,
    Slots,
    Soft,
    Token,
    TopK,
)
from sparsecraft.recipe.stages import Deal, Fit, Stage

__all__ = [
    "MLP", "Above", "AdapterSpec", "Analytic", "AttentionSpec", "Attentive", "Bias", "ByDropRate",
    "BySparsity", "Capacity", "Deal", "Difference", "Domain", "Edit", "ExpansionSpec",
    "FFNLoRASpec", "FFNSpec", "Fit", "GateSpec", "Head", "HeterogeneousSpec", "Hidden", "Hold",
    "KMeans", "KaimingUniform", "Linear", "LinearParts", "LoRASpec", "MPOSpec", "Norm",
    "Normal", "Oracle", "Quantize", "ReLU", "Recipe", "Relative", "Residual", "Ridge",
    "RouterSpec", "Sample", "Sentence", "Sequence", "Share", "Similarity", "Slots", "Soft",
    "SplitSpec", "Stage", "Token", "TopK", "Uniform", "VectorSpec", "Zeros", "check_variant",
]  # fmt: skip
