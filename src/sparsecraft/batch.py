"""What a batch tells the layers beyond hidden states: padding, sentences, modalities, prefixes.

Shapes: B sequences, S positions, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsecraft.errors import SparsecraftError, did_you_mean
from sparsecraft.recipe import Edit
from sparsecraft.specs import RouterSpec

# What no transformers model takes itself, and what a layer may ask for.
OURS = ("sentence_embeddings", "sentence_ids", "prefix_mask")
FIELDS = ("attention_mask", "mm_token_type_ids", *OURS)
INPUTS = ("input_ids", "inputs_embeds")


@dataclass(slots=True, eq=False)
class Batch:
    """Shared by all layers of one model; every forward pass of the model fills it anew.

    Attributes:
        attention_mask: (B, S), 1 on real tokens.
        mm_token_type_ids: (B, S), 0 on text and positive on visual tokens, as transformers'
            multimodal processors return it.
        sentence_embeddings: (N, D), for routers that decide for a sentence; one for each sequence
            unless `sentence_ids` says otherwise.
        sentence_ids: (B, S), the sentence that each token belongs to, where sequences are packed.
        prefix_mask: (B, S), 1 on the tokens that slots may mix in a causal model.
        shape: (B, S), for families that flatten their tokens (OPT).
        held: values that stay for all forward passes of a `context`.
    """

    attention_mask: Tensor | None = None
    mm_token_type_ids: Tensor | None = None
    sentence_embeddings: Tensor | None = None
    sentence_ids: Tensor | None = None
    prefix_mask: Tensor | None = None
    shape: torch.Size | None = None
    held: dict[str, Tensor] = field(default_factory=dict)

    def fill(self, values: dict[str, Tensor | None]) -> None:
        for name in FIELDS:
            if values.get(name) is not None:
                setattr(self, name, values[name])
        inputs = next((values[n] for n in INPUTS if values.get(n) is not None), None)
        self.shape = None if inputs is None else inputs.shape[:2]

    def clear(self) -> None:
        for name in FIELDS:
            setattr(self, name, self.held.get(name))

    def tokens(self, name: str, x: Tensor) -> Tensor | None:
        """A mask as (B, S) bool for tokens x (B, S, D); None if there is none for these tokens.

        The decoder's tokens, and those that a cached step of generation adds, are not in the mask
        that came with the prompt. A prefix that a `context` holds counts for every beam, and ends
        before the tokens that generation without a cache adds.
        """
        mask, shape = getattr(self, name), x.shape[:2] if x.ndim == 3 else self.shape
        if mask is None or shape is None:
            return None
        if name == "prefix_mask" and mask is self.held.get(name):
            mask = mask.repeat_interleave(max(1, shape[0] // len(mask)), dim=0)
            mask = nn.functional.pad(mask, (0, max(0, shape[1] - mask.shape[1])))
        if mask.shape != shape:
            return None
        return mask.to(device=x.device, dtype=torch.bool)

    def sequences(self, x: Tensor) -> Tensor:
        """Tokens x (B, S, D) or flattened as (B S, D) -> (B, S, D).

        Raises:
            SparsecraftError: the tokens do not say which sequence they belong to.
        """
        if x.ndim == 2 and self.shape and len(x) == self.shape.numel():
            x = x.reshape(*self.shape, x.shape[-1])
        if x.ndim != 3:
            raise SparsecraftError(
                f"A layer that looks at whole sequences needs tokens of shape (batch, positions, "
                f"width) and got {tuple(x.shape)}; use a router by token."
            )
        return x


class _Fill:
    """A forward pre-hook; an object, so that a deep copy of the model fills its own batch."""

    def __init__(self, batch: Batch, clears: bool):
        self.batch, self.clears = batch, clears

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.clears:
            self.batch.clear()
        ours = {name: kwargs.pop(name) for name in OURS if name in kwargs}
        signature = inspect.signature(module.forward)
        given = signature.bind_partial(*args, **kwargs).arguments
        self.batch.fill(given | given.get("kwargs", {}) | ours)
        if "mm_token_type_ids" not in signature.parameters:
            kwargs.pop("mm_token_type_ids", None)
        return args, kwargs


def attach(model: nn.Module, batch: Batch) -> list:
    """Let every forward pass of `model`, or of its encoder alone, fill `batch`; the handles."""
    handles = [model.register_forward_pre_hook(_Fill(batch, clears=True), with_kwargs=True)]
    if getattr(model.config, "is_encoder_decoder", False):  # generation calls the encoder itself
        hook = _Fill(batch, clears=False)
        handles.append(model.get_encoder().register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def sentence_router(model: nn.Module) -> RouterSpec | None:
    """The router of the model that decides by sentence (all such read one embedding), if any."""
    specs = (getattr(module, "spec", None) for module in model.modules())
    return next((s for s in specs if getattr(s, "decides", None) == "sentence"), None)


def asks_for_batch(edit: Edit) -> bool:
    """Whether the layers of an edit need to know more than their tokens."""
    if edit.router is None:
        return edit.modality is not None
    by_sequence = edit.router.decides in ("sequence", "sentence")
    return by_sequence or edit.router.select == "slots" or edit.modality is not None


def sentence_width(model: nn.Module) -> int | None:
    """Width of the sentence embeddings that the model's routers read; None if they read none."""
    spec = sentence_router(model)
    return None if spec is None else spec.sentence_dim


@contextmanager
def context(model: nn.Module, **values: Tensor) -> Iterator[None]:
    """Hold values for all forward passes of a block, such as the steps of `generate`.

    Args:
        values: any of `FIELDS`, such as `sentence_embeddings` (B, D).

    Raises:
        SparsecraftError: an unknown name, or a model whose recipe needs none of this.

    Example:
        with sc.context(model, sentence_embeddings=sc.embed(["Why is the sky blue?"])):
            model.generate(input_ids)
    """
    for name in values:
        if name not in FIELDS:
            raise SparsecraftError(f"A context has no field {name!r}." + did_you_mean(name, FIELDS))
    layers = [module for module in model.modules() if getattr(module, "batch", None) is not None]
    if not layers:
        raise SparsecraftError(
            f"No layer of this {type(model).__name__} asks for anything beyond hidden states; "
            "a context serves routers by sequence or sentence, modalities and slots."
        )
    batch = layers[0].batch
    before, batch.held = batch.held, {**batch.held, **values}
    batch.clear()
    try:
        yield
    finally:
        batch.held = before
        batch.clear()
