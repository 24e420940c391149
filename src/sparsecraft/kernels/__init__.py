"""Ways to run a bank of experts. Each equals `loop`, forward and backward, and is tested so."""

from __future__ import annotations

import functools
import logging

from torch import Tensor

from sparsecraft.errors import SparsecraftError
from sparsecraft.experts.base import Experts, loop
from sparsecraft.kernels.dense import dense
from sparsecraft.kernels.grouped import are_views, grouped, why_not_grouped
from sparsecraft.routing import Routing


def merged(bank: Experts, x_TI: Tensor, routing: Routing, sums_to_one: bool = False) -> Tensor:
    """Mix the parameters first: vectors as one vector, LoRAs as one LoRA with a gated bottleneck.

    Exact because these experts are linear in their parameters and tokens; no tensor of shape
    (tokens, experts, features) is made.

    Raises:
        SparsecraftError: another kind of experts.
    """
    if not bank.merges:
        raise SparsecraftError(
            f"{type(bank).__name__} are not linear and cannot be merged before they meet a token; "
            "use dispatch 'auto'."
        )
    return bank.merged(x_TI, routing.weights_TE(), sums_to_one)


def gather(bank: Experts, x_TI: Tensor, routing: Routing, sums_to_one: bool = False) -> Tensor:
    """Only the experts in use, which split networks have in `sparsecraft.kernels.split`.

    Raises:
        SparsecraftError: any other kind of experts.
    """
    raise SparsecraftError(
        f"{type(bank).__name__} have no gather path, split experts do; use dispatch 'auto'."
    )


PATHS = {"loop": loop, "grouped": grouped, "dense": dense, "merged": merged, "gather": gather}

# On a CPU, launches cost little: all experts at once win up to about 32 tokens for 8 adapters of
# 576 x 64, and never for 8 of 2048 x 256 (two cores, float32).
CPU_DENSE_PRODUCTS = 20_000_000

log = logging.getLogger("sparsecraft")


def choose_path(bank: Experts, x_TI: Tensor, routing: Routing) -> str:
    """The path that the bank's `dispatch` takes for these tokens.

    Raises:
        SparsecraftError: `grouped` was asked for and cannot run.
    """
    if bank.runs_merged:
        return "merged"
    if bank.dispatch == "dense" and bank.two_layer(x_TI.dtype) is None:
        raise SparsecraftError(
            f"The dense path cannot run: {type(bank).__name__} has no two-layer form. "
            "Use dispatch 'auto'."
        )
    if bank.dispatch == "grouped" and (reason := why_not_grouped(bank, x_TI)):
        raise SparsecraftError(f"The grouped path cannot run: {reason}. Use dispatch 'auto'.")
    if bank.dispatch != "auto":
        return bank.dispatch
    tokens, slots = routing.indices_TK.shape
    small = tokens <= bank.dense_tokens
    if small and not x_TI.is_cuda:
        small = tokens * sum(p.numel() for p in bank.parameters()) <= CPU_DENSE_PRODUCTS
    if small or (bank.dense_tokens and slots == bank.num_experts):
        return "dense"
    reason = why_not_grouped(bank, x_TI)
    if reason is None:
        return "grouped"
    if not are_views(bank):  # for untrained copies the loop is the plan, not news
        _say_once(f"Experts run in a loop, one at a time: {reason}.")
    return "loop"


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)
