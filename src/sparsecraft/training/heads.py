"""Which loss a causal model can be trained on, asked of the model itself, before a run.

TRL's SFTTrainer never makes logits: it multiplies the trunk's hidden states by the output
embeddings, and knows scales and caps by the names that some families give them. Where the head does
more than that (BERT's transform, RecurrentGemma's cap) it would train another function than the one
that is evaluated and saved, and the model's own loss is the way.

Shapes: B rows, S tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from sparsecraft.dense.probes import random_probe
from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.outputs import inputs_of, undisturbed

PROBE = (2, 16)
# What the head reads, relative to what the probe gave it: small, as it is, and beyond any cap.
SCALES = (0.125, 1.0, 64.0)
# Largest difference, relative to the largest logit; TRL's is in float32 at most.
EQUAL, HALF_EQUAL = 1e-4, 5e-2


def head_is_plain(model: nn.Module) -> bool:
    """Whether TRL's fused head computes the log-probabilities of a causal model's own logits.

    Raises:
        SparsecraftError: it does not, and the model's own loss is not that of next tokens either.
    """
    probe = random_probe(model, shape=PROBE)
    inputs, ids = inputs_of(model, probe), probe["input_ids"].to(next(model.parameters()).device)
    with undisturbed(model), _without_a_loss_of_its_routers(model):
        scales = SCALES if _calls_its_trunk(model, inputs) else (1.0,)
        if all(_agrees(model, inputs, ids, scale) for scale in scales):
            return True
        wanted = -_next(model(**inputs).logits, ids).mean()
        try:
            loss = model(**inputs, labels=ids).loss
        except Exception as error:  # of whatever code the model has
            loss = error
    if isinstance(loss, Tensor) and _near(loss, wanted, wanted):
        return False
    raise SparsecraftError(
        f"{type(model).__name__} cannot be trained on next tokens here: its head is more than a "
        f"product with its output embeddings, and its own loss is another one ({loss!s:.150}). "
        "Train it in a loop or trainer of your own."
    )


def _calls_its_trunk(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the head reads what the trunk gives; BART's calls a part of it."""
    trunk, called = model.base_model, []
    handle = trunk.register_forward_hook(lambda *_: called.append(True))
    try:
        model(**inputs)
    finally:
        handle.remove()
    return trunk is not model and bool(called)


def _agrees(model: nn.Module, inputs: dict[str, Any], ids: Tensor, scale: float) -> bool:
    """Whether both heads give the same, of hidden states times `scale`."""
    with _scaled(model, scale):
        logits = model(**inputs).logits
        try:
            with _fused_head(model):
                found = model(**inputs, labels=ids, fused_lm_head=True).log_probs
        except Exception:  # a trunk or a head that is none of those it knows
            return False
    return _near(found, _next(logits, ids), logits)


def _next(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """Log-probabilities (B, S - 1) of the next tokens."""
    found_BSV = logits_BSV[:, :-1].float().log_softmax(-1)
    return found_BSV.gather(-1, ids_BS[:, 1:, None].to(found_BSV.device))[..., 0]


def _near(found: Tensor, wanted: Tensor, size: Tensor) -> bool:
    relative = HALF_EQUAL if size.dtype.itemsize == 2 else EQUAL
    tolerance = relative * size.abs().max().item()
    return torch.allclose(found.to(wanted), wanted, rtol=0, atol=tolerance)


@contextmanager
def _fused_head(model: nn.Module) -> Iterator[None]:
    before = vars(model).get("forward")
    add_fused_lm_head(model)
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


@contextmanager
def _scaled(model: nn.Module, scale: float) -> Iterator[None]:
    """Let the trunk give its hidden states times `scale`."""

    def multiply(module: nn.Module, args: tuple, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * scale
        return output

    handle = model.base_model.register_forward_hook(multiply) if scale != 1 else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def _without_a_loss_of_its_routers(model: nn.Module) -> Iterator[None]:
    """A mixture's own balance loss is none of next tokens."""
    config = model.config.get_text_config()
    on = getattr(config, "output_router_logits", None)
    if on:
        config.output_router_logits = False
    try:
        yield
    finally:
        if on:
            config.output_router_logits = on
