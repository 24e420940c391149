"""The router that a recipe's router describes."""

from __future__ import annotations

from functools import partial

from torch import nn

from sparsecraft.moe.routers.domain import DomainScorer
from sparsecraft.moe.routers.router import Router
from sparsecraft.moe.routers.scorers import LinearScorer
from sparsecraft.moe.routers.selectors import Sample, soft, top_k
from sparsecraft.recipe.routers import RouterSpec

SCORERS = {"linear": LinearScorer, "domain": DomainScorer}


def build_router(
    spec: RouterSpec, width: int, num_experts: int, *, device=None, dtype=None
) -> Router:
    """The router that `spec` describes, for tokens of `width` features; of whole experts, that is:
    the parts of a split network have a `Gate`."""
    scorer = SCORERS[spec.scorer](width, num_experts, spec, device=device, dtype=dtype)
    match spec.select:
        case "top_k":
            select = partial(top_k, k=spec.top_k, renormalize=spec.renormalize)
        case "sample":
            select = Sample()
        case _:
            select = soft  # slots are combined by the same softmax
    gate = _base_gate(width, device, dtype) if spec.gates_base else None
    return Router(scorer, spec, select, gate)


def _base_gate(width: int, device, dtype) -> nn.Linear:
    gate = nn.Linear(width, 1, bias=False, device=device, dtype=dtype)
    nn.init.zeros_(gate.weight)
    return gate
