"""Batches: the batch of every forward pass of one model, in whatever thread it runs.

A forward pass has a batch of its own, which the layers find by their thread while it is under way.
Activation checkpointing runs layers again in the backward pass, on a GPU in a thread of torch's:
there it is found by the backward pass that goes through its outputs.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.dense.tokens import can_generate, is_encoder_decoder
from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.batch import OURS, Batch
from sparsecraft.moe.masks import of_frames
from sparsecraft.moe.scopes import Blocks, PerThread


@dataclass(frozen=True, eq=False)
class Held:
    """The values of a `context` that is open."""

    batches: Batches
    values: dict[str, Tensor]


CONTEXTS = Blocks("contexts")


class _Thread:
    """A thread's forward pass that is under way.

    Attributes:
        batch: None between passes.
        begin: the hook that began it.
        gone_back: the batch of the forward pass that a backward pass of this thread has come to.
    """

    def __init__(self):
        self.batch: Batch | None = None
        self.begin: _Begin | None = None
        self.gone_back: Batch | None = None


class Batches:
    """All layers of a model that ask for batches share one of these.

    Args:
        grows: see `Batch`.
    """

    def __init__(self, grows: bool = False):
        self.grows = grows
        self._thread = PerThread(_Thread)
        self._lock = threading.Lock()
        self._kept: weakref.WeakSet[Batch] = weakref.WeakSet()  # by the graphs of their outputs

    def __getstate__(self) -> dict[str, Any]:
        return {"grows": self.grows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def now(self) -> Batch:
        """That of the forward pass which a layer of this thread runs in, or runs again for; that
        of no pass for a layer that is called by itself.

        Raises:
            SparsecraftError: a backward pass goes through several forward passes, and one of them
                is computed again.
        """
        thread = self.thread
        if thread.batch is not None:
            return thread.batch
        if torch.compiler.is_dynamo_compiling():
            return self.new() if thread.gone_back is None else thread.gone_back
        task = torch._C._current_graph_task_id()
        return self.new() if task == -1 else self._computed_again(task)

    def new(self) -> Batch:
        """A batch of what the contexts hold that are open."""
        held: dict[str, Tensor] = {}
        for block in CONTEXTS.now():
            if block.batches is self:
                held.update(block.values)
        return Batch(**held, held=held, grows=self.grows)

    @property
    def thread(self) -> _Thread:
        return self._thread.own

    def keep(self, batch: Batch, output: Any) -> None:
        """Until there is no way back from the outputs of its pass."""
        with self._lock:
            self._kept.add(batch)
        hook = functools.partial(self._goes_back, batch)
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(hook)

    def _goes_back(self, batch: Batch, grad: Tensor) -> None:
        """A hook of a pass's outputs: a backward pass has come to them."""
        task, thread = torch._C._current_graph_task_id(), self.thread

        def done() -> None:
            thread.gone_back = None

        if batch.backward != task:  # the first of its outputs
            batch.backward = task
            torch.autograd.Variable._execution_engine.queue_callback(done)
        thread.gone_back = batch

    def _computed_again(self, task: int) -> Batch:
        with self._lock:
            kept = list(self._kept)
        # One that came by another way than the outputs is of the only pass that there is.
        found = [batch for batch in kept if batch.backward == task] or kept
        if len(found) > 1:
            raise SparsecraftError(
                "Activation checkpointing computes a layer again that reads masks or sentences, "
                "and the backward pass goes through several forward passes, which have their own; "
                "run a backward pass for each of them, or turn checkpointing off."
            )
        return found[0] if found else self.new()


class _Begin:
    """A forward pre-hook; an object, so that a deep copy of the model has its own batches.

    Args:
        whole: of the whole model, and not of its encoder or trunk, which users and generation call
            by themselves.
        adds: of a part: what it is called with inside of the model's pass belongs to the batch.
    """

    def __init__(self, batches: Batches, whole: bool = True, adds: bool = False):
        self.batches, self.whole, self.adds = batches, whole, adds

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        thread = self.batches.thread
        if self.whole or thread.batch is None:
            thread.batch, thread.begin = self.batches.new(), self
        elif not self.adds:
            return args, kwargs
        ours = {name: kwargs.pop(name) for name in OURS if name in kwargs}
        signature = inspect.signature(module.forward)
        given = signature.bind_partial(*args, **kwargs).arguments
        given = given | given.get("kwargs", {}) | ours
        mask = given.get("attention_mask")
        if getattr(mask, "ndim", 0) == 2:
            given["attention_mask"] = of_frames(module, mask)
        thread.batch.fill(given)
        if "mm_token_type_ids" not in signature.parameters:
            kwargs.pop("mm_token_type_ids", None)
        return args, kwargs


class _End:
    """A forward hook: the pass that `begin` began is over, and its outputs tell when a backward
    pass comes to it."""

    def __init__(self, begin: _Begin):
        self.begin = begin

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        batches = self.begin.batches
        thread = batches.thread
        if thread.begin is not self.begin:
            return
        batch, thread.batch, thread.begin = thread.batch, None, None
        traced = torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()
        if output is not None and torch.is_grad_enabled() and not traced:
            batches.keep(batch, output)


def batches_of(model: nn.Module) -> Batches | None:
    """What the layers share that ask for batches; None if none does."""
    found = (getattr(module, "batches", None) for module in model.modules())
    return next((batches for batches in found if isinstance(batches, Batches)), None)


def attach(model: nn.Module, batches: Batches) -> list:
    """Let every forward pass of `model`, and of its trunk or encoder alone, have a batch; the
    handles."""
    decoder = is_encoder_decoder(model)
    batches.grows = not decoder and can_generate(model)
    begins = {getattr(model, "base_model", model): _Begin(batches, whole=False)}
    if decoder:
        begins[model.get_encoder()] = _Begin(batches, whole=False, adds=True)
    begins[model] = _Begin(batches)
    return [
        handle
        for module, begin in begins.items()
        for handle in (
            module.register_forward_pre_hook(begin, with_kwargs=True),
            module.register_forward_hook(_End(begin), always_call=True),
        )
    ]


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Every tensor of a model's output, those in tuples (hidden states) too."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (dict, tuple, list)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from tensors_in(value)
