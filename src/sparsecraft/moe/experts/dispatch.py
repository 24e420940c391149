"""Ways to run a bank of experts. Each equals `loop`, forward and backward, and is tested so."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsecraft.errors import SparsecraftError
from sparsecraft.kernels import dense as dense_kernel
from sparsecraft.kernels import few as few_kernel
from sparsecraft.kernels import grouped as grouped_kernel
from sparsecraft.kernels import one_token as one_token_kernel
from sparsecraft.kernels.device import compute_dtype, is_handful, is_transformed
from sparsecraft.moe.routing import Routing

if TYPE_CHECKING:
    from sparsecraft.kernels.two_layer import TwoLayer
    from sparsecraft.moe.experts.base import Experts

log = logging.getLogger("sparsecraft")

# On a CPU, launches cost little: all experts at once win up to about 32 tokens for 8 adapters of
# 576 x 64, and never for 8 of 2048 x 256 (two cores, float32).
CPU_DENSE_PRODUCTS = 20_000_000


def loop(bank: Experts, x_TI: Tensor, routing: Routing) -> Tensor:
    """The specification: one expert at a time, on the tokens that chose it.

    Where the weights are known to sum to one, sum_k w_k (x + A_k) is computed as
    x + sum_k w_k ((x + A_k) - x), so that x passes through without rounding.
    """
    passes = bank.residual and routing.sums_to_one
    y_TO = x_TI if passes else x_TI.new_zeros(x_TI.shape[0], bank.out_features)
    for e in range(bank.num_experts):
        tokens, slots = torch.where(routing.indices_TK == e)
        if tokens.numel() == 0:
            continue
        weight = routing.weights_TK[tokens, slots, None].to(x_TI.dtype)
        x = x_TI[tokens]
        y = bank.expert(e, x) - x if passes else bank.expert(e, x)
        y_TO = y_TO.index_add(0, tokens, (y * weight).to(y_TO.dtype))
    return y_TO


def by_expert(bank: Experts, x_TI: Tensor, routing: Routing) -> Tensor:
    """One expert at a time, on tokens sorted by expert: it waits for the device once, to learn
    where each expert's tokens end, and gathers and adds in one launch each."""
    x_TI = x_TI.to(compute_dtype(x_TI))
    passes = x_TI if bank.residual and routing.sums_to_one else None
    return grouped_kernel.by_expert(
        bank.all_experts(), x_TI, routing.weights_TK, routing.indices_TK, passes, bank.out_features
    )


def grouped(bank: Experts, x_TI: Tensor, routing: Routing) -> Tensor:
    """Tokens sorted by expert, two grouped products."""
    x_TI = x_TI.to(compute_dtype(x_TI))
    net = bank.two_layer(x_TI.dtype)
    decided = routing.weights_TK, routing.indices_TK, routing.sums_to_one, routing.empty
    return grouped_kernel.grouped(net, x_TI, *decided)


def one_token(bank: Experts, x_TI: Tensor, routing: Routing) -> Tensor:
    """The experts of one token, each by itself."""
    decided = routing.weights_TK, routing.indices_TK, routing.sums_to_one
    return one_token_kernel.one_token(bank.two_layer(x_TI.dtype), x_TI, *decided)


def few(bank: Experts, x_TI: Tensor, routing: Routing) -> Tensor:
    """A handful of tokens: each slot by the matrices of its own expert."""
    decided = routing.weights_TK, routing.indices_TK, routing.sums_to_one
    return few_kernel.networks(bank.two_layer(x_TI.dtype), x_TI, *decided)


def dense(bank: Experts, x_TI: Tensor, routing: Routing) -> Tensor:
    """All experts on all tokens, mixed by a mostly zero weight."""
    x_TI = x_TI.to(compute_dtype(x_TI))
    net = bank.two_layer(x_TI.dtype)
    return dense_kernel.dense(net, x_TI, routing.weights_TE(), routing.sums_to_one)


def merged(bank: Experts, x_TI: Tensor, routing: Routing) -> Tensor:
    """Mix the parameters first: vectors as one vector, LoRAs as one LoRA with a gated bottleneck.

    Exact because these experts are linear in their parameters and tokens; no tensor of shape
    (tokens, experts, features) is made.

    Raises:
        SparsecraftError: another kind of experts.
    """
    return bank.merged(x_TI, routing)


PATHS = {
    "loop": loop,
    "by_expert": by_expert,
    "grouped": grouped,
    "dense": dense,
    "merged": merged,
}
WAYS = PATHS | {"one_token": one_token, "few": few}  # no `dispatch`: there may be more tokens


def why_not_grouped(bank: Experts, x_TI: Tensor) -> str | None:
    """The reason why `grouped` cannot run this bank on these tokens, or None."""
    # In the bank's own dtype: only shapes are read here, and a cast would copy the bank.
    net = bank.two_layer(next(bank.parameters()).dtype)
    if net is None:
        return f"{type(bank).__name__} has no two-layer form"
    return grouped_kernel.why_not_grouped(net, x_TI)


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
    if bank.dispatch == "gather":
        raise SparsecraftError(
            f"{type(bank).__name__} have no gather path, split experts do; use dispatch 'auto'."
        )
    if bank.dispatch != "auto":
        return bank.dispatch
    tokens, slots = routing.indices_TK.shape
    if not tokens and bank.two_layer(x_TI.dtype) is None:
        return "loop"
    if one_token_kernel.is_alone(x_TI, slots) and _runs_alone(bank, x_TI):
        return "one_token"
    if is_handful(x_TI) and _runs_few(bank, x_TI, slots):
        return "few"
    small = tokens <= bank.dense_tokens
    if small and not x_TI.is_cuda:
        small = tokens * sum(p.numel() for p in bank.parameters()) <= CPU_DENSE_PRODUCTS
    if small or (bank.dense_tokens and slots == bank.num_experts):
        return "dense"
    reason = why_not_grouped(bank, x_TI)
    if reason is None:
        return "grouped"
    # A loop over the tokens of each expert has shapes that no graph can hold.
    if torch.compiler.is_compiling() and bank.two_layer(x_TI.dtype) is not None:
        return "dense"
    if bank.two_layer(x_TI.dtype) is not None:  # others have no faster path
        _say_once(f"Experts run in a loop, one at a time: {reason}.")
    # On a CPU, sorting costs more than the waiting that it saves.
    waits = x_TI.is_cuda and not torch.compiler.is_compiling() and not is_transformed()
    return "by_expert" if waits else "loop"


def _runs_alone(bank: Experts, x_TI: Tensor) -> bool:
    """Whether one expert of the bank is no more than two products of x's type and no dropout."""
    net = _in_own_type(bank, x_TI)
    return net is not None and not net.input_dropout and not net.output_dropout


def _runs_few(bank: Experts, x_TI: Tensor, slots: int) -> bool:
    net = _in_own_type(bank, x_TI)
    return net is not None and few_kernel.fits(net, x_TI, slots)


def _in_own_type(bank: Experts, x_TI: Tensor) -> TwoLayer | None:
    """The two-layer form of a bank of x's type: in another, a cast would copy the bank."""
    dtype = next(bank.parameters()).dtype
    return bank.two_layer(dtype) if dtype == x_TI.dtype else None


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)
