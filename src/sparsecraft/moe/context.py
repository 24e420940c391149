"""What the layers know of a batch beyond hidden states: padding, sentences, modalities, prefixes.

Shapes: B sequences, S positions, D width.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sparsecraft.dense.tokens import Reads, can_generate, is_encoder_decoder
from sparsecraft.errors import SparsecraftError, did_you_mean
from sparsecraft.moe.masks import misfit, of_frames, of_rows
from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.routers import AnyRouterSpec
from sparsecraft.recipe.selections import Sentence

log = logging.getLogger("sparsecraft")

# What no transformers model takes itself, and what a layer may ask for.
OURS = ("sentence_embeddings", "sentence_ids", "prefix_mask", "expert_ids")
FIELDS = ("attention_mask", "mm_token_type_ids", *OURS)
# What a user may hold for all passes of a context.
HELD = tuple(name for name in FIELDS if name != "expert_ids")
MASKS = ("attention_mask", "mm_token_type_ids", "prefix_mask")
INPUTS = ("input_ids", "inputs_embeds")
CACHES = ("cache", "past_key_values")  # the name since transformers 5.24, and before


@dataclass(slots=True, eq=False)
class Batch:
    """Shared by all layers of one model; every forward pass of the model fills it anew.

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
        shape: (B, S), for families that flatten their tokens (OPT).
        held: values that stay for all forward passes of a `context`.
        grows: whether generation adds tokens to the sequence that masks cover.
        past: how many of its tokens came in earlier passes and are in the cache.
        runs: whether a forward pass of the whole model is under way.
        passes: how many of these there were.
        backward: number of the running backward pass, and the forward passes that it goes through.
    """

    attention_mask: Tensor | None = None
    mm_token_type_ids: Tensor | None = None
    sentence_embeddings: Tensor | None = None
    sentence_ids: Tensor | None = None
    prefix_mask: Tensor | None = None
    expert_ids: Tensor | None = None
    shape: torch.Size | None = None
    held: dict[str, Tensor] = field(default_factory=dict)
    grows: bool = False
    past: int = 0
    runs: bool = False
    passes: int = 0
    backward: tuple[int, set[int]] = (-1, set())

    def goes_back(self, forward: int, grad: Tensor) -> None:
        """A hook of the model's outputs: a backward pass goes through forward pass `forward`."""
        task = torch._C._current_graph_task_id()
        known = self.backward[1] if self.backward[0] == task else set()
        self.backward = task, known | {forward}

    def check(self) -> None:
        """Refuse to compute a layer again, for activation checkpointing, with another batch.

        Raises:
            SparsecraftError: a forward pass came between that one and its backward pass.
        """
        if torch.compiler.is_compiling():
            return
        task, forwards = self.backward
        if task != -1 and task == torch._C._current_graph_task_id() and forwards != {self.passes}:
            raise SparsecraftError(
                "Activation checkpointing computes a layer again that reads masks or sentences, "
                "and another forward pass has replaced them; run each backward pass right after "
                "its forward pass, or turn checkpointing off."
            )

    def fill(self, values: dict[str, Any]) -> None:
        for name in FIELDS:
            if values.get(name) is not None:
                setattr(self, name, values[name])
        inputs = next((values[n] for n in INPUTS if values.get(n) is not None), None)
        self.shape = None if inputs is None else inputs.shape[:2]
        cache, self.past = next((values[n] for n in CACHES if values.get(n) is not None), None), 0
        if self.grows and cache is not None and any(getattr(self, n) is not None for n in MASKS):
            self.past = int(cache.get_seq_length())

    def seen_by(self, reads: Reads, sequence_first: bool) -> Batch:
        """What of it is true of a layer's tokens: a tower has others than all masks cover."""
        if reads == "tower":
            return replace(self, **dict.fromkeys((*MASKS, "sentence_ids", "shape")))
        if sequence_first and self.expert_ids is not None:
            return replace(self, expert_ids=self.expert_ids.T)
        return self

    def clear(self) -> None:
        for name in FIELDS:
            setattr(self, name, self.held.get(name))

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


class _Fill:
    """A forward pre-hook; an object, so that a deep copy of the model fills its own batch."""

    def __init__(self, batch: Batch, whole: bool):
        self.batch, self.whole = batch, whole

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.whole or not self.batch.runs:
            self.batch.clear()
        self.batch.passes += self.whole
        self.batch.runs = self.batch.runs or self.whole
        ours = {name: kwargs.pop(name) for name in OURS if name in kwargs}
        signature = inspect.signature(module.forward)
        given = signature.bind_partial(*args, **kwargs).arguments
        given = given | given.get("kwargs", {}) | ours
        mask = given.get("attention_mask")
        if getattr(mask, "ndim", 0) == 2:
            given["attention_mask"] = of_frames(module, mask)
        self.batch.fill(given)
        if "mm_token_type_ids" not in signature.parameters:
            kwargs.pop("mm_token_type_ids", None)
        return args, kwargs


class _End:
    """A forward hook of the whole model: its encoder may run alone from here on, and its outputs
    tell when a backward pass begins."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.batch.runs = False
        if output is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        hook = functools.partial(self.batch.goes_back, self.batch.passes)
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(hook)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Every tensor of a model's output, those in tuples (hidden states) too."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (dict, tuple, list)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from tensors_in(value)


def attach(model: nn.Module, batch: Batch) -> list:
    """Let every forward pass of `model`, or of its encoder alone, fill `batch`; the handles."""
    decoder = is_encoder_decoder(model)
    batch.grows = not decoder and can_generate(model)
    handles = [
        model.register_forward_pre_hook(_Fill(batch, whole=True), with_kwargs=True),
        model.register_forward_hook(_End(batch), always_call=True),
    ]
    if decoder:  # generation calls the encoder itself
        hook = _Fill(batch, whole=False)
        handles.append(model.get_encoder().register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def sentences_of(model: nn.Module) -> Sentence | None:
    """What embeds the sentences that routers of the model decide for (all read one embedding)."""
    specs = (getattr(module, "spec", None) for module in model.modules())
    found = (spec.sentences for spec in specs if isinstance(spec, AnyRouterSpec))
    return next((sentences for sentences in found if sentences is not None), None)


def asks_for_batch(edit: Edit) -> bool:
    """Whether the layers of an edit need to know more than their tokens."""
    if edit.modality is not None or edit.router is None:
        return edit.modality is not None
    return edit.router.by_sequence or edit.router.mixes_tokens


def sentence_width(model: nn.Module) -> int | None:
    """Width of the sentence embeddings that the model's routers read; None if they read none."""
    sentences = sentences_of(model)
    return None if sentences is None else sentences.dim


@contextmanager
def context(model: nn.Module, **values: Tensor) -> Iterator[None]:
    """Hold values for all forward passes of a block, such as the steps of `generate`.

    Args:
        values: any of `HELD`, such as `sentence_embeddings` (B, D). Masks are of the prompt's
            tokens; those that generation adds are text and in no prefix.

    Raises:
        SparsecraftError: an unknown name, or a model whose recipe needs none of this.

    Example:
        with sc.context(model, sentence_embeddings=sentences.embed(["Why is the sky blue?"])):
            model.generate(input_ids)
    """
    for name in values:
        if name not in HELD:
            raise SparsecraftError(f"A context has no field {name!r}." + did_you_mean(name, HELD))
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
        batch.held = before  # a backward pass may still need the rest


# What processors give for the tokens of towers.
TOWERS = ("pixel_attention_mask", "pixel_mask", "input_features_mask", "feature_attention_mask")


def layer_masks(model: torch.nn.Module, inputs: dict, token_mask: Tensor | None):
    """Layer name, and the shape of its tokens or else that of its latest trace -> which of them
    are real, (T,); None for all of them.

    The decoder of an encoder-decoder model sees the labels' positions, its encoder the inputs',
    and so do the keys and values of cross-attention; a speech encoder sees frames, and a tower
    what no mask of the text covers. A mask of other tokens than the layer's is not used, which is
    said once.
    """
    given = inputs.get("attention_mask")
    # One that says which token sees which has four dimensions, and marks no token as padding.
    if token_mask is None and given is not None and getattr(given, "ndim", 0) == 2:
        token_mask = of_frames(model, given.bool())
    labels, decoder_mask = inputs.get("labels"), inputs.get("decoder_attention_mask")
    if labels is not None:  # of a classifier, the decoder reads the inputs
        decoder_mask = labels != -100 if labels.ndim > 1 else token_mask
    tower_mask = next((inputs[n] for n in TOWERS if inputs.get(n) is not None), None)
    masks = {"input": token_mask, "decoder": decoder_mask, "tower": tower_mask}

    def mask(name: str, shape: torch.Size | None = None) -> Tensor | None:
        layer = model.get_submodule(name)
        real, shape = masks[layer.reads], layer.shape if shape is None else shape
        if real is None:
            return None
        real_T = of_rows(real, shape, layer.sequence_first)
        if real_T is None and not layer.warned and not real.all():
            log.warning(misfit(real, shape, name, model))
            for other in model.modules():
                if getattr(other, "warned", None) is False:
                    other.warned = True
        return real_T

    return mask
