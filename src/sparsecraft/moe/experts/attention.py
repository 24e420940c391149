"""Whole attentions as experts, all mixed by the token (BAM, Zhang et al. 2024, section 3.1).

    y_t = sum_j g_j(x_t) MHA_j(x)_t

The heads of all experts run in one pass of the model's own attention, as if it had N times as
many: its kernels, masks, rotary embeddings and cache serve unchanged. What differs between
experts is the output projection, each expert's own, weighted by the gates.

Shapes: B sequences, S positions, D width, N experts, G key-value heads, R query heads of each, d
width of a head, O output features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.dense.donors import Attention
from sparsecraft.dense.sites import Site
from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.experts.base import CopiedExperts
from sparsecraft.moe.experts.stacked import copies, with_one_more, without
from sparsecraft.moe.routing import Routing
from sparsecraft.moe.scopes import PerThread
from sparsecraft.recipe.edits import Edit, Place
from sparsecraft.recipe.experts import AttentionSpec


class AttentionExperts(CopiedExperts):
    """N attentions of the donor's own form.

    Norms of queries and keys, where a family has them, are one for all experts.

    Attributes:
        attention: the donor's module with all experts' heads, queries in the order of the key-value
            heads that they read.
    """

    whole = True

    def __init__(self, spec: AttentionSpec, donor: Attention):
        super().__init__()
        N, form = spec.num_experts, donor.form
        self.num_experts, self.out_features = N, donor.out_features
        self.kv, self.form = spec.kv, form
        dense = donor.module
        self.attention = copy.copy(dense)
        # All but its projections is copied: the dense module must not train with the experts.
        self.attention._parameters = copy.deepcopy(dense._parameters)
        self.attention._buffers = copy.deepcopy(dense._buffers)
        self.attention._modules = copy.deepcopy(
            {name: m for name, m in dense._modules.items() if name not in form.parts()}
        )
        kv_heads = dense.get_submodule(form.key).out_features // dense.head_dim
        # Key-value heads that all experts read, and how many experts have their own.
        common, own = (kv_heads, 1) if spec.kv == "shared" else (None, N)
        self.attention.num_key_value_groups = dense.num_key_value_groups * N // own
        parts = {
            form.query: Projections(dense.get_submodule(form.query), N, common),
            form.key: Projections(dense.get_submodule(form.key), own),
            form.value: Projections(dense.get_submodule(form.value), own),
            form.output: Outputs(dense.get_submodule(form.output), N, common),
        }
        for name, part in parts.items():
            self.attention.add_module(name, part)

    @classmethod
    def build(
        cls,
        spec: AttentionSpec,
        donor: Attention,
        site: Site,
        place: Place,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        return cls(spec, donor)

    def mixed(self, x_BSD: Tensor, routing: Routing, *args, **kwargs) -> tuple:
        """What the dense attention returns, mixed by the routing's weights.

        Raises:
            SparsecraftError: the cache has room for the dense attention's key-value heads alone.
        """
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # newer transformers, older
        if type(cache).__name__ == "PagedAttentionCache" and self.kv != "shared":
            raise SparsecraftError(
                "generate_batch (continuous batching) makes a cache for the dense model's "
                "key-value heads, and each expert of this attention has its own: call generate, "
                "or convert with kv='shared'."
            )
        output = self.attention.get_submodule(self.form.output)
        under_way = output.under_way.own
        under_way.gates_BSN = routing.weights_TE().view(*x_BSD.shape[:-1], -1)
        try:
            return self.attention(x_BSD, *args, **kwargs)
        finally:
            under_way.gates_BSN = None

    def expert(self, e: int, x: Tensor) -> Tensor:
        raise SparsecraftError(
            "An attention expert reads a whole sequence with its mask and cache, and does not run "
            "on tokens apart; call the layer."
        )

    @torch.no_grad()
    def put(self, e: int, donor: Attention) -> None:
        """Let expert `e` be the attention of `donor`: queries and outputs, and keys and values of
        its own."""
        for name, part in self._own():
            part.put(e, donor.module.get_submodule(name))

    @torch.no_grad()
    def append(self, donor: Attention) -> None:
        longer = [
            (part, name, with_one_more(parameter, getattr(donor.module.get_submodule(path), name)))
            for path, part in self._own()
            for name, parameter in part.named_parameters()
        ]
        for part, name, parameter in longer:  # all of them, or none
            setattr(part, name, parameter)
        self._recount(self.num_experts + 1)

    @torch.no_grad()
    def remove(self, e: int) -> None:
        for _, part in self._own():
            part.remove(e)
        self._recount(self.num_experts - 1)

    def why_no_fold(self, edit: Edit, site: Site, single: bool) -> str:
        return "a sum of several attentions is none with as many heads"

    def _remade(self, change: Callable[[Tensor], Tensor]) -> Self:
        bank = super()._remade(change)
        bank.attention = copy.deepcopy(self.attention)
        for _, part in bank._own():
            for name, parameter in [*part.named_parameters()]:
                setattr(part, name, bank._changed(name, parameter, change))
        bank.num_experts = self.num_experts  # which the grouping of heads is counted from
        bank._recount(1)
        return bank

    def _recount(self, num_experts: int) -> None:
        if self.kv == "shared":
            groups = self.attention.num_key_value_groups // self.num_experts
            self.attention.num_key_value_groups = groups * num_experts
        self.num_experts = num_experts

    def shared_parts(self) -> dict[str, nn.Parameter]:
        """Parameters that all experts share, by their name in the dense attention."""
        own = {name for name, _ in self._own()}
        named = self.attention.named_parameters()
        return {name: p for name, p in named if name.rpartition(".")[0] not in own}

    def _own(self) -> list[tuple[str, Stack]]:
        """What each expert has its own of."""
        shared = (self.form.key, self.form.value) if self.kv == "shared" else ()
        names = [name for name in self.form.parts() if name not in shared]
        return [(name, self.attention.get_submodule(name)) for name in names]


class Stack(nn.Module):
    """The same Linear of `count` experts.

    Args:
        common: key-value heads that all experts share: the heads then come in their order, those
            of all experts that read the first one first.
    """

    def __init__(self, dense: nn.Linear, count: int, common: int | None = None):
        super().__init__()
        self.common = common
        self.weight = copies(dense.weight, count)
        self.bias = None if dense.bias is None else copies(dense.bias, count)

    def put(self, e: int, dense: nn.Linear) -> None:
        self.weight[e].copy_(dense.weight)
        if self.bias is not None:
            self.bias[e].copy_(dense.bias)

    def remove(self, e: int) -> None:
        for name, parameter in [*self.named_parameters()]:
            setattr(self, name, without(parameter, e))


class Projections(Stack):
    """One after the other: x (..., D) -> (..., count O)."""

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.flatten()
        y = F.linear(x, self.weight.flatten(0, 1), bias)
        if self.common is None:
            return y
        # (N, G, R d) -> (G, N, R d)
        return y.unflatten(-1, (len(self.weight), self.common, -1)).transpose(-3, -2).flatten(-3)


class Gates:
    """The weights of all experts that a pass gives its output projection, (B, S, N)."""

    gates_BSN: Tensor | None = None


class Outputs(Stack):
    """sum_j gate_j (W_j heads_j + b_j): heads of all experts (..., N I) -> (..., O).

    Attributes:
        under_way: the gates of the pass that is under way in a thread.
    """

    def __init__(self, dense: nn.Linear, count: int, common: int | None = None):
        super().__init__(dense, count, common)
        self.under_way = PerThread(Gates)

    def forward(self, heads: Tensor) -> Tensor:
        N = len(self.weight)
        if self.common is None:
            heads_N = heads.unflatten(-1, (N, -1)).unbind(-2)
        else:
            heads_N = heads.unflatten(-1, (self.common, N, -1)).unbind(-2)
            heads_N = [part.flatten(-2) for part in heads_N]
        gates = self.under_way.own.gates_BSN.to(heads.dtype)
        total = None
        for j, part in enumerate(heads_N):
            bias = None if self.bias is None else self.bias[j]
            y = F.linear(part, self.weight[j], bias) * gates[..., j, None]
            total = y if total is None else total + y
        return total
