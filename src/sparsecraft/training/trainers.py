"""What our training adds to transformers' and TRL's trainers, in one mixin.

Auxiliary losses from the trace, router and experts in their own optimizer groups, routing
statistics beside the loss. Everything that overrides or calls a private method of Trainer stands
under "Private hooks" of its mixin.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback
from trl import SFTTrainer

from sparsecraft.data.encoding import IGNORED
from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.context import layer_masks, real_tokens
from sparsecraft.moe.items import count_items, weighed
from sparsecraft.moe.losses import of_samples
from sparsecraft.moe.own_loss import balance_of
from sparsecraft.moe.tracing import trace
from sparsecraft.recipe.stages import Stage
from sparsecraft.surgery.record import conversion_of
from sparsecraft.surgery.trainable import matches
from sparsecraft.training.micro_batches import MicroBatchMixin
from sparsecraft.training.saturation import Saturation
from sparsecraft.training.states import StatesMixin
from sparsecraft.training.tally import Tally
from sparsecraft.training.watch import WatchedTrainerMixin

log = logging.getLogger("sparsecraft")

TOKEN_MASK = "token_mask"


class RoutedTrainerMixin:
    """Put before a Trainer class; set `stage` before training.

    A step's loss and gradients do not depend on how its batch is cut into micro-batches and over
    processes: each micro-batch's loss, a mean over its items (label tokens, or rows of a
    classifier), and its auxiliary losses are weighed by its share of the whole batch's items.
    Trainer leaves that to the model where `forward` has **kwargs, which T5 and BERT ignore.

    Attributes:
        shifts_labels: the first label of a row is no item, because none predicts it.
    """

    stage: Stage
    router_learning_rate: float
    shifts_labels = False
    loss_is_scaled_for_ga = False  # Trainer divides by the accumulation steps, which is taken back
    flops_of_one: int | None = None  # of a token, as Trainer counts them

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the same, before transformers 5.19
        self.add_callback(LogsWhatEnds())
        self.add_callback(TellsParts())
        self.tally = Tally()
        self.saturation = Saturation(self)
        self.add_callback(self.saturation)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and the number of items of all processes' together."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        self._ignore_repeats(samples[-1])
        items = sum(count_items(batch["labels"], self.shifts_labels) for batch in samples)
        return samples, self.accelerator.reduce(items.to(device), "sum")

    def _ignore_repeats(self, batch: dict[str, Tensor]) -> None:
        """Take out the rows that fill up the last batch of an epoch, so that all processes have
        one: they have been in the epoch. accelerate's own count of them does not know an epoch
        that is gone on with."""
        processes = self.accelerator.num_processes
        if processes == 1 or not self.accelerator.gradient_state.end_of_dataloader:
            return
        size = self.args.per_device_train_batch_size
        if rest := len(self.train_dataset) % (size * processes):
            own = max(0, rest - size * self.accelerator.process_index)
            batch["labels"] = batch["labels"].clone()
            batch["labels"][own:] = IGNORED
            if TOKEN_MASK in batch:
                batch[TOKEN_MASK] = batch[TOKEN_MASK].clone()
                batch[TOKEN_MASK][own:] = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The task's loss and in training the stage's auxiliary losses, by the share of the items
        of the step's batch that these inputs hold; without their number they count as all."""
        token_mask = inputs.pop(TOKEN_MASK, None)
        # accelerate looks at every module of it.
        unwrapped = model if model is self.model else self.accelerator.unwrap_model(model)
        self._tell_step(unwrapped)
        items = count_items(inputs["labels"], self.shifts_labels)
        traces = trace(unwrapped, inputs=model.training and of_samples(self.stage.losses))
        with traces as traced, conversion_of(unwrapped).own_loss.off():
            masks = layer_masks(unwrapped, inputs, token_mask, traced)
            # Without a number of items: the mean over these, in all of transformers' models.
            with self.accelerator.autocast(), real_tokens(unwrapped, token_mask):
                # accelerate puts no autocast around what FSDP2 shares
                result = self._task_loss(model, inputs, return_outputs)
            routings = dict(traced)
        num_items = items if num_items_in_batch is None else num_items_in_batch
        loss = result[0] if return_outputs else result
        if model.training:
            conversion_of(unwrapped).own_loss.step.note(unwrapped, routings, masks)
            share = items / num_items.clamp_min(1)
            auxiliary = self._auxiliary(unwrapped, routings, masks, share)
            loss = loss if auxiliary is None else loss + auxiliary.to(loss.device)
        loss = weighed(loss, items, num_items)
        if num_items_in_batch is not None:  # Trainer divides by these, DDP averages over those
            loss = loss * self.current_gradient_accumulation_steps * self.accelerator.num_processes
        return (loss, *result[1:]) if return_outputs else loss

    def _task_loss(self, model, inputs, return_outputs):
        """The mean over the items of these inputs, and the outputs if asked for."""
        return super().compute_loss(model, inputs, return_outputs=return_outputs)

    def _auxiliary(self, model, routings, masks, share) -> Tensor | None:
        """The stage's auxiliary losses, and what the next log line says of the routing."""
        if self.stage.losses and not routings and self._has_routers():
            raise SparsecraftError(
                "The stage has routing losses, and no router was seen in the forward pass: the "
                "model runs as copies. Launch one process for each GPU with torchrun."
            )
        if self._logs_next() and self.stage.runs != "every":  # else nothing was routed
            for layer, routing in routings.items():
                self.tally.add_routing(layer, routing, masks(layer))
        coefficients = {name: c * self._loss_factor() for name, c in self.stage.losses.items()}
        auxiliary, parts = balance_of(model, routings, coefficients, masks)
        for name, value in parts.items():
            self.tally.add(f"{name}_loss", value.detach(), share)
        return auxiliary

    def _logs_next(self) -> bool:
        """Whether the step that is under way will be logged."""
        step, args = self.state.global_step + 1, self.args
        saves = args.save_strategy == "steps" and step % args.save_steps == 0
        return step in (1, args.max_steps) or step % args.logging_steps == 0 or saves

    def _tell_step(self, model: torch.nn.Module) -> None:
        """Let the routers that sample cool down, and experts know what this step leaves alone,
        also where a run is resumed."""
        for layer in conversion_of(model).layers:
            layer.experts.at_step(self.state.global_step, self.args.seed)
            if layer.router is not None:
                layer.router.at_step(self.state.global_step)

    def _loss_factor(self) -> float:
        """Of the auxiliary losses at this step, see the stage's `schedule`."""
        done = self.state.global_step / max(1, self.args.max_steps)
        match self.stage.loss_schedule:
            case "linear":
                return done
            case "linear_warmup":
                return min(1.0, 2 * done)
        return 1.0

    def _has_routers(self) -> bool:
        layers = conversion_of(self.accelerator.unwrap_model(self.model)).layers
        return any(layer.router is not None for layer in layers)

    def create_optimizer(self, model=None):
        """Experts (and whatever else trains) and router in groups of their own."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            if self.stage.optimizer == "adafactor":  # Trainer's own turns this off
                options["scale_parameter"] = True
            self.optimizer = optimizer_class(self._parameter_groups(model), **options)
        return self.optimizer

    def _parameter_groups(self, model) -> list[dict]:
        decayed = set(self.get_decay_parameter_names(model))
        groups = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[matches(name, "router"), name in decayed].append(parameter)
        return [
            {
                "params": parameters,
                "lr": self.router_learning_rate if router else self.args.learning_rate,
                "weight_decay": self.args.weight_decay if decay else 0.0,
            }
            for (router, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]

    def floating_point_ops(self, inputs):
        """Trainer's own, of parameters that are counted once: it walks through all modules."""
        name = getattr(self.model, "main_input_name", "input_ids")
        if self.flops_of_one is None:
            self.flops_of_one = super().floating_point_ops({name: torch.zeros(1)})
        return self.flops_of_one * inputs[name].numel() if name in inputs else 0

    def log(self, logs, *args, **kwargs):
        """Add what each layer's router does, and the means over layers, to what is logged."""
        logs.update(self.tally.pop(lambda vector: self.accelerator.reduce(vector, "sum")))
        if "loss" in logs:
            logs.update(self.saturation.shares(saves=self.control.should_save))
        super().log(logs, *args, **kwargs)


@contextmanager
def adapters_known(model: torch.nn.Module) -> Iterator[None]:
    """Tell Trainer that a quantized model has something to train: it knows PEFT's adapters only."""
    if getattr(model, "is_quantized", False):
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        vars(model).pop("_hf_peft_config_loaded", None)


class LogsWhatEnds(TrainerCallback):
    """Log the last step, and that before a state: Trainer sums over processes what it logs, and
    forgets on resuming what it has not."""

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True


class TellsParts(TrainerCallback):
    """Let experts know that gradients are complete: some leave parameters out of a step; and
    routers that have states which move with it."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        conversion_of(model).own_loss.meet_routers(model)  # what measured memory is of no step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        record = conversion_of(model)
        for layer in record.layers:
            layer.experts.before_update()
        record.own_loss.step.move()

    def on_train_end(self, args, state, control, model=None, **kwargs):
        layers = (layer for layer in conversion_of(model).layers if layer.router is not None)
        unfinished = (state.unfinished() for layer in layers for state in layer.router.moving)
        for words in dict.fromkeys(filter(None, unfinished)):
            log.warning(words)


class OurTrainerMixin(WatchedTrainerMixin, MicroBatchMixin, RoutedTrainerMixin, StatesMixin):
    """All of it, put before a Trainer class."""


class RoutedSFTTrainer(OurTrainerMixin, SFTTrainer):
    """Causal language models."""

    shifts_labels = True

    def _task_loss(self, model, inputs, return_outputs):
        """TRL's loss, from its fused head. TRL itself asks all processes for every micro-batch's
        entropy and accuracy and waits for them; here they are summed until a log line is due."""
        if return_outputs:
            return super()._task_loss(model, inputs, return_outputs)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        items = outputs.label_mask.sum()
        mean = items.clamp(min=1)
        loss = -outputs.log_probs.sum() / mean
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        if model.training:
            self.tally.add("entropy", outputs.entropy.detach().sum() / mean, items)
            self.tally.add("mean_token_accuracy", outputs.is_top1.sum() / mean, items)
        return loss


class RoutedSeq2SeqTrainer(OurTrainerMixin, Seq2SeqTrainer):
    """Encoder-decoder models."""


class RoutedTrainer(OurTrainerMixin, Trainer):
    """Classifiers."""


class RoutedCausalTrainer(RoutedTrainer):
    """Causal language models whose head is more than a product with their output embeddings."""

    shifts_labels = True
