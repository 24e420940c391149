"""Load any model by name, converted or dense, and let it answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TextStreamer

from sparsecraft import checkpoint, hub
from sparsecraft.data import prompt_ids
from sparsecraft.errors import SparsecraftError


def load_any(name: str) -> tuple[nn.Module, Any]:
    """Model and tokenizer of a checkpoint folder, or of a dense model by name.

    On the GPU if there is one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (Path(name) / checkpoint.MANIFEST).is_file():
        return checkpoint.load(name, device_map=device), hub.load_tokenizer(name)
    folder = hub.resolve(name)
    return hub.load_dense(name, device_map=device), hub.load_tokenizer(folder)


def load_generator(name: str) -> tuple[nn.Module, Any]:
    """As `load_any`; refuses models that do not generate text.

    Raises:
        SparsecraftError: an encoder or classifier.
    """
    model, tokenizer = load_any(name)
    if not model.can_generate():
        raise SparsecraftError(
            f"{name} is a {type(model).__name__}, which does not generate text; eval takes it."
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
    """The model's next turn in a chat.

    Args:
        temperature: 0 takes the most likely token each time.
        stream: print tokens to standard output as they come.
        seed: of sampling.
    """
    ids = torch.tensor([prompt_ids(messages, tokenizer)], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=streamer if stream else None,
            pad_token_id=tokenizer.eos_token_id
            if tokenizer.pad_token_id is None
            else tokenizer.pad_token_id,
            **options,
        )
    new = output[0] if model.config.is_encoder_decoder else output[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()
