"""How many rows a trainer passes at a time: chosen before the first step, and half of them where
memory runs out in one."""

from __future__ import annotations

import gc
import logging
from typing import Any

import torch
from torch import Tensor

from sparsecraft.data.batches import halves
from sparsecraft.dense.memory import is_out_of_memory, what_was_missing
from sparsecraft.errors import ResourceError
from sparsecraft.moe.own_loss import OwnLoss
from sparsecraft.surgery.record import conversion_of
from sparsecraft.training.arguments import processes
from sparsecraft.training.engine import kept_buffers

log = logging.getLogger("sparsecraft")

LOWER = (
    "lower --micro-batch (micro_batch=1) or recompute what the backward pass needs by "
    "--activation-checkpointing (activation_checkpointing=True), with --resume (resume=True) if a "
    "state was saved, or train anew with a lower --max-length (max_length=...)"
)


class MicroBatchMixin:
    """Put before a Trainer class: once in a run, a step that runs out of memory is repeated with
    every micro-batch in two halves, and so are all that follow. Losses and gradients are the same,
    because they do not depend on how a step's batch is cut.

    Attributes:
        halved: whether that has come to pass.
    """

    halved: bool = False

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Trainer's own of all inputs, or of their halves.

        Raises:
            ResourceError: halves do not fit either, or there are none to try.
        """
        if not self._in_step:
            self._tally_before = self.tally.copy()
            self._step_before = self._own_loss(model).step.copy()
            self._give_buffers_back = kept_buffers(model)
        done = [batch for batch, _ in self._in_step]
        try:
            return self._passes(model, inputs, num_items_in_batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._check_halves(inputs, error)
            missing = what_was_missing(error)
        # Outside of the block above, whose error holds what filled the memory.
        rows = len(inputs["labels"])
        log.warning(
            f"Memory ran out in step {self.state.global_step + 1}: {missing}. The step is repeated "
            f"with micro-batches of {rows - rows // 2} rows instead of {rows}, and so are all that "
            "follow; losses and gradients are the same, but for rounding and what dropout draws."
        )
        self.halved = True
        self._forget_step(model)
        try:
            for batch in done:  # their losses have been counted
                self._passes(model, batch, num_items_in_batch)
            return self._passes(model, inputs, num_items_in_batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_large(inputs, error) from error

    def parts(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """What of a micro-batch passes at a time."""
        return halves(inputs) if self.halved and len(inputs["labels"]) > 1 else [inputs]

    def set_micro_batch(self, rows: int) -> None:
        """Take `rows` at a time, of as many a step as before."""
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self.args.per_device_train_batch_size = rows
        self.args.gradient_accumulation_steps = batch // rows
        self._train_batch_size = self.args.train_batch_size

    def _own_loss(self, model: Any) -> OwnLoss:
        return conversion_of(self.accelerator.unwrap_model(model)).own_loss

    def _passes(self, model: Any, inputs: dict[str, Any], num_items: Any) -> Tensor:
        step = super().training_step
        return sum(step(model, part, num_items) for part in self.parts(inputs))

    def _check_halves(self, inputs: dict[str, Any], error: Exception) -> None:
        """Refuse where nothing is left to try: other processes would wait for sums of gradients
        that this one has not come to."""
        if self.halved or len(inputs["labels"]) == 1 or processes() > 1:
            raise self._too_large(inputs, error) from error

    def _too_large(self, inputs: dict[str, Any], error: Exception) -> ResourceError:
        rows, tokens = len(inputs["labels"]), inputs["input_ids"].shape[1]
        halves = ", in halves too" if self.halved and rows > 1 else ""
        return ResourceError(
            f"Memory ran out in step {self.state.global_step + 1} with a micro-batch of {rows} x "
            f"{tokens} tokens{halves}: {what_was_missing(error)}; {LOWER}."
        )

    def _forget_step(self, model: Any) -> None:
        """Let go of what the step has left so far."""
        model.zero_grad()
        self.tally = self._tally_before
        self._own_loss(model).step = self._step_before
        self._give_buffers_back()
        gc.collect()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
