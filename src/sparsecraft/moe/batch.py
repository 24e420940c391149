"""Batch: what the layers know of a batch beyond hidden states; padding, sentences, modalities,
prefixes.

Shapes: B sequences, S positions, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsecraft.dense.tokens import CACHES, Reads
from sparsecraft.errors import SparsecraftError

# What no transformers model takes itself, and what a layer may ask for.
OURS = ("sentence_embeddings", "sentence_ids", "prefix_mask", "expert_ids")
FIELDS = ("attention_mask", "mm_token_type_ids", *OURS)
# What a user may hold for all passes of a context.
HELD = tuple(name for name in FIELDS if name != "expert_ids")
MASKS = ("attention_mask", "mm_token_type_ids", "prefix_mask")
INPUTS = ("input_ids", "inputs_embeds")


@dataclass(eq=False)
class Batch:
    """Of one forward pass of a model, for all its layers.

    Masks cover the model's only sequence or, beside a decoder, the encoder's.

    Attributes:
        attention_mask: (B, S), 1 on real tokens.
        mm_token_type_ids: (B, S), 0 on text and positive on visual tokens, as transformers'
            multimodal processors return it.
        sentence_embeddings: (N, D), for routers that decide for a sentence; one for each sequence
            unless `sentence_ids` says otherwise.
        sentence_ids: (B, S), the sentence that each token belongs to, where sequences are packed.
        prefix_mask: (B, S), 1 on the tokens that slots may mix in a causal model.
        expert_ids: (B, S), the expert that each token goes to, whatever its router's scores are;
            of a training stage alone, see `sparsecraft.training.deal.directed`.
        token_mask: (B, S), what a trainer knows of padding where the model is given no mask.
        decoder_mask: (B, S), of a decoder beside an encoder: true on its tokens, or labels.
        logits: a router's key -> what it has scored in the pass, for one that goes on from it, and
            whether it trains.
        shape: (B, S), for families that flatten their tokens (OPT).
        held: which of these values stay for all forward passes of a `context`.
        grows: whether generation adds tokens to the sequence that masks cover.
        past: how many of its tokens came in earlier passes and are in the cache.
        backward: torch's number of the latest backward pass through this forward pass.
    """

    attention_mask: Tensor | None = None
    mm_token_type_ids: Tensor | None = None
    sentence_embeddings: Tensor | None = None
    sentence_ids: Tensor | None = None
    prefix_mask: Tensor | None = None
    expert_ids: Tensor | None = None
    token_mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    logits: dict[Any, tuple[Tensor, bool]] = field(default_factory=dict)
    shape: torch.Size | None = None
    held: dict[str, Tensor] = field(default_factory=dict)
    grows: bool = False
    past: int = 0
    backward: int = -1

    def fill(self, values: dict[str, Any]) -> None:
        for name in FIELDS:
            if values.get(name) is not None:
                setattr(self, name, values[name])
        labels, given = values.get("labels"), values.get("decoder_attention_mask")
        if labels is not None and labels.ndim == 2:
            given = labels != -100
        self.decoder_mask = self.decoder_mask if given is None else given
        inputs = next((values[n] for n in INPUTS if values.get(n) is not None), None)
        self.shape = None if inputs is None else inputs.shape[:2]
        cache, self.past = next((values[n] for n in CACHES if values.get(n) is not None), None), 0
        if self.grows and cache is not None and any(getattr(self, n) is not None for n in MASKS):
            self.past = int(cache.get_seq_length())

    def real_tokens(self, reads: Reads) -> Tensor | None:
        """Which of the tokens that a layer reads are no padding, (B, S) bool; None where the batch
        says nothing of them."""
        given = self.attention_mask if self.token_mask is None else self.token_mask
        mask = {"input": given, "decoder": self.decoder_mask}.get(reads)
        # One that says which token sees which has four dimensions, or is one of several.
        return mask.bool() if getattr(mask, "ndim", 0) == 2 else None

    def seen_by(self, reads: Reads, sequence_first: bool) -> Batch:
        """What of it is true of a layer's tokens: a tower has others than all masks cover."""
        if reads == "tower":
            return replace(self, **dict.fromkeys((*MASKS, "sentence_ids", "shape")))
        if sequence_first and self.expert_ids is not None:
            return replace(self, expert_ids=self.expert_ids.T)
        return self

    def tokens(self, name: str, x: Tensor) -> Tensor | None:
        """A mask as (B, S) bool for tokens x (B, S, D); None if the batch has none.

        One that comes with a call is of the call's tokens. One that a `context` holds is of the
        prompt, and so is one that is longer than a call that goes on from a cache: it counts for
        every beam, and is zero on what generation adds, which is text and outside the prefix.

        Raises:
            SparsecraftError: a mask of another shape than the tokens'.
        """
        mask = getattr(self, name)
        if mask is None:
            return None
        shape = (B, S) = self.sequences(x).shape[:2]
        fitted, held = mask, mask is self.held.get(name)
        if mask.ndim == 2 and (held or (self.past and mask.shape[1] > S)):
            if held and len(mask) and B % len(mask) == 0:
                fitted = fitted.repeat_interleave(B // len(mask), dim=0)
            end = self.past + S
            if self.grows:
                fitted = pad(fitted, (0, max(0, end - fitted.shape[1])))
            if fitted.shape[1] == end:
                fitted = fitted[:, self.past :]
        if fitted.shape != shape:
            raise SparsecraftError(self._misfit(name, mask, shape, held))
        return fitted.to(device=x.device, dtype=torch.bool)

    def _misfit(self, name: str, mask: Tensor, shape: torch.Size, held: bool) -> str:
        found, wanted = tuple(mask.shape), tuple(shape)
        after = f" after {self.past} in the cache" if self.past else ""
        if not held:
            return (
                f"{name} has shape {found} and the tokens that it covers have {wanted}{after}; "
                "pass one value for each token (batch, positions)."
            )
        return (
            f"The context holds {name} of shape {found}, and the tokens of this call have "
            f"{wanted}{after}; hold one value for each token of the prompt (batch, positions), "
            "and open a context for each prompt."
        )

    def sequences(self, x: Tensor) -> Tensor:
        """Tokens x (B, S, D) or flattened as (B S, D) -> (B, S, D).

        Raises:
            SparsecraftError: the tokens do not say which sequence they belong to.
        """
        if x.ndim == 2 and self.shape and len(x) == self.shape.numel():
            x = x.reshape(*self.shape, x.shape[-1])
        turned = self.shape and x.shape[:2] == self.shape[::-1] != self.shape
        if x.ndim != 3 or turned:
            raise SparsecraftError(
                f"A layer that looks at whole sequences needs tokens of shape (batch, positions, "
                f"width) and got {tuple(x.shape)}; use a router by token, for all modalities."
            )
        return x
