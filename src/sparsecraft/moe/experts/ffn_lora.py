"""Feed-forward experts that share the dense weights and differ by LoRAs (MixLoRA, Li et al. 2024).

    x (T, D) ─┬─ W_gate ─┬─ + ── act ─┐                   each slot k of a token has its own sums,
              │   L_gate ┘            * ── h_k (F) ──     activation and LoRAs L of its expert; the
              └─ W_up ───┬─ + ────────┘                   products with W are one for all of them:
                  L_up ──┘

    y (T, D) = W_down (sum_k w_k h_k) + sum_k w_k L_down,k h_k

Shapes: T tokens, K slots per token, N = T K, E experts, D width, F hidden width.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.dense.donors import FFN
from sparsecraft.dense.forms import join
from sparsecraft.dense.sites import Site
from sparsecraft.moe.experts.base import Experts
from sparsecraft.moe.experts.ffn import SUM_OF_NETWORKS
from sparsecraft.moe.experts.folded import Update
from sparsecraft.moe.experts.lora import LoRAExperts
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.edits import Edit, Place
from sparsecraft.recipe.experts import FFNLoRASpec, LoRASpec


class FFNLoRAExperts(Experts):
    """Expert e is the dense network with its own LoRA on gate, up and down.

    The dense products are made once per token and not once per expert: W_gate x and W_up x because
    all experts share them, and W_down because the mixture can be taken before it,
    sum_k w_k W_down h_k = W_down sum_k w_k h_k.
    """

    folds = Update
    merges = True  # each slot's LoRA is taken out of all of them by a gate

    def __init__(self, spec: FFNLoRASpec, donor: FFN, site: Site, *, device=None, dtype=None):
        super().__init__()
        self.num_experts, self.out_features = spec.num_experts, donor.width
        self.parts = _parts(site)
        self.function = (donor.activation,)  # in a tuple, so that it is no part of the bank
        self.fused = donor.fused
        self.hidden_dropout, self.output_dropout = donor.hidden_dropout, donor.output_dropout
        lora = LoRASpec(
            num_experts=spec.num_experts, rank=spec.rank, alpha=spec.alpha, dropout=spec.dropout
        )
        for name in ("gate", "up", "down"):
            linear = getattr(donor, name)
            if linear is not None:
                shape = (linear.in_features, linear.out_features)
                self.add_module(name, LoRAExperts(lora, *shape, device=device, dtype=dtype))

    @classmethod
    def build(
        cls,
        spec: FFNLoRASpec,
        donor: FFN,
        site: Site,
        place: Place,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        return cls(spec, donor, site, device=device, dtype=dtype)

    def expert(self, e: int, x: Tensor, base: nn.Module) -> Tensor:
        hidden = self._hidden(
            base, *(self._part(base, n)(x) + bank.expert(e, x) for n, bank in self._first())
        )
        y = self._part(base, "down")(hidden) + self.down.expert(e, hidden)
        return F.dropout(y, self.output_dropout, self.training)

    def forward(
        self,
        x_TI: Tensor,
        routing: Routing | None = None,
        base: nn.Module | None = None,
    ) -> Tensor:
        if routing is None:
            return self.expert(0, x_TI, base)
        if self.dispatch == "loop":
            return self._loop(x_TI, routing, base)
        T, K = routing.indices_TK.shape
        chosen = _one_each(routing)
        x_NI = x_TI.repeat_interleave(K, dim=0)
        first = []
        for name, bank in self._first():
            shared_TF = self._part(base, name)(x_TI)
            first.append(self._added(bank, shared_TF.repeat_interleave(K, dim=0), x_NI, chosen))
        hidden_NF = self._hidden(base, *first)
        chosen_TK = routing.indices_TK < self.num_experts
        weights_TK = routing.weights_TK.to(hidden_NF.dtype) * chosen_TK
        weighted_NF = hidden_NF * weights_TK.reshape(-1, 1)
        down = self._part(base, "down")
        y_TO = down(weighted_NF.unflatten(0, (T, K)).sum(1))
        bias = getattr(down, "bias", None)
        if bias is not None and not routing.sums_to_one:
            y_TO = y_TO + (weights_TK.sum(1, keepdim=True) - 1) * bias
        y_TO = y_TO + self.down(weighted_NF, chosen).unflatten(0, (T, K)).sum(1)
        return F.dropout(y_TO, self.output_dropout, self.training)

    @staticmethod
    def _added(bank: LoRAExperts, y_NO: Tensor, x_NI: Tensor, chosen: Routing) -> Tensor:
        if bank.runs_merged:
            return bank.added(y_NO, x_NI, chosen.weights_TE())
        return y_NO + bank(x_NI, chosen)

    def _loop(self, x_TI: Tensor, routing: Routing, base: nn.Module) -> Tensor:
        weights_TE = routing.weights_TE().to(x_TI.dtype)
        return sum(
            weights_TE[:, e, None] * self.expert(e, x_TI, base) for e in range(self.num_experts)
        )

    def repeated(self, slots: float) -> int:
        """Every further slot has its own update: only the dense products are made once."""
        return int(slots - 1) * sum(p.numel() for p in self.parameters())

    def why_no_fold(self, edit: Edit, site: Site, single: bool) -> str | None:
        return None if single else SUM_OF_NETWORKS

    def fold(self, weights_E: Tensor) -> Update:
        e = int(weights_E.argmax())
        banks = self.named_children()
        return Update({name: bank.delta(weights_E[e, None], e) for name, bank in banks})

    def _first(self) -> list[tuple[str, LoRAExperts]]:
        return [(name, bank) for name, bank in self.named_children() if name != "down"]

    def _hidden(self, base: nn.Module, first: Tensor, up: Tensor | None = None) -> Tensor:
        named = self.parts["activation"]
        activation = base.get_submodule(named) if named else self.function[0]
        if self.fused:
            first, up = first.chunk(2, dim=-1)
        hidden = activation(first) if up is None else activation(first) * up
        hidden = F.dropout(hidden, self.hidden_dropout, self.training)
        # T5 keeps its second matrix in float32 where all else is float16.
        weight = getattr(self._part(base, "down"), "weight", None)
        return hidden.float() if weight is not None and weight.dtype == torch.float32 else hidden

    def _part(self, base: nn.Module, name: str) -> nn.Module:
        return base.get_submodule(self.parts[name])


def _parts(site: Site) -> dict[str, str | None]:
    """Part of the network -> its path below the layer's base; None where it is no module."""
    form, names = site.form, {member: name for name, member in site.chain}
    found = {}
    for part in ("gate", "up", "activation", "down"):
        path = getattr(form, part)
        if path and names:
            full = join(site.owner, path)
            member = next(m for m in names if full == m or full.startswith(f"{m}."))
            path = names[member] + full.removeprefix(member)
        found[part] = path
    return found


def _one_each(routing: Routing) -> Routing:
    """Every slot as a token of its own that goes to its one expert with weight one."""
    indices_N1 = routing.indices_TK.reshape(-1, 1)
    K = routing.indices_TK.shape[1]
    return Routing(
        torch.ones_like(indices_N1, dtype=torch.float32),
        indices_N1,
        routing.logits_TE.repeat_interleave(K, dim=0),
    )
