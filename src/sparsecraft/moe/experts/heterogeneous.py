"""Feed-forward experts beside zero-computation experts (MoE++, Jin et al. 2025, section 3.1).

Shapes: T tokens, K slots per token, E experts of all kinds, F of them feed-forward networks, C
constant ones; D width.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from sparsecraft.dense.donors import FFN
from sparsecraft.dense.sites import Site
from sparsecraft.kernels.projections import float32_product
from sparsecraft.moe.experts.base import Experts
from sparsecraft.moe.experts.ffn import FFNExperts
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.edits import Edit, Place
from sparsecraft.recipe.experts import FFNSpec
from sparsecraft.recipe.heterogeneous import HeterogeneousSpec


class HeterogeneousExperts(Experts):
    """F copies of the dense network, then constant experts, copies of the token, and zeros.

    What goes to a zero-computation expert is no token of the networks': all of those together are
    one multiple of the token, and a sum of constants.

    Attributes:
        counts: how many are networks, constant experts, copies and zeros.
        load: part of all slots that each is meant to have.
        shares_zeros: the weight of zero experts goes to a token's others.
        networks: the bank of the feed-forward experts.
        mix: W of the constant experts, (2 C, D), whose softmax over pairs is a_1, a_2; None if C is
            zero.
        constants: v of the constant experts, (C, D); the same.
    """

    def __init__(
        self, spec: HeterogeneousSpec, donor: FFN, *, device=None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.num_experts, self.out_features = spec.num_experts, donor.width
        self.counts = spec.networks, spec.constant, spec.copy, spec.zero
        self.load, self.shares_zeros = spec.load, spec.zero_weight == "shared"
        self.networks = FFNExperts(FFNSpec(num_experts=spec.networks), donor, device=device)
        # A constant expert starts as half of the token: a_1 = a_2 = 1 / 2 and v = 0.
        for name, rows in {"mix": 2 * spec.constant, "constants": spec.constant}.items():
            zeros = torch.zeros(rows, donor.width, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(zeros) if rows else None)

    @property
    def dispatch(self) -> str:
        """That of the networks."""
        return self.networks.dispatch

    @dispatch.setter
    def dispatch(self, path: str) -> None:
        self.networks.dispatch = path

    @classmethod
    def build(
        cls,
        spec: HeterogeneousSpec,
        donor: FFN,
        site: Site,
        place: Place,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        return cls(spec, donor, device=device, dtype=dtype)

    # -------------------------------------------------------------------------------- computation

    def expert(self, e: int, x: Tensor) -> Tensor:
        networks, constant, copies, _ = self.counts
        own = e - networks
        if own < 0:
            return self.networks.expert(e, x)
        if own < constant:
            a_T2 = self._shares(x)[:, own]
            return a_T2[:, :1] * x + a_T2[:, 1:] * self.constants[own].to(x.dtype)
        return x if own < constant + copies else torch.zeros_like(x)

    def mixed(self, x_TD: Tensor, routing: Routing | None = None) -> Tensor:
        if routing is None:
            return self.expert(0, x_TD)
        if self.shares_zeros:
            routing = self._without_zeros(routing)
        y_TD = self.networks(x_TD, routing.of_first(self.counts[0]))
        return y_TD + self._free(x_TD, routing).to(y_TD.dtype)

    def _free(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """What the zero-computation experts add."""
        weights_TE = routing.weights_TE().to(x_TD.dtype)
        _, of_constants_TC, of_copies_TC, _ = weights_TE.split(self.counts, dim=-1)
        times_T1 = of_copies_TC.sum(-1, keepdim=True)
        if self.constants is None:
            return times_T1 * x_TD
        parts_TC2 = of_constants_TC[..., None] * self._shares(x_TD)
        times_T1 = times_T1 + parts_TC2[..., 0].sum(-1, keepdim=True)
        return times_T1 * x_TD + parts_TC2[..., 1] @ self.constants.to(x_TD.dtype)

    def _shares(self, x_TD: Tensor) -> Tensor:
        """a_1 and a_2 of every constant expert, (T, C, 2)."""
        logits_TC2 = float32_product(x_TD, self.mix).unflatten(-1, (-1, 2))
        return logits_TC2.softmax(-1).to(x_TD.dtype)

    def _without_zeros(self, routing: Routing) -> Routing:
        """The weights of each token's other experts, which sum to one."""
        first = self.num_experts - self.counts[3]
        kept_TK = routing.indices_TK < first
        rest_TK = routing.weights_TK * kept_TK
        # A token that has zero experts alone has nothing to give its weight to.
        left_T1 = rest_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(rest_TK.dtype).tiny)
        return replace(routing, weights_TK=rest_TK / left_T1)

    # --------------------------------------------------------------------------------------- cost

    def active(self, slots: float) -> int:
        """The networks take their share of the slots where all experts have theirs."""
        total = sum(p.numel() for p in self.parameters())
        own = sum(p.numel() for p in self.networks.parameters())
        return total - own + self.networks.active(self._of_networks(slots))

    def biases(self, slots: float) -> int:
        constants = 0 if self.constants is None else self.constants.numel()
        return constants + self.networks.biases(self._of_networks(slots))

    def _of_networks(self, slots: float) -> float:
        networks = self.counts[0]
        whole = slots >= self.num_experts
        return networks if whole else min(slots * sum(self.load[:networks]), networks)

    # ------------------------------------------------------------------------ fewer experts of them

    def only(self, e: int) -> Self:
        e %= self.num_experts
        ends = [sum(self.counts[: n + 1]) for n in range(len(self.counts))]
        kind = next(n for n, end in enumerate(ends) if e < end)
        own = e - (ends[kind] - self.counts[kind])
        bank = copy.copy(self)
        bank.num_experts, bank.load = 1, (1.0,)
        bank.counts = tuple(int(n == kind) for n in range(len(self.counts)))
        bank._modules = {"networks": self.networks.only(own if kind == 0 else 0)}
        bank._parameters = {"mix": None, "constants": None}
        if kind == 1:
            rows = {"mix": slice(2 * own, 2 * own + 2), "constants": slice(own, own + 1)}
            for name, parameter in self._parameters.items():
                row = parameter.detach()[rows[name]].clone()
                bank._parameters[name] = nn.Parameter(row, parameter.requires_grad)
        return bank

    def why_no_fold(self, edit: Edit, site: Site, single: bool) -> str | None:
        return "a token, a constant or nothing is no feed-forward network, alone or in a sum"
