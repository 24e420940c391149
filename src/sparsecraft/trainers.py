"""What our training adds to transformers' and TRL's trainers, in one mixin.

Auxiliary losses from the trace, router and experts in their own optimizer groups, routing
statistics beside the loss, and checkpoints without pickle: everything here that overrides a
private method of Trainer stands under "Private hooks".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback
from trl import SFTTrainer

from sparsecraft import tensorfile
from sparsecraft.checkpoint import WEIGHTS, read_tensors
from sparsecraft.errors import SparsecraftError
from sparsecraft.layer import unique_tensors
from sparsecraft.losses import auxiliary_loss
from sparsecraft.recipe import Stage
from sparsecraft.routing import Routing, trace
from sparsecraft.surgery import matches

TOKEN_MASK = "token_mask"


class RoutedTrainerMixin:
    """Put before a Trainer class; set `stage` before training."""

    stage: Stage
    router_learning_rate: float

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The task's loss, and in training the stage's auxiliary losses added to it."""
        token_mask = inputs.pop(TOKEN_MASK, None)
        training = model.training
        with trace(self.accelerator.unwrap_model(model)) as traced:
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
            routings = dict(traced)
        if not training:
            return result
        masks = _masks(inputs, token_mask, getattr(self.model.config, "is_encoder_decoder", False))
        self._record(routings, masks)
        auxiliary, parts = auxiliary_loss(routings, self.stage.losses, masks)
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

    def create_optimizer(self, model=None):
        """Experts (and whatever else trains) and router in groups of their own."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
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
        for layer, routing in routings.items():
            mask = masks(layer)
            load_E = routing.load_E(mask)
            probs_TE = routing.logits_TE.float().softmax(-1)
            entropy_T = torch.special.entr(probs_TE).sum(-1)
            weight_T = torch.ones_like(entropy_T) if mask is None else mask.reshape(-1).float()
            log_experts = torch.tensor(routing.num_experts).log().clamp_min(1e-9)
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


class RoutedSFTTrainer(RoutedTrainerMixin, SFTTrainer):
    """Causal language models."""


class RoutedSeq2SeqTrainer(RoutedTrainerMixin, Seq2SeqTrainer):
    """Encoder-decoder models."""


class RoutedTrainer(RoutedTrainerMixin, Trainer):
    """Classifiers."""


def _masks(inputs: dict, token_mask: Tensor | None, encoder_decoder: bool):
    """Layer name -> which of its tokens are real.

    The decoder of an encoder-decoder model sees the labels' positions, its encoder the inputs'.
    """
    if token_mask is None and "attention_mask" in inputs:
        token_mask = inputs["attention_mask"].bool()

    def mask(layer: str) -> Tensor | None:
        if encoder_decoder and "decoder" in layer.split("."):
            return (inputs["labels"] != -100).reshape(-1)
        return None if token_mask is None else token_mask.reshape(-1)

    return mask


class Progress(TrainerCallback):
    """A progress bar on standard error with the latest loss; nothing on standard output."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    def on_train_begin(self, args, state, control, **kwargs):
        if not (self.enabled and state.is_world_process_zero):
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task(
            "", total=state.max_steps, completed=state.global_step, note=""
        )

    def on_step_end(self, args, state, control, **kwargs):
        if getattr(self, "_bar", None):
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if getattr(self, "_bar", None) and logs and "loss" in logs:
            note = f"loss {float(logs['loss']):.3f}"
            if "load_entropy" in logs:
                note += f"  load entropy {logs['load_entropy']:.2f}"
            self._bar.update(self._task, note=note)

    def on_train_end(self, args, state, control, **kwargs):
        if getattr(self, "_bar", None):
            self._bar.stop()
