"""A router scores tokens against experts and selects some of them.

Shapes: B sequences, S positions, T tokens, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsecraft.errors import SparsecraftError
from sparsecraft.kernels.projections import float32_product
from sparsecraft.moe.batch import Batch
from sparsecraft.moe.routers.capacity import limited
from sparsecraft.moe.routers.moving import LossScale, Moves
from sparsecraft.moe.routers.scorer import Scorer
from sparsecraft.moe.routers.selectors import Sample, Selector
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.words import router_words

TINY_VARIANCE = 1e-12  # of logits that are all equal, whose gradient is finite then


class BaseGate(nn.Linear):
    """The sigmoid of one row's product with a token, x_TD -> (T, 1), float32."""

    def __init__(self, width: int, *, device=None, dtype=None):
        super().__init__(width, 1, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        return float32_product(x_TD, self.weight).sigmoid()


class Router(nn.Module):
    """A scorer, x_TD -> logits_TE, followed by a selector, logits_TE -> weights and indices.

    Attributes:
        base_gate: what the dense network is multiplied by; see `RouterSpec.gates_base`.
        balance: softmax -> what experts are chosen by.
        coefficient: what the layer's balance losses are multiplied by.
        target_load, free: see `sparsecraft.moe.routing.Routing`.
        key, previous: what a batch calls the logits of this router and of the one before it, where
            the scorer reads those.
        runs: whole experts always run as their router selects them.
    """

    runs: ClassVar[str] = "sparse"

    def __init__(
        self,
        scorer: Scorer,
        spec: RouterSpec,
        select: Selector,
    ):
        super().__init__()
        self.scorer = scorer
        self.spec = spec
        self.select = select
        self.base_gate: BaseGate | None = None
        self.balance: Moves | None = None
        self.coefficient: LossScale | None = None
        self.target_load: Sequence[float] | None = None
        self.free = 0
        self.key: Hashable = None
        self.previous: Hashable = None
        # What the spec answers to every call, asked once.
        self.by_head, self.by_sequence = spec.by_head, spec.by_sequence
        self.in_order, self.sums_to_one = spec.select.in_order, spec.sums_to_one
        self.capacity, self.wanted = spec.select.capacity, spec.select.wanted

    def forward(
        self,
        x: Tensor,
        batch: Batch | None = None,
        scores_TE: Tensor | None = None,
        outputs_TEO: Tensor | None = None,
    ) -> Routing:
        """Route tokens x (..., D); one row for each token, or for each head of each token.

        Args:
            scores_TE: what the scorer gives for x, where it is known; see `scores_of_input`.
            outputs_TEO: what every expert gives for each token, where the scorer reads that.
        """
        # float32 throughout: bf16 logits tie often enough to change which experts are chosen.
        if outputs_TEO is not None:
            logits = self.scorer(x.reshape(-1, x.shape[-1]), outputs_TEO)
        elif self.spec.reads_previous:
            logits = self._going_on(x.reshape(-1, x.shape[-1]), batch)
        else:
            logits = self.scorer(self._scored(x, batch)) if scores_TE is None else scores_TE
        if self.spec.standardize is not None:
            logits = standardized(logits, self.spec.standardize)
        if self.spec.temperature != 1:
            logits = logits / self.spec.temperature
        if self.by_sequence:
            logits = self._for_tokens(logits, x, batch)
        if batch is not None and batch.expert_ids is not None:
            return _directed(batch.expert_ids, logits, self.sums_to_one)
        chosen_by = {} if self.balance is None else {"balance": self.balance}
        weights_TK, indices_TK = self.select(logits, **chosen_by)
        through_TE = None
        if self.spec.through and self.training:
            through_TE = through_the_choice(logits, indices_TK, self.sums_to_one)
            weights_TK = weights_TK.detach()
        facts = self.sums_to_one, self.in_order
        # Also top-k of all experts.
        soft = weights_TK.shape == logits.shape and self.wanted is None
        rest = {"outputs_TEO": outputs_TEO, "soft": soft, "heads": self.heads(x.shape[-1])}
        rest |= {"through_TE": through_TE, "target_load": self.target_load, "free": self.free}
        if self.balance is not None:
            rest["of_free"] = self.balance.of_free()
        if self.coefficient is not None:
            rest |= {"loss_scale": self.coefficient(), "scaled": self.coefficient.losses}
        if self.wanted is not None:
            rest |= {"k": self.wanted, "empty": True}
        return Routing(weights_TK, indices_TK, logits, *facts, **rest)

    def _going_on(self, x_TD: Tensor, batch: Batch | None) -> Tensor:
        """Logits that go on from those of the layer before in the pass of the batch.

        Raises:
            SparsecraftError: those have lost a gradient that they should have.
        """
        if batch is None:
            return self.scorer(x_TD)
        before_TP, trains = batch.logits.get(self.previous, (None, False))
        if trains and torch.is_grad_enabled() and not before_TP.requires_grad:
            raise SparsecraftError(
                "The logits of the layer before have no gradient, which this router goes on from: "
                "reentrant activation checkpointing runs the layers without one. Use "
                "use_reentrant=False."
            )
        logits_TE = self.scorer(x_TD, before_TP)
        trains = any(p.requires_grad for p in self.scorer.parameters())
        batch.logits[self.key] = logits_TE, self.training and trains
        return logits_TE

    def limited(self, routing: Routing, mask_T: Tensor | None, passes: bool) -> Routing:
        """The routing without the slots for which its experts have no room, in training; see
        `sparsecraft.moe.routers.capacity.limited`."""
        return limited(routing, self.capacity, mask_T, passes=passes)

    @property
    def moving(self) -> list[Moves]:
        """Its states that move with every optimizer step."""
        return [state for state in (self.balance, self.coefficient) if state is not None]

    def append(self, row: Tensor) -> None:
        """One more expert, the last; see `Scorer.append`."""
        self.scorer.append(row)
        for state in self.moving:
            state.append()

    def remove(self, e: int) -> None:
        """Take expert `e` away; see `Scorer.remove`."""
        self.scorer.remove(e)
        for state in self.moving:
            state.remove(e)

    def scores_of_input(self) -> Tensor | None:
        """The matrix (E, D) whose product with each token of the layer's input is all that the
        router reads, if it is; a caller may compute it together with other products."""
        return self.scorer.joint_rows() if self.spec.by_token else None

    def at_step(self, step: int) -> None:
        """Note how many steps of training there were, for a selection that cools down."""
        if isinstance(self.select, Sample):
            self.select.step = step

    def gate_base(self, x: Tensor) -> Tensor:
        """What the dense network's output for x (..., D) is multiplied by, (..., 1)."""
        gate_T1 = self.base_gate(x.reshape(-1, x.shape[-1]))
        return gate_T1.to(x.dtype).reshape(*x.shape[:-1], 1)

    def _for_tokens(self, logits: Tensor, x: Tensor, batch: Batch) -> Tensor:
        """One row for each sequence, or for several beams of it -> one row for each token."""
        tokens = x.numel() // x.shape[-1]
        ids_BS = batch.sentence_ids if self.spec.sentences else None
        if ids_BS is not None and ids_BS.numel() == tokens:
            return logits[ids_BS.reshape(-1).to(logits.device)]
        sequences = batch.shape[0] if x.ndim == 2 and batch.shape else len(x)
        if ids_BS is not None or sequences % len(logits):
            given = "" if ids_BS is None else f" with sentence_ids {tuple(ids_BS.shape)}"
            raise SparsecraftError(
                f"{tokens} tokens of {sequences} sequences were given {len(logits)} sentences"
                f"{given}; pass one embedding for each sequence, or for packed ones sentence_ids "
                "of the tokens' shape."
            )
        return logits.repeat_interleave(tokens // len(logits), dim=0)

    def _scored(self, x: Tensor, batch: Batch | None) -> Tensor:
        """What the scorer sees: tokens, heads, or one row for each sequence."""
        if self.by_head:
            return x.reshape(-1, self.scorer.width)
        if not self.by_sequence:
            return x.reshape(-1, x.shape[-1])
        if not self.spec.sentences:
            return self._mean(x, batch)
        if batch is None or batch.sentence_embeddings is None:
            raise SparsecraftError(
                "This router decides by sentence and was given none; pass sentence_embeddings="
                "(batch, width) to the model, or generate inside "
                "`with sc.context(model, sentence_embeddings=...)`, which is of its thread alone."
            )
        embeddings = batch.sentence_embeddings
        shape = tuple(getattr(embeddings, "shape", ()))
        if not isinstance(embeddings, Tensor) or len(shape) != 2 or 0 in shape:
            raise SparsecraftError(
                f"sentence_embeddings is a {type(embeddings).__name__} of shape {shape}; pass a "
                f"tensor (sentences, {self.scorer.width})."
            )
        if shape[1] != self.scorer.width:
            raise SparsecraftError(
                f"sentence_embeddings are {shape[1]} wide and this router reads "
                f"{self.scorer.width}; embed with {self.spec.sentences.encoder!r}."
            )
        return embeddings.to(x.device)

    @staticmethod
    def _mean(x: Tensor, batch: Batch) -> Tensor:
        """The mean of each sequence's real tokens, (B, D), in float32."""
        x_BSD = batch.sequences(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        real_BS = batch.tokens("attention_mask", x_BSD)
        if real_BS is None:
            return x_BSD.mean(1, dtype=dtype)
        weights_BS = real_BS / real_BS.sum(1, keepdim=True).clamp_min(1)
        return torch.einsum("bs,bsd->bd", weights_BS.to(dtype), x_BSD.to(dtype))

    def heads(self, width: int) -> int:
        """How many decisions there are for a token of `width` features."""
        return width // self.scorer.width if self.by_head else 1

    def repeated(self, width: int) -> int:
        """Multiplications for a token of `width` features beyond one for each parameter: those of
        every head but the first, and what the scorer says."""
        heads = (self.heads(width) - 1) * sum(p.numel() for p in self.scorer.parameters())
        return heads + self.scorer.repeated

    def extra_repr(self) -> str:
        return router_words(self.spec)


def standardized(logits_TE: Tensor, scale: float) -> Tensor:
    """scale * (z - mean) / deviation of each token's logits (Skywork-MoE, Eq. 4-5); zeros where all
    are equal."""
    centered_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
    variance_T1 = centered_TE.square().mean(-1, keepdim=True)
    return scale * centered_TE * (variance_T1 + TINY_VARIANCE).rsqrt()


def through_the_choice(logits_TE: Tensor, indices_TK: Tensor, renormalize: bool) -> Tensor:
    """The weights (T, E) of all experts as top-k weighs those that it keeps."""
    probs_TE = logits_TE.softmax(-1)
    if not renormalize:
        return probs_TE
    return probs_TE / probs_TE.gather(-1, indices_TK).sum(-1, keepdim=True)


def _directed(expert_ids: Tensor, logits_TE: Tensor, sums_to_one: bool) -> Routing:
    """Every token at the expert that the batch names, with weight one.

    Raises:
        SparsecraftError: not one expert for each token.
    """
    if expert_ids.numel() != len(logits_TE):
        raise SparsecraftError(
            f"expert_ids has shape {tuple(expert_ids.shape)} and {len(logits_TE)} tokens are "
            "routed; pass one expert for each token (batch, positions)."
        )
    indices_T1 = expert_ids.reshape(-1, 1).to(logits_TE.device, torch.long)
    return Routing(torch.ones_like(logits_TE[:, :1]), indices_T1, logits_TE, sums_to_one)
