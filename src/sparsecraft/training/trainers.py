"""What our training adds to transformers' and TRL's trainers, in one mixin.

Auxiliary losses from the trace, router and experts in their own optimizer groups, routing
statistics beside the loss, and states for resuming that hold only what trains. Everything that
overrides or calls a private method of Trainer stands under "Private hooks".
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import Seq2SeqTrainer, Trainer, TrainerState
from trl import SFTTrainer

from sparsecraft.checkpoint import tensorfile
from sparsecraft.checkpoint.tensors import WEIGHTS, read_tensors
from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.context import layer_masks
from sparsecraft.moe.losses import auxiliary_loss
from sparsecraft.moe.names import unique_tensors
from sparsecraft.moe.routing import Routing, spread
from sparsecraft.moe.tracing import trace
from sparsecraft.recipe.stages import Stage
from sparsecraft.surgery.record import conversion_of
from sparsecraft.surgery.trainable import matches
from sparsecraft.training.watch import WatchedTrainerMixin

log = logging.getLogger("sparsecraft")

TOKEN_MASK = "token_mask"


class RoutedTrainerMixin:
    """Put before a Trainer class; set `stage` before training."""

    stage: Stage
    router_learning_rate: float

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The task's loss, and in training the stage's auxiliary losses added to it."""
        token_mask = inputs.pop(TOKEN_MASK, None)
        training = model.training
        unwrapped = self.accelerator.unwrap_model(model)
        self._tell_step(unwrapped)
        with trace(unwrapped) as traced:
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
            routings = dict(traced)
        if not training:
            return result
        if self.stage.losses and not routings and self._has_routers():
            raise SparsecraftError(
                "The stage has routing losses, and no router was seen in the forward pass: the "
                "model runs as copies. Launch one process for each GPU with torchrun."
            )
        masks = layer_masks(unwrapped, inputs, token_mask)
        if (
            self.state.global_step == 0
            or (self.state.global_step + 1) % self.args.logging_steps == 0
        ):
            self._record(routings, masks)
        coefficients = {name: c * self._loss_factor() for name, c in self.stage.losses.items()}
        auxiliary, parts = auxiliary_loss(
            {n: r for n, r in routings.items() if _counts(unwrapped, n)},
            coefficients,
            masks,
            lambda layer: _group(unwrapped, layer),
        )
        if auxiliary is None:
            return result
        if not auxiliary.requires_grad:
            raise SparsecraftError(
                "The auxiliary loss has no gradient: reentrant activation checkpointing runs the "
                "layers without one. Use use_reentrant=False."
            )
        for name, value in parts.items():
            self._statistics[f"{name}_loss"].append(value.detach())
        # Trainer divides by the accumulation steps only what is not normalized over them already.
        scaled = num_items_in_batch is not None and (
            self.model_accepts_loss_kwargs or isinstance(self, SFTTrainer)
        )
        auxiliary = auxiliary / (self.current_gradient_accumulation_steps if scaled else 1)
        loss = result[0] if return_outputs else result
        loss = loss + auxiliary.to(loss.device)
        return (loss, *result[1:]) if return_outputs else loss

    def _tell_step(self, model: torch.nn.Module) -> None:
        """Let the routers that sample cool down, also where a run is resumed."""
        for layer in conversion_of(model).layers:
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

    @torch.no_grad()
    def _record(self, routings: dict[str, Routing], masks) -> None:
        if self.stage.runs == "every":  # nothing was routed
            return
        for layer, routing in routings.items():
            mask = masks(layer)
            load_E = routing.load_E(mask)
            probs_TE = routing.logits_TE.float().softmax(-1)
            entropy_T = torch.special.entr(probs_TE).sum(-1)
            weight_T = torch.ones_like(entropy_T) if mask is None else spread(mask, len(entropy_T))
            log_experts = max(math.log(routing.num_experts), 1e-9)
            entropy = (entropy_T * weight_T).sum() / weight_T.sum().clamp_min(1)
            self._statistics[f"max_load/{layer}"].append(load_E.max() * routing.num_experts)
            self._statistics[f"load_entropy/{layer}"].append(
                torch.special.entr(load_E).sum() / log_experts
            )
            self._statistics[f"router_entropy/{layer}"].append(entropy / log_experts)

    @property
    def _statistics(self) -> dict[str, list[Tensor]]:
        return self.__dict__.setdefault("_routing_statistics", defaultdict(list))

    def log(self, logs, *args, **kwargs):
        """Add per-layer load and router entropy, and their means, to what is logged."""
        # Kept as tensors until here, so that recording does not wait for the device.
        means = {k: torch.stack(v).mean().item() for k, v in self._statistics.items()}
        self._statistics.clear()
        for kind in ("load_entropy", "router_entropy"):
            layers = [value for key, value in means.items() if key.startswith(f"{kind}/")]
            if layers:
                means[kind] = sum(layers) / len(layers)
        logs.update(means)
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------ Private hooks of Trainer

    def _save(self, output_dir=None, state_dict=None):
        """Only what trains: a training checkpoint holds tensors and Trainer's own state."""
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        trained = {n: p for n, p in unique_tensors(model).items() if p.requires_grad}
        if state_dict is not None:  # FSDP gathers its shards into this
            trained = {name: state_dict[name] for name in trained}
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        digest = tensorfile.write(folder / WEIGHTS, trained)
        (folder / "digest").write_text(digest)

    def keep_state(self) -> None:
        """Write a state for resuming now."""
        self._save_checkpoint(self.model, trial=None)

    def restore(self, state: Path) -> None:
        """Take the trained tensors and the log of a state that is already at its last step."""
        self._load_from_checkpoint(str(state))
        self.state = TrainerState.load_from_json(str(state / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        read_tensors(model, folder / WEIGHTS, (folder / "digest").read_text(), in_place=True)


@contextmanager
def adapters_known(model: torch.nn.Module) -> Iterator[None]:
    """Tell Trainer that a quantized model has something to train: it knows PEFT's adapters only."""
    if getattr(model, "is_quantized", False):
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        vars(model).pop("_hf_peft_config_loaded", None)


class RoutedSFTTrainer(WatchedTrainerMixin, RoutedTrainerMixin, SFTTrainer):
    """Causal language models."""


class RoutedSeq2SeqTrainer(WatchedTrainerMixin, RoutedTrainerMixin, Seq2SeqTrainer):
    """Encoder-decoder models."""


class RoutedTrainer(WatchedTrainerMixin, RoutedTrainerMixin, Trainer):
    """Classifiers."""


def _counts(model: torch.nn.Module, layer: str) -> bool:
    """Whether losses on routings count this layer's."""
    return model.get_submodule(layer).router.spec.balanced


def _group(model: torch.nn.Module, layer: str) -> str:
    """Which layers a loss is averaged over: those that imitate attention's Linears apart."""
    return "imitate" if model.get_submodule(layer).is_imitation else ""
