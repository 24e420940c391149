"""The recipe's auxiliary losses in the model's own loss, in any training.

`sc.train` adds them itself. In a loop or trainer of the user's, the model adds them wherever it
gives a loss in training; where that is not the loss that is trained on, a warning says so.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.batches import tensors_in
from sparsecraft.moe.context import layer_masks
from sparsecraft.moe.items import count_items, shifts, shifts_labels, weighed
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.losses import auxiliary_loss as sum_of_losses
from sparsecraft.moe.losses import of_samples
from sparsecraft.moe.routing import Routing
from sparsecraft.moe.scopes import Blocks, PerThread
from sparsecraft.moe.steps import Step
from sparsecraft.moe.traces import Trace
from sparsecraft.moe.tracing import trace
from sparsecraft.recipe.stages import Stage

log = logging.getLogger("sparsecraft")

NOT_IN_THE_LOSS = (
    "The recipe has auxiliary losses (such as load balance), and the loss that is trained on does "
    "not hold them: it is not the one that the model gave (SFTTrainer's, DPO's and GRPO's are "
    "computed from its outputs). Add sc.losses.latest(model) to it, train with sc.train, or set "
    "model.sparsecraft.own_loss.losses = {} to go without."
)
IN_EVALUATION = (
    "The model was trained on in evaluation mode, as it is loaded and converted: without the "
    "recipe's auxiliary losses (such as load balance) and without dropout. Call model.train() "
    "first, or set model.sparsecraft.own_loss.losses = {} to go without."
)


@dataclass(slots=True)
class _Call:
    """A forward pass that is under way: of which module, with what inputs, and its trace."""

    module: nn.Module
    inputs: dict[str, Any]
    losses: Mapping[str, float]
    labels: Tensor | None
    num_items: Any
    traced: AbstractContextManager[Trace]
    trace: Trace


class _Passes:
    """The forward passes in training of one thread.

    Attributes:
        call: what is under way.
        latest: the weighted sum of the latest one; None if nothing is added.
        items: over which its loss is a mean; None without labels.
    """

    def __init__(self):
        self.call: _Call | None = None
        self.latest: Tensor | None = None
        self.items: Tensor | None = None


OFF = Blocks("own losses that are off")


class OwnLoss:
    """Forward hooks that add auxiliary losses to the loss that a model gives in training.

    A model that is given `num_items_in_batch` beside its labels, as Trainer does for the batch of
    an optimizer step, gives the mean over its own items times their share of that number, whether
    or not its head knows the argument (T5's and BERT's do not): task and auxiliary losses keep
    their balance, however the batch is cut.

    Attributes:
        losses: name in `sc.losses.LOSSES` -> coefficient; None for those of the recipe's next
            stage at their full value, {} for none.
        shifts: whether the model's loss shifts its labels; None until a pass has shown it.
        warned: whether it was said that a backward pass went without them.
        step: what routers have done since the last optimizer step, where they move with it.
    """

    def __init__(self, stage: Callable[[], Stage | None]):
        self.stage = stage
        self.losses: dict[str, float] | None = None
        self.shifts: bool | None = None
        self.warned = False
        self.handles: list[Any] = []
        self.step = Step()
        self._passes = PerThread(_Passes)

    def attach(self, model: nn.Module) -> None:
        """Listen to `model`, and to its trunk, which may be called without the head."""
        trunk = getattr(model, "base_model", model)
        self.meet_routers(model)
        for module in dict.fromkeys((model, trunk)):
            before = partial(self._before, whole=module is model)
            self.handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]

    def meet_routers(self, model: nn.Module) -> None:
        """Know whether the state of any router moves, and forget what was noted of others."""
        self.step = Step(model)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict, whole: bool):
        # Evaluation stays one graph for torch.compile.
        if not (module.training and torch.is_grad_enabled()):
            return None
        return self._begin(module, args, kwargs, whole)

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict, whole: bool):
        passes = self._passes.own
        if passes.call is not None and not whole:  # the trunk, inside the model's pass
            return None
        inputs = dict(zip(inspect.signature(module.forward).parameters, args, strict=False))
        inputs |= kwargs
        labels = inputs.get("shift_labels", inputs.get("labels"))
        labels = labels if isinstance(labels, Tensor) else None
        num_items = None if labels is None else kwargs.pop("num_items_in_batch", None)
        losses = self.in_force(module)
        passes.call, passes.latest, passes.items = None, None, None
        moves = bool(self.step.layers) and not self.is_off
        if moves:
            self.step.move_if_trained()
        if losses or num_items is not None or moves:
            traced = trace(module, inputs=of_samples(losses))
            opened = traced.__enter__()
            passes.call = _Call(module, inputs, losses, labels, num_items, traced, opened)
        return args, kwargs

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if module.training:
            return self._end(module, output) if torch.is_grad_enabled() else None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._watch_evaluation(module, output)
        return None

    def _watch_evaluation(self, module: nn.Module, output: Any) -> None:
        """Say so if parameters are trained in a pass to which nothing was added."""
        if self.warned or self._passes.own.call is not None:
            return

        def unmet() -> str | None:
            trains = any(p.grad is not None for p in module.parameters())
            return IN_EVALUATION if trains and self.in_force(module) else None

        _Watch(self, unmet).listen(output)

    @torch.compiler.disable
    def _end(self, module: nn.Module, output: Any) -> Any:
        passes = self._passes.own
        call = passes.call
        if call is None or call.module is not module:
            return None
        passes.call = None
        routings = dict(call.trace)
        call.traced.__exit__(None, None, None)
        if output is None:  # the pass has failed
            return None
        masks = layer_masks(module, call.inputs, None, routings)
        if not self.is_off:
            self.step.note(module, routings, masks)
        passes.latest, _ = balance_of(module, routings, call.losses, masks)
        if passes.latest is not None and not self.warned:
            _Watch(self, _reached(passes.latest)).listen(output)
        loss = _loss_of(output, call.inputs)
        is_mean = self._count(passes, call, output, loss)
        if loss is not None:
            output = _with_loss(output, _own(passes, loss, call.num_items, is_mean))
        return output

    def _count(self, passes: _Passes, call: _Call, output: Any, loss: Tensor | None) -> bool:
        """Note the items of a pass; whether its loss is a mean over them, as CTC's is not."""
        labels, logits = call.labels, getattr(output, "logits", None)
        if labels is None:
            return False
        shifted, of_tokens = False, not labels.is_floating_point() and labels.ndim == 2
        fits = logits is None or logits.shape[:-1] == labels.shape
        if of_tokens and "shift_labels" not in call.inputs:
            if self.shifts is None and fits and logits is not None and loss is not None:
                with torch.no_grad():
                    self.shifts = shifts(labels, logits, loss)
            shifted = shifts_labels(call.module) if self.shifts is None else self.shifts
        passes.items = count_items(labels, shifted)
        return fits or not of_tokens

    def read(self, model: nn.Module, num_items: Tensor | int | None) -> Tensor:
        """What `sc.losses.latest` gives."""
        passes = self._passes.own
        if passes.latest is None:
            if not self.in_force(model):
                return torch.zeros((), dtype=torch.float32, device=next(model.parameters()).device)
            raise SparsecraftError(
                "There is no auxiliary loss: no forward pass in training, with gradients, came "
                "before in this thread. Call model.train() and the model first."
            )
        if num_items is None:
            return passes.latest
        if passes.items is None:
            raise SparsecraftError(
                "num_items_in_batch was given, and the latest forward pass had no labels that say "
                "how many of these items it holds; pass labels to the model, or leave it out."
            )
        return weighed(passes.latest, passes.items, num_items)

    def off(self) -> AbstractContextManager[None]:
        """In this block the model's loss is the task's alone, for a trainer that adds the rest."""
        return OFF.opened(self)

    @property
    def is_off(self) -> bool:
        """Whether a trainer does in its place what is to be done."""
        return any(own is self for own in OFF.now())

    def in_force(self, model: nn.Module) -> Mapping[str, float]:
        """The coefficients that count now.

        Raises:
            SparsecraftError: the model runs as one of several copies, whose routing is not seen.
        """
        if self.is_off:
            return {}
        stage = self.stage()
        losses = self.losses
        if losses is None:
            losses = {} if stage is None else stage.losses
        losses = {name: coefficient for name, coefficient in losses.items() if coefficient}
        if (losses or self.step.layers) and getattr(model, "_is_replica", False):
            raise SparsecraftError(
                "The recipe has routing losses, or routers that move with each step, and the model "
                "runs as copies on several GPUs, where they are not seen. Launch one process for "
                "each GPU with torchrun."
            )
        why = self.losses is None and losses and needs_train(model, stage)
        if not why:
            return losses
        if not self.warned:
            self.warned = True
            log.warning(
                f"Stage {stage.name!r} of the recipe has the losses {', '.join(losses)}, and "
                f"{why}, which sc.train does; this training goes without them. "
                "model.sparsecraft.own_loss.losses = {} says that it shall."
            )
        return {}


def _own(passes: _Passes, loss: Tensor, num_items: Any, is_mean: bool) -> Tensor:
    """A pass's own loss, and what is added to it."""
    extra = 0.0 if passes.latest is None else passes.latest.to(loss.device)
    if num_items is None:
        return loss + extra
    if is_mean:
        return weighed(loss + extra, passes.items, num_items)
    return loss if passes.latest is None else loss + weighed(extra, passes.items, num_items)


class _Watch:
    """Says once what is wrong with a backward pass through a model's outputs.

    Args:
        unmet: asked at the end of the pass; None if nothing is.
    """

    def __init__(self, own: OwnLoss, unmet: Callable[[], str | None]):
        self.own, self.unmet, self.asked = own, unmet, False

    def listen(self, output: Any) -> None:
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(self._passes)

    def _passes(self, grad: Tensor) -> None:
        if not self.asked:
            self.asked = True
            torch.autograd.Variable._execution_engine.queue_callback(self._tell)

    def _tell(self) -> None:
        self.asked = False
        if not self.own.warned and (words := self.unmet()):
            self.own.warned = True
            log.warning(words)


def _reached(loss: Tensor) -> Callable[[], str | None]:
    """Whether a backward pass comes to an auxiliary loss."""
    came = []
    loss.register_hook(lambda grad: came.append(True))
    return lambda: None if came else NOT_IN_THE_LOSS


def needs_train(model: nn.Module, stage: Stage | None) -> str | None:
    """Why losses of a stage mean nothing in a training that only runs the model; None if they do.

    They are of split networks that run in another way, or of rows that are assigned to experts.
    """
    if stage is None:
        return None
    if stage.deals:
        return "they are of rows that are assigned to experts first"
    routers = [m.router for m in model.modules() if isinstance(m, MoELayer) and m.router]
    for router in routers:
        if router.spec.splits and router.runs != stage.runs:
            return f"they need split networks that run {stage.runs!r}"
        if router.spec.splits and stage.activation == "relu" and not router.running.rectified:
            return "they need ReLU in the split networks"
    return None


def balance_of(
    model: nn.Module,
    routings: Mapping[str, Routing],
    losses: Mapping[str, float],
    masks: Callable[[str], Tensor | None],
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """`sc.losses.auxiliary_loss` of the layers whose routers count; None if there is nothing to
    add.

    Raises:
        SparsecraftError: the layers ran without gradients, and their routers train.
    """
    layers = {name: model.get_submodule(name) for name in routings}
    counted = {name: r for name, r in routings.items() if layers[name].router.spec.balanced}
    total, parts = sum_of_losses(
        counted,
        losses,
        masks,
        # Those that imitate attention's Linears are averaged apart.
        lambda name: "imitate" if layers[name].is_imitation else "",
    )
    if total is None or total.requires_grad:
        return total, parts
    trained = any(p.requires_grad for name in counted for p in layers[name].router.parameters())
    if trained:
        raise SparsecraftError(
            "The auxiliary loss has no gradient: reentrant activation checkpointing runs the "
            "layers without one. Use use_reentrant=False."
        )
    return None, parts


def _loss_of(output: Any, inputs: dict[str, Any]) -> Tensor | None:
    if isinstance(output, Mapping):
        return output.get("loss")
    labelled = isinstance(output, tuple) and inputs.get("labels") is not None
    return output[0] if labelled else None


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, tuple):
        return loss, *output[1:]
    output["loss"] = loss
    return output
