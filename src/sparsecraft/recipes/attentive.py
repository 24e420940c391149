"""The attentive gate: a router that reads what every expert gives, then one that needs not.

Paper: Krishnamurthy, Watkins, Gaertner. Improving Expert Specialization in Mixture of Experts. 2023
(arXiv:2302.14703).
Command: sparsecraft convert attentive --model smollm2 --out runs/attentive --num-experts 4
"""

from __future__ import annotations

from sparsecraft.recipe import (
    Attentive,
    Difference,
    Edit,
    FFNSpec,
    Linear,
    Normal,
    Recipe,
    RouterSpec,
    Soft,
    Stage,
    TopK,
    Zeros,
)


def attentive(
    num_experts: int = 5,
    top_k: int = 2,
    dim: int = 64,
    importance_coef: float = 0.2,
    similarity_coef: float = 0.0,
    dissimilarity_coef: float = 0.0,
    *,
    pairs: int | None = 4,
    router_std: float = 0.02,
    paths: str = "*",
) -> Recipe:
    """Copied experts under an attentive gate; then a linear top-k router over the same experts.

    Args:
        num_experts: copies per feed-forward network; all of them run in the first stage.
        top_k: experts per token from the second stage on.
        dim: width of queries and keys (paper: 32, of hidden layers as wide).
        importance_coef: weight of the importance loss (paper: 0.2 to 1.0); 0 turns it off.
        similarity_coef: weight of the loss that brings near samples to one expert (beta_s).
        dissimilarity_coef: weight of the one that takes far samples to different experts (beta_d).
        pairs: copies differ in pairs by 2^-pairs, around the dense network: equal ones would stay
            equal under this gate, whatever they are trained on. None for experts that come from
            several models (`sources`).
        router_std: standard deviation of the second router's normal initialization.
        paths: glob over the paths of the feed-forward networks.
    """
    experts = FFNSpec(num_experts=num_experts, differ=Difference(pairs=pairs))
    gate = RouterSpec(scorer=Attentive(dim=dim, query=Zeros()), reads="experts", select=Soft())
    router = RouterSpec(scorer=Linear(start=Normal(router_std)), select=TopK(top_k))
    losses = {
        "importance": importance_coef,
        "sample_similarity": similarity_coef,
        "sample_dissimilarity": dissimilarity_coef,
    }
    return Recipe(
        name="attentive",
        title="Copies of every FFN behind a gate that attends to what they give",
        paper="Krishnamurthy et al., arXiv 2302.14703, 2023",
        exact_at_start=True,
        edits=(Edit(site="ffn", paths=paths, place="replace", experts=experts, router=gate),),
        stages=_stages({name: c for name, c in losses.items() if c}, router),
    )


def _stages(losses: dict[str, float], router: RouterSpec) -> tuple[Stage, Stage]:
    """The paper trains small classifiers by Adam at 1e-3, which the second stage keeps; the first
    is `upcycling`'s, because all of a pretrained model trains."""
    experts = Stage(name="experts", trains=("all",), losses=losses, learning_rate=1e-4)
    gate = Stage(name="gate", trains=("router",), router=router, learning_rate=1e-3)
    return experts, gate
