"""What a model gives for some inputs, measured without leaving a trace on it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.dense.tokens import is_encoder_decoder
from sparsecraft.dense.twins import HERE
from sparsecraft.errors import DataError
from sparsecraft.moe.context import sentence_width
from sparsecraft.moe.layer import MoELayer

_LOCK = threading.Lock()
_HELD: dict[nn.Module, tuple[int, bool]] = {}  # how many blocks hold a module in evaluation mode


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, then each back in its own mode, once the last of the blocks
    of all threads that hold it there has ended."""
    modules = [*model.modules()]
    with _LOCK:
        for module in modules:
            count, training = _HELD.get(module, (0, module.training))
            _HELD[module] = count + 1, training
        model.eval()
    try:
        yield
    finally:
        with _LOCK:
            for module in modules:
                count, training = _HELD.pop(module)
                if count > 1:
                    _HELD[module] = count - 1, training
                else:  # not train(): that would reach into modules of another mode
                    module.training = training


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode and by the same random numbers each time; then all is as it
    was: modes, random states, and what dense modules note of a batch, such as frequencies that grew
    with a long one. What layers of ours note, `trace` asked for."""
    dense = [m for m in model.modules() if not isinstance(m, MoELayer)]
    noted = [(m, {**vars(m)}, {**m._buffers}) for m in dense]
    cuda = {p.device for p in model.parameters() if p.is_cuda}
    compiled = any(m._compiled_call_impl for m in dense)  # what is exchanged meanwhile, it misses
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    random = torch.random.fork_rng(devices=list(cuda))
    with evaluation_mode(model), torch.no_grad(), random, eager:
        torch.manual_seed(0)
        try:
            yield
        finally:
            for module, attributes, buffers in noted:
                for name in vars(module).keys() - attributes.keys():
                    del vars(module)[name]
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)


def outputs(model: nn.Module, batches: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The model's logits (or last hidden states) on each batch, in evaluation mode, on the CPU."""
    with undisturbed(model):
        return [output_of(model(**inputs_of(model, batch))).cpu() for batch in batches]


def output_of(output: Any) -> Tensor:
    """Logits or, of a model without a head, last hidden states; of towers of text and images, the
    similarity of each text and image."""
    for name in ("logits", "logits_per_text", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    return next(value for value in output.to_tuple() if isinstance(value, Tensor))


def inputs_of(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as the model takes it, without labels, and without a cache."""
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device  # weights come at the call
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    inputs = {key: _to(value, device, floating) for key, value in batch.items() if key != "labels"}
    if is_encoder_decoder(model) and "input_ids" in inputs:
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    if width := sentence_width(model):
        rows = len(next(iter(inputs.values())))
        inputs.setdefault("sentence_embeddings", _random_sentences(rows, width))
    if "use_cache" in inspect.signature(model.forward).parameters or _has_cache(model):
        inputs.setdefault("use_cache", False)
    return inputs


def decoder_ids(model: nn.Module, labels: Tensor) -> Tensor:
    """(B, S) of what a decoder beside an encoder reads, to predict labels (B, S)."""
    if prepare := getattr(model, "prepare_decoder_input_ids_from_labels", None):
        return prepare(labels=labels)
    # M2M100, NLLB-MoE, Blenderbot, SeamlessM4T: in their forward, in the same way.
    shifted = labels.roll(1, -1)
    shifted[:, 0] = model.config.decoder_start_token_id
    return shifted.masked_fill(shifted == -100, model.config.pad_token_id)


def _has_cache(model: nn.Module) -> bool:
    """Whether the model passes `use_cache` on to a trunk that knows it."""
    return bool(getattr(model.config.get_text_config(), "use_cache", None)) and any(
        parameter.kind is parameter.VAR_KEYWORD
        for parameter in inspect.signature(model.forward).parameters.values()
    )


def _random_sentences(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0), **HERE)


def _to(value: Any, device: torch.device, floating: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor):
        raise DataError(f"A probe batch holds a {type(value).__name__}; it must hold tensors.")
    value = value.to(device)
    return value.to(floating) if value.is_floating_point() and floating else value
