"""Load any model by name, converted or dense, and let it answer."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TextStreamer

from sparsecraft.checkpoint.load import load_any
from sparsecraft.data.encoding import prompt_ids
from sparsecraft.data.sentences import for_routers, prompt_text
from sparsecraft.dense.loading import objective_of
from sparsecraft.dense.tokens import is_encoder_decoder, positions_of
from sparsecraft.errors import DataError, SparsecraftError, check_seed
from sparsecraft.moe.context import context, sentences_of
from sparsecraft.moe.decoding.loop import decode
from sparsecraft.moe.outputs import evaluation_mode


def load_generator(name: str, base: str | None = None) -> tuple[nn.Module, Any]:
    """As `load_any`; refuses models that do not generate text, or have no tokenizer to do so.

    Raises:
        SparsecraftError: an encoder or classifier, or no usable tokenizer.
    """
    model, tokenizer = load_any(name, base)
    if not model.can_generate():
        raise SparsecraftError(
            f"{name} is a {type(model).__name__}, which does not generate text"
            + ("; eval takes it." if objective_of(model) else ".")
        )
    # transformers makes an empty tokenizer where the vocabulary file is missing.
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.tokenize("a"):
        found = "no tokenizer" if tokenizer is None else "a tokenizer without a vocabulary"
        raise SparsecraftError(
            f"{name} has {found}, which text needs; copy the tokenizer's files into its folder."
        )
    return model, tokenizer


def answer(
    model: nn.Module,
    tokenizer: Any,
    messages: list[dict[str, str]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    stream: bool = False,
    seed: int = 0,
) -> str:
    """The model's next turn in a chat, in evaluation mode.

    Threads may ask one model at once: each gets the answer of its seed, and torch's global random
    state is left alone.

    Args:
        max_new_tokens: longest answer; less where the model's positions end before.
        temperature: 0 takes the most likely token each time; above 0 tokens are drawn one by one,
            without beams.
        stream: print tokens to standard output as they come.
        seed: of sampling.

    Routers that decide by sentence read the chat up to its first answer.

    Raises:
        DataError: the prompt leaves no position for an answer.
        SparsecraftError: `max_new_tokens` below 1, a seed out of range, or a temperature that
            is negative or not finite.
    """
    check_seed(seed)
    if max_new_tokens < 1:
        raise SparsecraftError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise SparsecraftError(f"temperature is {temperature}; it must be 0 or a positive number.")
    ids = torch.tensor([prompt_ids(messages, tokenizer)], device=model.device)
    max_new_tokens = min(max_new_tokens, _room(model, ids.shape[1]))
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer = streamer if stream else None
    options: dict[str, Any] = {"do_sample": False}
    if temperature:
        generator = torch.Generator(model.device).manual_seed(seed)
        options = {"do_sample": True, "temperature": temperature, "num_beams": 1}
        options["custom_generate"] = partial(decode, generator=generator, streamer=streamer)
    with given(model, messages), evaluation_mode(model):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.eos_token_id
            if tokenizer.pad_token_id is None
            else tokenizer.pad_token_id,
            **options,
        )
    new = output[0] if is_encoder_decoder(model) else output[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def _room(model: nn.Module, prompt: int) -> float:
    """How many tokens the model's positions leave for the answer to a prompt of `prompt` tokens."""
    positions = positions_of(model)
    if positions is None:
        return math.inf
    decoder = is_encoder_decoder(model)
    # A decoder of its own begins with one start token.
    room = positions - 1 if decoder else positions - prompt
    if room < 1 or prompt > positions:
        raise DataError(
            f"The prompt has {prompt} tokens and {type(model).__name__} has {positions} positions "
            "for prompt and answer; shorten the prompt."
        )
    return room


def given(model: nn.Module, messages: list[dict[str, str]]) -> AbstractContextManager:
    """A context that holds the embedding of a chat's prompt, where the model's routers read one."""
    sentences = sentences_of(model)
    if sentences is None:
        return nullcontext()
    text = prompt_text({"messages": messages})
    found = for_routers([text], sentences.encoder, sentences.dim)
    return context(model, sentence_embeddings=found)
