"""MoV: every token scales keys, values and FFN activations by its own mixture of vectors.

Paper: Zadouri, Ustun, Ahmadian, Ermis, Locatelli, Hooker. Pushing Mixture of Experts to the Limit:
Extremely Parameter Efficient MoE for Instruction Tuning. ICLR 2024.
Command: sparsecraft convert mov --model smollm2 --out runs/mov --num-experts 10
"""

from __future__ import annotations

from typing import Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe import (
    Edit,
    Head,
    Linear,
    Normal,
    Recipe,
    RouterSpec,
    Sentence,
    Sequence,
    Soft,
    Stage,
    Token,
    TopK,
    VectorSpec,
    check_variant,
)

VARIANTS = ("paper", "released", "tuned")
PAPER = "Zadouri et al., ICLR 2024 (MoV / MoLORA)"


def mov(
    num_experts: int = 10,
    variant: Literal["paper", "released", "tuned"] = "paper",
    top_k: int | None = None,
    renormalize: bool | None = None,
    router: Literal["token", "sequence", "sentence"] = "token",
    noise: float = 0.0,
    paths: str = "*",
) -> Recipe:
    """Mixtures of (IA)3 vectors on keys, values and the FFN's intermediate activation.

    Args:
        num_experts: vectors at each site (paper: 10, 30, 60).
        variant: `paper` routes on the input of the projection that is scaled; `released` as the
            published code does, on the scaled activation itself, for each attention head apart,
            and with top-k weights that do not sum to one; `tuned` is `paper` with AdamW and the
            learning rates that were best in our benchmark.
        top_k: experts per token; None mixes all of them softly, as the paper recommends.
        renormalize: whether the weights of the top k are scaled to sum to one; default yes, and
            no in `released`. Without it the model does not start as the dense one.
        router: decides for each token, for the mean of a sequence (encoders), or for a frozen
            sentence embedding, the paper's ablation.
        noise: standard deviation of noise on the vectors, which start at one; with it experts
            differ from the first step, and the model does not start as the dense one.
        paths: glob over the paths of the scaled modules.
    """
    check_variant(variant, VARIANTS)
    released = variant == "released"
    if released and router != "token":
        raise RecipeError(f"The released code has no router by {router}; use variant='paper'.")
    route = {
        "scorer": Linear(start=Normal()),
        "select": selected(top_k, released, renormalize),
        "reads": "output" if released else "input",
    }
    spec = RouterSpec(**route, decides=decided(router))
    attention = RouterSpec(**route, decides=Head()) if released else spec
    intermediate = "activation" if released else "intermediate"
    vectors = VectorSpec(num_experts=num_experts, init_std=noise)
    return Recipe(
        name="mov",
        title="Mixture of vectors on keys, values and FFN activations",
        paper=PAPER,
        variant=variant,
        exact_at_start=spec.sums_to_one and not noise,
        edits=tuple(
            Edit(site=site, paths=paths, place="after", experts=vectors, router=chosen)
            for site, chosen in (("key", attention), ("value", attention), (intermediate, spec))
        ),
        stages=(tuned_stage(5e-3, 4e-3) if variant == "tuned" else cohere_stage(),),
    )


def selected(top_k: int | None, released: bool, renormalize: bool | None) -> Soft | TopK:
    """All experts softly, or the k best, whose weights the released code does not scale."""
    if top_k is None:
        return Soft()
    return TopK(top_k, renormalize=not released if renormalize is None else renormalize)


def decided(router: str) -> Token | Sequence | Sentence:
    known = {"token": Token(), "sequence": Sequence(), "sentence": Sentence()}
    if router not in known:
        raise RecipeError(f"router is {router!r}; it must be {' or '.join(known)}.")
    return known[router]


def cohere_stage(trains: tuple[str, ...] = ("experts", "router")) -> Stage:
    """The training of the paper's scripts, for MoV, MoLORA and their dense baselines alike."""
    return Stage(
        trains=trains,
        optimizer="adafactor",
        learning_rate=3e-4,
        schedule="constant",
        warmup_ratio=0.0,
        max_grad_norm=0.0,
        batch_size=32,
        max_length=1024,
    )


def tuned_stage(
    learning_rate: float,
    router_learning_rate: float | None = None,
    trains: tuple[str, ...] = ("experts", "router"),
) -> Stage:
    """AdamW with linear decay, at the learning rates of benchmarks/cohere/README.md."""
    return Stage(
        trains=trains,
        learning_rate=learning_rate,
        router_learning_rate=router_learning_rate,
        schedule="linear",
        batch_size=32,
        max_length=1024,
    )
