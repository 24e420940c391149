"""Greedy search and sampling on captured steps, as a `custom_generate` of transformers' `generate`.

Shapes: B sequences, S tokens of the prompt, N tokens at most, V words.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from sparsecraft.dense.tokens import CACHES, is_encoder_decoder
from sparsecraft.moe.batches import batches_of
from sparsecraft.moe.context import sentences_of
from sparsecraft.moe.decoding.step import Step, cache_length, cache_name, state_of
from sparsecraft.moe.decoding.stops import Stops
from sparsecraft.moe.traces import RECORDS

log = logging.getLogger("sparsecraft")

DEVICES = ("cuda",)
KEPT = 2  # steps of a model: a cache each
FAILED = 16  # of a model that are remembered
PREPARES = {"prepare_inputs_for_generation", "_update_model_kwargs_for_generation"}
OTHERS_WITHIN = (PrefixConstrainedLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
LAG = 2  # steps that the host runs ahead of the device
COMPILED = 32  # new tokens from which on a step is worth compiling
KNOWN = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", *CACHES}
RETURNS = ("return_dict_in_generate", "output_attentions", "output_hidden_states")


class _Steps:
    """The steps of one model, the latest used last; one call of `generate` has them at a time.

    Attributes:
        failed: what could not be made, and the state that the model was in.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.found: OrderedDict[tuple, Step] = OrderedDict()
        self.failed: dict[tuple, list] = {}

    def of(self, model: nn.Module, shape: tuple[int, int, bool], compiles: bool) -> Step | None:
        """The step of a batch and cache; None where it could not be made.

        Args:
            shape: sequences, positions of the cache, and whether some are padding.
        """
        step = self.found.pop(shape, None)
        known = step is not None and (step.compiled is not None or not compiles)
        with suppress(RuntimeError):  # of what is captured again
            if known and step.fits(model):
                self.found[shape] = step
                return step
        del step  # whose cache would stand beside the new one
        if self.failed.get((*shape, compiles)) == state_of(model)[0]:
            return None
        while len(self.found) >= KEPT:
            self.found.popitem(last=False)
        try:
            self.found[shape] = Step(model, *shape, compiles)
        except Exception as error:  # memory that ran out, layers that wait for the device
            if len(self.failed) >= FAILED:
                self.failed.clear()
            self.failed[*shape, compiles] = state_of(model)[0]
            log.info("Tokens are generated one by one in Python, because: %s", error)
        return self.found.get(shape)


STEPS: weakref.WeakKeyDictionary[nn.Module, _Steps] = weakref.WeakKeyDictionary()


def why_not(
    model: nn.Module, input_ids: Tensor, config: GenerationConfig, given: dict[str, Any]
) -> str | None:
    """Why captured steps cannot serve this call of `generate`; None where they can.

    Args:
        given: what the model is called with beside its tokens.
    """
    cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    devices = {p.device for p in model.parameters()}
    quantizer = getattr(model, "hf_quantizer", None)
    reasons = {
        f"the model is on {model.device.type}": model.device.type not in DEVICES,
        "the prompt is on another device": input_ids.device != model.device,
        "the prompt is of another type": input_ids.dtype != torch.long,
        "the model is on several devices": len(devices) > 1
        or getattr(model, "hf_device_map", None) is not None,
        "the model is training": any(module.training for module in model.modules()),
        "hooks of others would not be called": _hooked(model),
        "another code prepares its inputs": not PREPARES.isdisjoint(vars(model)),
        "autocast is on": torch.is_autocast_enabled(model.device.type),
        "it has an encoder": is_encoder_decoder(model),
        "it is not written for static caches": not getattr(model, "_can_compile_fullgraph", False),
        "its layers keep more than keys and values": _keeps_states(model),
        "its quantization cannot be compiled": quantizer is not None
        and not quantizer.is_compileable,
        "the cache is off, or another": not config.use_cache
        or config.cache_implementation not in (None, "static", "dynamic")
        or config.prefill_chunk_size is not None
        or cache_name(model) is None
        or getattr(cache, "_is_user_defined", False),
        "more than tokens is asked for": any(getattr(config, name) for name in RETURNS),
        "the model reads more than tokens": bool(
            {name for name, value in given.items() if value is not None} - KNOWN
        ),
        "positions are not one for each token": positions is not None and positions.ndim != 2,
        "the mask is not one for each token": mask is not None and mask.ndim != 2,
        "layers read sentences": sentences_of(model) is not None,
        "layers read the mask": mask is not None and batches_of(model) is not None,
        "a trace notes what layers do": bool(RECORDS.now()),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _hooked(model: nn.Module) -> bool:
    """Whether code that is not ours runs with a module: a captured step would leave it out."""
    everywhere = nn.modules.module
    found = [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks]
    for module in model.modules():
        found += [module._forward_hooks, module._forward_pre_hooks]
    hooks = [hook for table in found if table for hook in table.values()]
    functions = (getattr(hook, "func", hook) for hook in hooks)  # of a partial
    return any(not function.__module__.startswith("sparsecraft.") for function in functions)


def _keeps_states(model: nn.Module) -> bool:
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    return any("attention" not in kind or "linear" in kind for kind in kinds)


def decode(
    model: nn.Module,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    generator: torch.Generator | None = None,
    **given: Any,
) -> Tensor:
    """The prompts (B, S) and what the model adds to them, (B, N).

    What a captured step cannot do, transformers' own loop does.

    Args:
        generator: draws tokens where they are drawn; None: torch's global random state.
        given: what the model is called with beside its tokens.
    """
    rules = logits_processor, stopping_criteria, generation_config
    mask = given.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not is_encoder_decoder(model) and bool(mask.all()):
        given["attention_mask"] = None
    reason = why_not(model, input_ids, generation_config, given)
    steps = STEPS.setdefault(model, _Steps())
    if reason is None and steps.lock.acquire(blocking=False):
        try:
            with torch.cuda.device_of(input_ids):  # streams and graphs are the current device's
                step = _step_for(steps, model, input_ids, given, generation_config)
                if step is not None:
                    return _Loop(step, model, rules, streamer, generator).run(input_ids, given)
            reason = "there is no step"
        finally:
            steps.lock.release()
    log.debug("Tokens are generated by transformers' own loop: %s.", reason or "it is in use")
    given["streamer"] = streamer
    return _by_transformers(model, input_ids, rules, generator, given)


def _by_transformers(
    model: nn.Module,
    input_ids: Tensor,
    rules: tuple[LogitsProcessorList, StoppingCriteriaList, GenerationConfig],
    generator: torch.Generator | None,
    given: dict[str, Any],
) -> Tensor:
    """transformers' own loop; by a generator of its own where that takes the best token, because
    there is only the one drawn."""
    processors, stops, config = rules
    if generator is not None and config.do_sample:
        config.do_sample = False  # of this call's copy
        processors = LogitsProcessorList([*processors, Draw(generator)])
    return model._sample(
        input_ids,
        logits_processor=processors,
        stopping_criteria=stops,
        generation_config=config,
        **given,
    )


class Draw(LogitsProcessor):
    """Leaves of each row's tokens the one that the generator draws."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Of scores (B, V) the drawn one as 0, all others as -inf."""
        drawn_B1 = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn_B1, 0.0)


def _step_for(
    steps: _Steps, model: nn.Module, input_ids: Tensor, given: dict[str, Any], config: Any
) -> Step | None:
    batch, prompt = input_ids.shape
    padded = given.get("attention_mask") is not None
    length = cache_length(config.max_length)
    compiles = config.max_length - prompt >= COMPILED and not config.disable_compile
    with torch.inference_mode(False), torch.no_grad():
        return steps.of(model, (batch, length, padded), compiles)


class _Loop:
    """One call of `generate` on a captured step."""

    def __init__(
        self,
        step: Step,
        model: nn.Module,
        rules: tuple[LogitsProcessorList, StoppingCriteriaList, GenerationConfig],
        streamer: BaseStreamer | None,
        generator: torch.Generator | None,
    ):
        self.step, self.model, self.generator = step, model, generator
        self.processors, self.criteria, self.config = rules
        self.stops = Stops(streamer, LAG if self._may_run_ahead() else 0)
        self.ends = any(getattr(c, "eos_token_id", None) is not None for c in self.criteria)

    def _may_run_ahead(self) -> bool:
        """Whether no code of others would see tokens behind the end."""
        others = (*self.processors, *self.criteria)
        return all(
            type(other).__module__.startswith("transformers.")
            and not isinstance(other, OTHERS_WITHIN)
            for other in others
        )

    def run(self, prompt_BS: Tensor, given: dict[str, Any]) -> Tensor:
        B, S = prompt_BS.shape
        ids_BN = prompt_BS.new_zeros(B, self.config.max_length)
        ids_BN[:, :S] = prompt_BS
        unfinished_B = torch.ones(B, dtype=torch.bool, device=prompt_BS.device)
        logits_BV = self._prefill(prompt_BS, given)
        for length in range(S + 1, ids_BN.shape[1] + 1):
            next_B = self._choose(ids_BN[:, : length - 1], logits_BV)
            if self.ends:
                next_B = next_B.where(unfinished_B, self.config._pad_token_tensor)
            ids_BN[:, length - 1] = next_B
            unfinished_B = unfinished_B & ~self.criteria(ids_BN[:, :length], None)
            if not self.stops.after(unfinished_B, next_B, length):
                break
            if length < ids_BN.shape[1]:
                self.step.token_B1.copy_(next_B[:, None])
                self.step(self.model)
                logits_BV = self.step.logits_BV.clone()  # processors may write into it
        return ids_BN[:, : self.stops.finish(length)].clone()

    def _prefill(self, prompt_BS: Tensor, given: dict[str, Any]) -> Tensor:
        """Logits of each prompt's next token (B, V); the step's cache then holds the prompts."""
        mask_BS, positions_BS = given.get("attention_mask"), given.get("position_ids")
        if positions_BS is None:
            real_BS = torch.ones_like(prompt_BS) if mask_BS is None else mask_BS
            positions_BS = (real_BS.cumsum(-1) - 1).clamp_min(0)
        self.step.start(mask_BS)
        self.step.position_B1.copy_(positions_BS[:, -1:] + 1)
        read = given | {cache_name(self.model): self.step.cache, "position_ids": positions_BS}
        inputs = self.model.prepare_inputs_for_generation(
            prompt_BS, is_first_iteration=True, **read
        )
        return self.model(**inputs, return_dict=True).logits[:, -1].float()

    def _choose(self, ids_BN: Tensor, logits_BV: Tensor) -> Tensor:
        scores_BV = self.processors(ids_BN.contiguous(), logits_BV)
        if not self.config.do_sample:
            return scores_BV.argmax(-1)
        return scores_BV.softmax(-1).multinomial(1, generator=self.generator).squeeze(1)
