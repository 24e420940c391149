"""What every step of a training run is watched for: numbers that are not finite, and what moves.

A run that diverges ends with an error, before it changes or writes another weight. One number a
step waits for the device: whether the step's losses and the norm of its gradients are finite. Only
when they are not is it looked for what was the first to go wrong.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from sparsecraft.dense.sharing import own_part
from sparsecraft.dense.sound import check_weights, fault_of, is_finite
from sparsecraft.errors import SparsecraftError, TrainingError
from sparsecraft.training.engine import share_again
from sparsecraft.training.moved import Before, Evidence, found, say

log = logging.getLogger("sparsecraft")

ADVICE = (
    "Nothing was written over: what was saved before is as it was, and resume goes on from the "
    "last state, if save_every left one. Lower the learning rate, or look at the rows"
)


class WatchedTrainerMixin:
    """Put before a Trainer class: it refuses to go on with numbers that are not finite, and knows
    at the end what has trained.

    Attributes:
        evidence: what the steps have shown of every parameter.
        skipped: steps that the scaler of a float16 run left out, as it does until its scale fits.
    """

    skipped: int = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Trainer's own; behind the last micro-batch of a step all of it is looked at."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._in_step.append((inputs, loss))
        if self.accelerator.sync_gradients:
            self._check_step(model)
            self.evidence.note_rates(self.optimizer)
            self._last_inputs = inputs
            self._in_step.clear()
        return loss

    def log(self, logs, *args, **kwargs):
        """Trainer's own, of weights that are finite."""
        self.check_weights()
        super().log(logs, *args, **kwargs)

    def check_weights(self) -> None:
        """Refuse weights that are not finite, in whichever process they are.

        Raises:
            TrainingError: in all processes; the first tensor is named.
        """
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        trained = {n: own_part(p.detach()) for n, p in named if p.requires_grad}
        # A process may hold nothing of a small tensor that is shared.
        largest = get_total_norm([t for t in trained.values() if t.numel()], math.inf)
        if self._anywhere(~largest.isfinite()):
            faults = ((name, fault_of(tensor)) for name, tensor in trained.items())
            what = next((f"the weight {name!r} {fault}" for name, fault in faults if fault), "")
            raise self._error(self.state.global_step, what)

    def check_model(self) -> None:
        """Run the last batch again, without dropout: the last step may have broken the model.

        Raises:
            TrainingError: its loss is not finite.
        """
        self.check_weights()
        if self._last_inputs is None:
            return
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            parts = map(self._prepare_inputs, self.parts(self._last_inputs))
            loss = sum(self.compute_loss(self.model, part) for part in parts)
        self.model.train(training)
        share_again(self.model)
        if self._anywhere(~loss.isfinite()):
            found = self._first_output(self.model, [self._last_inputs])
            raise self._error(self.state.global_step, f"after it the loss is not finite; {found}")

    def moved(self, before: Before) -> dict[str, Any]:
        """What has moved since `before`, in words for the report; see `found`.

        Raises:
            TrainingError: something has changed that the stage does not train.
        """
        model = self.accelerator.unwrap_model(self.model)
        if self.optimizer is not None:  # none in a run that was complete before
            self.evidence.note_optimizer(model, self.optimizer)
        result = found(before, model, self.evidence)
        say(self.stage.name, result)
        return result

    @property
    def evidence(self) -> Evidence:
        return self.__dict__.setdefault("_evidence", Evidence())

    def _check_step(self, model: nn.Module) -> None:
        losses = torch.stack([loss.float() for _, loss in self._in_step]).sum()
        gradients = [own_part(p.grad) for p in model.parameters() if p.grad is not None]
        norm = get_total_norm(gradients).to(losses.device)
        scaler = getattr(self.accelerator, "scaler", None)
        scales = scaler is not None and scaler.is_enabled()
        if not self._anywhere(~(losses.isfinite() & norm.isfinite())):
            return
        loss_is_bad = self._anywhere(~losses.isfinite())
        if scales and not loss_is_bad and scaler.get_scale() >= 1:
            self.skipped += 1  # the scaler leaves the step out and halves its scale
            return
        raise self._error(self.state.global_step + 1, self._first(model, loss_is_bad))

    def _first(self, model: nn.Module, loss_is_bad: bool) -> str:
        """What of a step was the first that was not finite in this process; nothing where it was
        another that met it. All processes call this, and it makes all of them run as much."""
        model = self.accelerator.unwrap_model(model)
        output = self._first_output(model, [inputs for inputs, _ in self._in_step])
        try:
            check_weights(model, TrainingError)
        except TrainingError as error:
            return str(error)
        if loss_is_bad:
            own = any(not loss.isfinite() for _, loss in self._in_step)
            return f"the loss is not finite; {output}" if own else ""
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            if gradient is not None and not get_total_norm([own_part(gradient)]).isfinite():
                what = fault_of(own_part(gradient)) or "is too large for its own norm"
                return f"the gradient of {name!r} {what}"
        return ""

    def _first_output(self, model: nn.Module, batches: list[dict[str, Any]]) -> str:
        """The first module whose output is not finite, in a second pass over the batches."""
        with first_not_finite(model) as found:
            for part in (part for inputs in batches for part in self.parts(inputs)):
                self.compute_loss(model, self._prepare_inputs(part))
        if not found:
            return "the output of every module is finite"
        return f"the first output that is not is that of {found[0]!r}"

    def _anywhere(self, flag: Tensor) -> bool:
        """Whether a flag is up in any of the processes, which then all go the same way."""
        return bool(self.accelerator.reduce(flag.float().to(self.args.device), "sum") > 0)

    def _error(self, step: int, what: str) -> SparsecraftError:
        found = [text for text in gather_object([what]) if text]
        return TrainingError(f"The run diverged in step {step}: {next(iter(found), '')}. {ADVICE}.")

    @property
    def _in_step(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Inputs and loss of each micro-batch of this step."""
        return self.__dict__.setdefault("_micro_batches", [])

    _last_inputs: dict[str, Any] | None = None

    # ------------------------------------------------------------------ Private hooks of Trainer

    def _save_checkpoint(self, model, trial):
        """A state for `resume` is one that can be gone on from."""
        self.check_model()
        super()._save_checkpoint(model, trial)


@contextmanager
def first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """The list that the block's forward passes fill with the names of modules whose output is not
    finite, the first to end first."""
    found: list[str] = []

    def hook(name: str):
        def look(module: nn.Module, args: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]
            if not all(is_finite(tensor) for tensor in tensors):
                found.append(name)

        return look

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def checked_losses(stage: str, layers: list[str], loss_L: Tensor) -> Tensor:
    """The losses of a fit, one for each layer, if they are finite.

    Raises:
        TrainingError: a layer is named.
    """
    for name, loss in zip(layers, loss_L.tolist(), strict=True):
        if not math.isfinite(loss):
            raise TrainingError(
                f"Stage {stage!r} diverged: the loss of {name!r} is {loss}. The model is as it "
                "was; lower the stage's learning rate, or look at the rows."
            )
    return loss_L
