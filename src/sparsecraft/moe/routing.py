"""What a router decided, and how to look at it.

Shapes: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsecraft.errors import SparsecraftError

# Losses that even out the experts, which the state of a router may scale.
BALANCE_LOSSES = ("switch", "switch_unnormalized", "btx", "heterogeneous", "importance")


@dataclass(frozen=True, slots=True)
class Routing:
    """The decision of one router for T tokens.

    Attributes:
        weights_TK: mixing weight of each slot.
        indices_TK: the expert in each slot; the value E says "no expert in this slot", so that
            top-k, soft, threshold and dynamic-k selection all fit one rectangular record.
        logits_TE: the scorer's float32 output, which the auxiliary losses read.
        sums_to_one: the weights of every token are known to sum to one.
        every: all experts of every token run, with weight one.
        in_order: every token has all experts, expert e in slot e, as soft selection gives them.
        outputs_TEO: what every expert gives for each token, where the router has read that.
        through_TE: in training, the weights of all experts, for a gradient that passes by those
            that a token does not go to.
        wanted_TK: the experts that were chosen, where capacity left some of their slots empty.
        loss_scale: (), what some losses of the layer are multiplied by; None for one.
        scaled: the names of these.
        k: experts that a token is meant to take, where the slots do not say it.
        target_load: parts of all slots that experts are meant to have; None for equal ones.
        free: how many of the experts, the last ones, compute nothing.
        of_free: (), how far these are in use yet, from 0 to 1; None where they are.
        pre_TF: in training of a split network whose experts all run, the activation's input.
        empty: many slots may have no expert.
        soft: every token has all experts, which differ in weight alone: a count of slots says
            nothing of them.
        acts_T: the tokens that the layer acts on, where it does not act on all.
        heads: rows of each token: a router by head has several.
        shape: of a traced one's tokens, (B, S) or as they came to the layer.
        inputs_TD: of one that was traced with its inputs, what the layer read of each row.
    """

    weights_TK: Tensor
    indices_TK: Tensor
    logits_TE: Tensor
    sums_to_one: bool = False
    in_order: bool = False
    every: bool = False
    outputs_TEO: Tensor | None = None
    through_TE: Tensor | None = None
    wanted_TK: Tensor | None = None
    loss_scale: Tensor | None = None
    scaled: tuple[str, ...] = ()
    k: int | None = None
    target_load: tuple[float, ...] | None = None
    free: int = 0
    of_free: Tensor | None = None
    pre_TF: Tensor | None = None
    empty: bool = False
    soft: bool = False
    acts_T: Tensor | None = None
    heads: int = 1
    shape: torch.Size | None = None
    inputs_TD: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[-1]

    def weights_TE(self) -> Tensor:
        """The weight of every expert, zero where it was not chosen."""
        T, E = self.logits_TE.shape
        if self.in_order:
            return self.weights_TK
        weights_TK = self.weights_TK * (self.indices_TK < E)
        weights_TE = weights_TK.new_zeros(T, E + 1)  # the last column takes "no expert"
        return weights_TE.scatter_add(1, self.indices_TK, weights_TK)[:, :E]

    def in_use_E(self) -> Tensor | None:
        """How far each expert is in use, (E,) from 0 to 1; None where all are."""
        if self.of_free is None:
            return None
        return of_last(self.free, self.of_free, self.num_experts)

    def load_to_have_E(self) -> Tensor:
        """Parts of all slots that experts are meant to have now, (E,) float64."""
        E = self.num_experts
        load_E = self.logits_TE.new_tensor(self.target_load or (1 / E,) * E, dtype=torch.float64)
        in_use_E = self.in_use_E()
        return load_E if in_use_E is None else shares(load_E * in_use_E)

    def only(self, keep_T: Tensor) -> Routing:
        """The same decision with weight zero for all other tokens."""
        keep_T = spread(keep_T, len(self.weights_TK), self.heads)
        weights_TK = self.weights_TK * keep_T[:, None]
        through_TE = None if self.through_TE is None else self.through_TE * keep_T[:, None]
        changed = {"weights_TK": weights_TK, "through_TE": through_TE, "acts_T": keep_T}
        return replace(self, sums_to_one=False, **changed)

    def of_first(self, count: int) -> Routing:
        """The same for the first `count` experts alone; slots of the others are empty."""
        weights_TK, indices_TK = self.weights_TK, self.indices_TK
        if self.in_order:
            weights_TK, indices_TK = weights_TK[:, :count], indices_TK[:, :count]
        changed = {
            "indices_TK": indices_TK.clamp(max=count),
            "logits_TE": self.logits_TE[:, :count],
        }
        changed |= {"weights_TK": weights_TK * (indices_TK < count), "wanted_TK": None}
        return replace(self, sums_to_one=False, soft=False, empty=True, **changed)

    @classmethod
    def of_one(cls, x_TI: Tensor) -> Routing:
        """Every token at the only expert, with weight one."""
        ones_T1 = x_TI.new_ones(x_TI.shape[0], 1, dtype=torch.float32)
        indices_T1 = torch.zeros_like(ones_T1, dtype=torch.long)
        return cls(ones_T1, indices_T1, torch.zeros_like(ones_T1), sums_to_one=True)

    @classmethod
    def of_all(cls, x_TI: Tensor, num_experts: int) -> Routing:
        """Every token at every expert, with weight one: a split network that runs whole."""
        shape = x_TI.shape[0], num_experts
        ones_TE = x_TI.new_ones(1, 1, dtype=torch.float32).expand(shape)
        indices_TE = torch.arange(num_experts, device=x_TI.device).expand(shape)
        return cls(ones_TE, indices_TE, torch.zeros_like(ones_TE), in_order=True, every=True)

    @classmethod
    def of_weights(cls, weights_TE: Tensor) -> Routing:
        """The routing by weights that are zero where an expert does not run."""
        E = weights_TE.shape[-1]
        experts_E = torch.arange(E, device=weights_TE.device)
        indices_TE = torch.where(weights_TE != 0, experts_E, E)
        return cls(weights_TE, indices_TE, torch.zeros_like(weights_TE), in_order=True)

    def counted(self, mask_T: Tensor | None = None) -> Tensor | None:
        """Which rows losses and statistics count, (T,) bool; None for all of them.

        Args:
            mask_T: True on real tokens; padding is False.
        """
        if mask_T is None:
            return self.acts_T
        real_T = spread(mask_T, len(self.logits_TE), self.heads).to(
            self.logits_TE.device, torch.bool
        )
        return real_T if self.acts_T is None else real_T & self.acts_T

    @property
    def chosen_TK(self) -> Tensor:
        """The expert that each slot was for, whether or not capacity filled it."""
        return self.indices_TK if self.wanted_TK is None else self.wanted_TK

    def amounts_E(self, mask_T: Tensor | None = None) -> Tensor:
        """How much each expert was chosen by the counted tokens, float32: in slots or, of a soft
        routing, in the sum of its weights (the importance of Shazeer et al. 2017)."""
        if self.soft:
            received_TE = self.weights_TE().detach().float()
        else:
            empty_TE = torch.zeros_like(self.logits_TE, dtype=torch.float32)
            empty_TE = torch.cat([empty_TE, empty_TE[:, :1]], dim=-1)  # last column: no expert
            ones_TK = torch.ones_like(self.chosen_TK, dtype=torch.float32)
            received_TE = empty_TE.scatter_add(-1, self.chosen_TK, ones_TK)[:, :-1]
        counted_T = self.counted(mask_T)
        if counted_T is not None:
            received_TE = received_TE * counted_T[:, None]
        return received_TE.sum(0)

    def load_E(self, mask_T: Tensor | None = None) -> Tensor:
        """Share of the work that each expert was chosen for, float32, summing to one: of the
        slots or, where every token has all experts, of their weights; see `amounts_E`.

        Args:
            mask_T: True on the tokens that count; padding is False. None counts every token.
        """
        return shares(self.amounts_E(mask_T))


def shares(amounts_E: Tensor) -> Tensor:
    """Amounts from 0 as parts of their sum; zeros where there are none."""
    return amounts_E / amounts_E.sum().clamp_min(torch.finfo(amounts_E.dtype).tiny)


def of_last(count: int, value: Tensor, num_experts: int) -> Tensor:
    """Ones (E,), and `value` in the places of the last experts."""
    places_E = torch.arange(num_experts, device=value.device)
    return torch.where(places_E >= num_experts - count, value, 1.0)


def spread(mask_T: Tensor, rows: int, heads: int) -> Tensor:
    """A mask of tokens for the rows of a routing, `heads` for each of them.

    Raises:
        SparsecraftError: it is a mask of other tokens.
    """
    mask_T = mask_T.reshape(-1)
    if len(mask_T) * heads != rows:
        raise SparsecraftError(
            f"A mask of {len(mask_T)} tokens lies over {rows // heads} that a layer has routed: "
            "these are of another sequence than attention_mask (of a decoder, labels) covers, or "
            "the model changes their number; pass a mask of their shape, or leave it out."
        )
    return mask_T.repeat_interleave(heads)


def combined(routing: Routing) -> Tensor:
    """The mixture (T, O) of outputs that the router has read already, sum_e w_e E_e(x)."""
    outputs_TEO = routing.outputs_TEO
    weights_TE1 = routing.weights_TE()[..., None].to(outputs_TEO.dtype)
    return (weights_TE1 * outputs_TEO).sum(1)
