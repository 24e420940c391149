"""What a user tells the layers beyond hidden states, and which of their tokens are padding."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsecraft.errors import SparsecraftError, did_you_mean
from sparsecraft.moe.batch import HELD
from sparsecraft.moe.batches import CONTEXTS, Held, batches_of
from sparsecraft.moe.masks import misfit, of_frames, of_rows
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.routers import AnyRouterSpec
from sparsecraft.recipe.selections import Sentence

log = logging.getLogger("sparsecraft")


def sentences_of(model: nn.Module) -> Sentence | None:
    """What embeds the sentences that routers of the model decide for (all read one embedding)."""
    specs = (getattr(module, "spec", None) for module in model.modules())
    found = (spec.sentences for spec in specs if isinstance(spec, AnyRouterSpec))
    return next((sentences for sentences in found if sentences is not None), None)


def asks_for_batch(edit: Edit) -> bool:
    """Whether the layers of an edit need to know more than their tokens."""
    router = edit.router
    return looks_at_sequences(edit) or (
        router is not None and (router.limited or router.reads_previous)
    )


def looks_at_sequences(edit: Edit) -> bool:
    """Whether they need to know which tokens are of a sequence, or of a modality."""
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

    Others that run the model meanwhile do not get them: the block is of the thread or asyncio task
    that opened it. A thread that is started inside gets it by `contextvars.copy_context().run`, as
    `asyncio.to_thread` does.

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
    batches = batches_of(model)
    if batches is None:
        raise SparsecraftError(
            f"No layer of this {type(model).__name__} asks for anything beyond hidden states; "
            "a context serves routers by sequence or sentence, modalities and slots."
        )
    batches.thread.batch = None  # of a pass that Ctrl-C broke off
    with CONTEXTS.opened(Held(batches, values)):
        yield


@contextmanager
def real_tokens(model: nn.Module, token_mask: Tensor | None) -> Iterator[None]:
    """Let the layers know in the block which tokens (B, S) are no padding, where the model itself
    is given no mask of them, as of packed rows."""
    batches = batches_of(model)
    if batches is None or token_mask is None:
        yield
        return
    with CONTEXTS.opened(Held(batches, {"token_mask": token_mask})):
        yield


# What processors give for the tokens of towers.
TOWERS = ("pixel_attention_mask", "pixel_mask", "input_features_mask", "feature_attention_mask")


def layer_masks(
    model: torch.nn.Module,
    inputs: dict,
    token_mask: Tensor | None,
    traced: Mapping[str, Routing] | None = None,
):
    """Layer name, and the shape of its tokens or else that of what was traced -> which of them are
    real, (T,); None for all of them.

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
        real = masks[layer.reads]
        if real is None:
            return None
        shape = traced[name].shape if shape is None else shape
        real_T = of_rows(real, shape, layer.sequence_first)
        if real_T is None and not layer.warned and not real.all():
            log.warning(misfit(real, shape, name, model))
            for other in model.modules():
                if getattr(other, "warned", None) is False:
                    other.warned = True
        return real_T

    return mask
