"""`generate` of a converted model, fast by itself: by captured steps where a call allows it."""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from sparsecraft.dense.tokens import can_generate
from sparsecraft.moe.decoding.loop import decode

ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
BY_POSITION = 2  # inputs and settings
SAMPLE = GenerationMixin._sample
OF_ITS_OWN = ("custom_generate", "assistant_model", "tokenizer")


def generates_fast(model: nn.Module) -> None:
    """Let `model.generate`, and all that calls it, decode by captured steps; a `generate` that its
    user gave it stays."""
    own = vars(model).get("generate")
    if can_generate(model) and (own is None or getattr(own, "func", None) is generate):
        model.generate = functools.partial(generate, model)


def generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """transformers' `generate`. On a GPU, greedy search and sampling run a decoding step that was
    captured, and compiled whole where a call adds enough tokens; all else is as it was."""
    theirs = type(model).generate
    # Behind its first ones, arguments by position may be any of what is looked at by name here.
    if len(args) <= BY_POSITION and _one_by_one(model, args, kwargs):
        # transformers gives a streamer to its own loops alone.
        kwargs["custom_generate"] = functools.partial(decode, streamer=kwargs.get("streamer"))
    return theirs(model, *args, **kwargs)


def _one_by_one(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call adds one token after another to each prompt, and nothing else that
    transformers gives to its own loops alone: a tokenizer, or word that processes wait."""
    if any(kwargs.get(name) for name in OF_ITS_OWN) or _waits(model, kwargs.get("synced_gpus")):
        return False
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    default = model.generation_config
    if not isinstance(given, GenerationConfig | None) or type(model)._sample is not SAMPLE:
        return False
    config = copy.copy(default if given is None else given)
    for name, value in vars(config).items():
        if value is None:  # as transformers fills them in
            setattr(config, name, getattr(default, name, None))
    for name, value in kwargs.items():
        if name in vars(config):
            setattr(config, name, value)
    return config.get_generation_mode() in ONE_BY_ONE


def _waits(model: nn.Module, synced: bool | None) -> bool:
    """Whether all processes have to run as many steps, as transformers finds it out."""
    if synced is None:
        synced = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    return synced
