"""Routers by name."""

from functools import partial

from sparsecraft.recipe import RouterSpec
from sparsecraft.routers.base import Router
from sparsecraft.routers.scorers import LinearScorer
from sparsecraft.routers.selectors import soft, top_k

SCORERS = {"linear": LinearScorer}


def build_router(
    spec: RouterSpec, width: int, num_experts: int, *, device=None, dtype=None
) -> Router:
    """The router that `spec` describes, for tokens of `width` features."""
    scorer = SCORERS[spec.scorer](width, num_experts, spec, device=device, dtype=dtype)
    select = (
        partial(top_k, k=spec.top_k, renormalize=spec.renormalize)
        if spec.select == "top_k"
        else soft  # slots are combined by the same softmax
    )
    return Router(scorer, spec, select)


__all__ = ["SCORERS", "Router", "build_router", "soft", "top_k"]
