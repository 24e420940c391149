"""What the expressions in format1/recipes.json mean now.

Most are still Python as they were written. Where routers, fits, dealing or quantization have other
words since, `ODD` says by hand what the recipe is in the types of today.
"""

from __future__ import annotations

from typing import Any

import sparsecraft as sc
from sparsecraft import recipe as language
from sparsecraft.recipe import (
    MLP,
    Above,
    AdapterSpec,
    Analytic,
    Deal,
    Difference,
    Domain,
    Edit,
    FFNSpec,
    Fit,
    GateSpec,
    Head,
    Hidden,
    KaimingUniform,
    KMeans,
    Linear,
    LinearParts,
    LoRASpec,
    Norm,
    Normal,
    Oracle,
    Quantize,
    Recipe,
    Relative,
    RouterSpec,
    Sample,
    Sentence,
    Sequence,
    Share,
    Similarity,
    Slots,
    Soft,
    SplitSpec,
    Stage,
    TopK,
    Uniform,
    VectorSpec,
    Zeros,
)  # fmt: skip
from tests.cases import RECIPES

WHOLE, SPLIT = FFNSpec(num_experts=4), SplitSpec(num_experts=4)


def odd(*edits: Edit, stages: tuple = (Stage(),), **more: Any) -> Recipe:
    about = {"name": "odd", "title": "odd", "paper": "none", "exact_at_start": False}
    return Recipe(**about, edits=edits, stages=stages, **more)


def routed(experts: Any = WHOLE, edit: dict[str, Any] | None = None, **router: Any) -> Recipe:
    return odd(Edit(experts=experts, router=RouterSpec(**router), **(edit or {})))


def gated(experts: Any = SPLIT, edit: dict[str, Any] | None = None, **gate: Any) -> Recipe:
    return odd(Edit(experts=experts, router=GateSpec(**gate), **(edit or {})))


def staged(*stages: Stage | Fit) -> Recipe:
    return odd(Edit(experts=WHOLE, router=RouterSpec()), stages=stages)


BESIDE = {"place": "beside"}
STARTS = {
    "kaiming_uniform": KaimingUniform(), "normal": Normal(0.05), "uniform": Uniform(0.05),
    "zeros": Zeros(), "hidden": Hidden(0.05), "kmeans": KMeans(0.05),
}  # fmt: skip
PARTITIONS = (
    "contiguous", "random", "kmeans", "coactivation", "coactivation_released", "activation",
    "activation_released",
)  # fmt: skip
ODD = {
    "select_share": gated(
        scorer=Norm(hidden=8), select=Share(0.9), weighting="one", target="output_norm"
    ),
    "select_relative": gated(
        scorer=LinearParts(bias=0.5), squash="sigmoid", select=Relative(0.25), weighting="score",
        target="intermediate_norm",
    ),
    "select_threshold": gated(squash="softmax", select=Above(0.25), target="deviation"),
    "select_threshold_above_one": gated(
        squash="abs", select=Above(3.5), target="squared_deviation"
    ),
    "select_sample": routed(select=Sample(first_soft=True)),
    "select_soft": routed(select=Soft(), temperature=0.5),
    "select_slots": routed(
        LoRASpec(num_experts=4), BESIDE | {"site": "linear"}, select=Slots(),
        scorer=Linear(start=Normal()),
    ),
    "scorer_mlp": gated(scorer=MLP(hidden=12), weighting="scaled", select=TopK(2)),
    "scorer_norm": gated(scorer=Norm(hidden=8, bias=0.0)),
    "scorer_similarity": gated(scorer=Similarity(), weighting="straight_through"),
    "scorer_oracle": gated(scorer=Oracle(), select=TopK(1)),
    "scorer_analytic": gated(
        scorer=Analytic(normalize=True), squash="abs", shared=1, select=TopK(2), weighting="gain"
    ),
    "scorer_domain": routed(
        WHOLE, BESIDE, scorer=Domain(encoder="owner/encoder", dim=24),
        select=TopK(1, renormalize=False),
    ),
    "encoder_self": routed(WHOLE, BESIDE, scorer=Domain(encoder="self", dim=32)),
    **{f"weighting_{w}": gated(weighting=w, select=TopK(2))
       for w in ("one", "scaled", "straight_through", "score", "gain")},
    **{f"init_{name}": routed(scorer=Linear(start=start)) for name, start in STARTS.items()},
    "init_repeat": routed(scorer=Linear(start=Normal(), repeat=2)),
    "extended": routed(scorer=Linear(extended=1)),
    "decides_head": routed(
        VectorSpec(num_experts=4), {"place": "after", "site": "key"}, decides=Head(),
        reads="output",
    ),
    "decides_sequence": routed(decides=Sequence()),
    "decides_sentence": routed(decides=Sentence(encoder="some/folder", dim=24)),
    "temperature": routed(temperature=2.5, select=TopK(3)),
    **{f"split_{p}": gated(SplitSpec(num_experts=4, partition=p, markers=3)) for p in PARTITIONS},
    "split_compensates": gated(SplitSpec(num_experts=4, compensate=True)),
    "split_imitates": gated(
        SplitSpec(num_experts=4, compensate=False, flops_factor=0.5),
        {"place": "imitate", "site": "attention_linear"},
    ),
    "ffn_redrawn": routed(
        FFNSpec(
            num_experts=4, differ=Difference(redraw=0.5, redraw_apart=True, permute=True)
        )
    ),
    "ffn_noise": routed(
        FFNSpec(num_experts=4, differ=Difference(noise_std=0.1, noise_share=0.5))
    ),
    "fit_routers": staged(
        Fit(loss="bce", tokens=512, epochs=3, batch_tokens=64, learning_rate=0.01, holdout=0.2)
    ),
    "fit_imitations": staged(Fit(name="distill", what="imitations", sparsity=0.001, dropout=0.05)),
    "fit_nothing": staged(Fit(name="build", loss="none")),
    "buckets": staged(
        Stage(
            name="router", deal=Deal(sample=0.5, at_least=2, at_most=9),
            losses={"own_expert": 1.0}, epochs=4.0,
        )
    ),
    "quantized": odd(
        Edit(site="linear", place="beside", experts=LoRASpec(rank=2)), backbone=Quantize("nf4"),
        variant="mine",
    ),
    "reads_output": routed(
        AdapterSpec(num_experts=4, dim=8), {"place": "after"}, reads="output"
    ),
}  # fmt: skip


def recipe_of(name: str, expression: str) -> Recipe:
    """The recipe of one file in format1/recipes, as it is made now."""
    if name.removeprefix("odd__") in ODD:
        return ODD[name.removeprefix("odd__")]
    names = {name: getattr(language, name) for name in language.__all__}
    return eval(expression, names | {"sc": sc, "RECIPES": RECIPES})
