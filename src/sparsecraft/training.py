"""The one training path: a recipe's stages on SFTTrainer, Seq2SeqTrainer or Trainer."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Seq2SeqTrainingArguments
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig

from sparsecraft import checkpoint, cost, data as data_module, hub
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.layer import dense_name
from sparsecraft.recipe import Stage
from sparsecraft.surgery import conversion_of, set_trainable
from sparsecraft.trainers import Progress, RoutedSeq2SeqTrainer, RoutedSFTTrainer, RoutedTrainer

log = logging.getLogger("sparsecraft")

# On a CPU the papers' batches would take hours a step.
CPU_BATCH_SIZE, CPU_MAX_LENGTH = 8, 512
MICRO_BATCH_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run uses; None in a field of `train` means the recipe's value.

    Attributes:
        batch_size: sequences per optimizer step over all devices.
        micro_batch: sequences per forward pass and device.
        max_length: tokens per sequence.
        steps: optimizer steps; None runs `epochs`.
    """

    batch_size: int
    micro_batch: int
    max_length: int
    steps: int | None
    epochs: float
    learning_rate: float
    router_learning_rate: float
    schedule: str
    packing: bool
    seed: int


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a training run did.

    Attributes:
        out: the checkpoint folder.
        steps: optimizer steps, those before a resume included.
        loss: mean training loss over the run.
        seconds: wall time of this call's training.
        tokens_per_second: real tokens, padding excluded, of this call's training.
        counts: rows read, dropped and kept, by reason.
    """

    out: Path
    steps: int
    loss: float
    seconds: float
    tokens_per_second: float
    counts: dict[str, int]


def train(
    model: nn.Module | str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    tokenizer: Any = None,
    steps: int | None = None,
    epochs: float = 1.0,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    max_length: int | None = None,
    learning_rate: float | None = None,
    router_learning_rate: float | None = None,
    schedule: str | None = None,
    packing: bool = True,
    activation_checkpointing: bool = False,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    save_every: int | None = None,
    log_every: int = 10,
    trackers: Sequence[str] = (),
    progress: bool = True,
) -> TrainReport:
    """Train a converted model as its recipe says and save it as a new checkpoint.

    Causal models train on chat rows (every assistant turn) or text, encoder-decoder models on
    prompts and completions, classifiers on rows of `text` and `label`. Several processes
    (`torchrun`, `accelerate launch`) share the work as in Trainer.

    Args:
        model: a converted model or its checkpoint folder.
        data: files, folders or hub datasets; see `sparsecraft.data`.
        out: the checkpoint folder to write. The state for `resume` is kept beside it, in
            `OUT.training`, until the run is complete.
        weights: relative sampling rates of the sources, in rows.
        steps: optimizer steps per stage; None trains for `epochs`.
        batch_size: sequences per step over all devices. Default: the recipe's on CUDA, 8 on a CPU.
        micro_batch: sequences per forward pass and device. Default: as many as 16384 tokens hold.
        max_length: tokens per sequence. Default: the recipe's on CUDA, 512 on a CPU.
        learning_rate, router_learning_rate, schedule: the recipe's by default; schedules are
            constant, linear and cosine, the latter two down to zero.
        packing: put several documents into one sequence (causal models); they do not see each
            other.
        activation_checkpointing: recompute activations in the backward pass to save memory.
        resume: continue from the last state in `OUT.training`.
        save_every: steps between two states for `resume`; None: none for runs under 100 steps,
            else ten in a run.
        trackers: names that Trainer's `report_to` knows, such as `tensorboard` or `wandb`.
        progress: show a progress bar on standard error.

    Raises:
        DataError, CheckpointError, ResourceError: before anything is written.
    """
    out = Path(out)
    if isinstance(model, (str, Path)):
        tokenizer = tokenizer or hub.load_tokenizer(model)
        model = checkpoint.load(model)
    record = conversion_of(model)
    checkpoint.check_free(out, overwrite)
    tokenizer = tokenizer or _tokenizer_of(record.origin)
    task = _task(model)
    state_folder = out.with_name(f"{out.name}.training")
    _check_state(state_folder, resume)
    reports = []
    for number, stage in enumerate(record.recipe.stages):
        settings = _settings(
            model, task, stage, steps=steps, epochs=epochs, batch_size=batch_size,
            micro_batch=micro_batch, max_length=max_length, learning_rate=learning_rate,
            router_learning_rate=router_learning_rate, schedule=schedule, packing=packing, seed=seed,
        )  # fmt: skip
        dataset, counts = data_module.prepare(
            data,
            tokenizer,
            max_length=settings.max_length,
            weights=weights,
            packing=settings.packing,
            seed=seed,
            task={"causal": "causal", "seq2seq": "seq2seq"}.get(task, "label"),
        )
        _prepare_parameters(model, stage)
        log.info(_needs(model, settings, out))
        trainer = _trainer(
            model, task, stage, settings, dataset, tokenizer,
            folder=state_folder / f"{number}-{stage.name}", save_every=save_every,
            log_every=log_every, trackers=trackers, progress=progress,
            activation_checkpointing=activation_checkpointing,
        )  # fmt: skip
        reports.append(_run(trainer, settings, counts, out, resume))
        record.report.setdefault("training", []).append(_history(trainer, stage, settings, counts))
        _restore_forward(model)
    model.eval()
    if trainer.is_world_process_zero():
        checkpoint.save(model, out, overwrite=overwrite, tokenizer=None if record.origin else tokenizer)
        shutil.rmtree(state_folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return reports[-1]


def _run(trainer, settings: Settings, counts: dict[str, int], out: Path, resume: bool) -> TrainReport:
    last = get_last_checkpoint(trainer.args.output_dir) if resume else None
    first_step = int(last.rpartition("-")[2]) if last else 0
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - start
    steps = trainer.state.global_step
    per_sequence = counts["tokens"] / max(1, len(trainer.train_dataset))
    tokens = (steps - first_step) * settings.batch_size * per_sequence
    return TrainReport(out, steps, result.training_loss, seconds, tokens / seconds, counts)


def _settings(model: nn.Module, task: str, stage: Stage, **asked: Any) -> Settings:
    """The user's values, and the recipe's for what was left open."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    defaults = {
        "batch_size": CPU_BATCH_SIZE if on_cpu else stage.batch_size,
        "max_length": CPU_MAX_LENGTH if on_cpu else stage.max_length,
        "learning_rate": stage.learning_rate,
        "schedule": stage.schedule,
    }
    values = {key: defaults.get(key) if value is None else value for key, value in asked.items()}
    if asked["max_length"] is None and longest:
        values["max_length"] = min(values["max_length"], longest)
    if values["router_learning_rate"] is None:
        own = stage.router_learning_rate if asked["learning_rate"] is None else None
        values["router_learning_rate"] = own or values["learning_rate"]
    if values["micro_batch"] is None:
        fits = max(1, MICRO_BATCH_TOKENS // values["max_length"])
        values["micro_batch"] = min(values["batch_size"], fits)
    if on_cpu and (asked["batch_size"] is None or asked["max_length"] is None):
        log.info(
            "On a CPU: %d sequences of up to %d tokens a step; the recipe says %d of %d.",
            values["batch_size"], values["max_length"], stage.batch_size, stage.max_length,
        )  # fmt: skip
    for key in ("batch_size", "micro_batch", "max_length"):
        if values[key] < 1:
            raise DataError(f"{key} is {values[key]}; it must be at least 1.")
    values["packing"] = values["packing"] and task == "causal"
    return Settings(**values)


def _prepare_parameters(model: nn.Module, stage: Stage) -> None:
    """Let the stage's parameters require gradients, as float32 masters, in training mode."""
    model.train()
    set_trainable(model, stage.trains)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            # Steps of 1e-4 relative size vanish in bf16; the layers compute in their input's dtype.
            parameter.data = parameter.data.float()


def _trainer(
    model, task, stage, settings, dataset, tokenizer, *, folder, save_every, log_every, trackers,
    progress, activation_checkpointing,
):  # fmt: skip
    kinds = {
        "causal": (RoutedSFTTrainer, SFTConfig),
        "seq2seq": (RoutedSeq2SeqTrainer, Seq2SeqTrainingArguments),
        "classification": (RoutedTrainer, TrainingArguments),
    }
    trainer_class, arguments_class = kinds[task]
    on_cpu = next(model.parameters()).device.type == "cpu"
    world = _world_size()
    micro_batch = min(settings.micro_batch, max(1, settings.batch_size // world))
    accumulation = max(1, settings.batch_size // (micro_batch * world))
    per_epoch = max(1, math.ceil(len(dataset) / (micro_batch * accumulation * world)))
    steps = settings.steps or max(1, math.ceil(per_epoch * settings.epochs))
    every = save_every or (max(1, steps // 10) if steps >= 100 else None)
    warmup = stage.warmup_steps or math.ceil(stage.warmup_ratio * steps)
    common = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        "warmup_steps": min(warmup, steps),
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "optim": "adamw_torch",
        "use_cpu": on_cpu,
        "bf16": not on_cpu and torch.cuda.is_bf16_supported(),
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_steps": log_every,
        "logging_first_step": True,
        "save_strategy": "steps" if every else "no",
        "save_steps": every or steps,
        "save_total_limit": 1,
        "report_to": list(trackers) or "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not on_cpu,
    }
    # transformers 5.2x renames gradient_checkpointing; TRL turns it on unless told otherwise.
    known = {field.name for field in dataclasses.fields(arguments_class)}
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
    common[name] = activation_checkpointing
    if activation_checkpointing:
        common[f"{name}_kwargs"] = {"use_reentrant": False}
    collate = functools.partial(
        data_module.collate, pad_id=data_module.pad_id(tokenizer), packed=settings.packing
    )
    if task == "causal":
        common |= {
            "max_length": settings.max_length,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
    trainer = trainer_class(
        model=model,
        args=arguments_class(**common),
        train_dataset=dataset,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[Progress(progress)],
    )
    for callback in (PrinterCallback, ProgressCallback):  # they write to standard output
        trainer.remove_callback(callback)
    trainer.stage, trainer.router_learning_rate = stage, settings.router_learning_rate
    return trainer


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _task(model: nn.Module) -> str:
    # A model built in memory has no architectures in its configuration.
    description = {"architectures": [type(model).__name__], "model_type": model.config.model_type}
    task = hub.task_of(description)
    if task in ("causal", "seq2seq", "classification"):
        return task
    raise SparsecraftError(
        f"{type(model).__name__} is an {task} model without a training objective here; use a "
        "...ForCausalLM, ...ForConditionalGeneration or ...ForSequenceClassification model."
    )


def _tokenizer_of(origin: str | None) -> Any:
    tokenizer = hub.load_tokenizer(hub.resolve(origin)) if origin else None
    if tokenizer is None:
        raise DataError("The model came without a tokenizer; pass tokenizer=...")
    return tokenizer


def _check_state(folder: Path, resume: bool) -> None:
    states = list(folder.glob("*/checkpoint-*"))
    if resume and not states:
        raise SparsecraftError(
            f"There is nothing to resume: {folder} holds no training state. "
            "Train without resume, with save_every for states to come back to."
        )
    if not resume and states:
        raise SparsecraftError(
            f"{folder} holds the state of an interrupted run; resume it, or delete the folder."
        )


def _needs(model: nn.Module, settings: Settings, out: Path) -> str:
    """One line about memory and disk: weights, gradients, two AdamW moments, activations."""
    counted = cost.count(model)
    config = model.config.get_text_config()
    tokens = settings.micro_batch * settings.max_length
    layers = getattr(config, "num_hidden_layers", 12)
    hidden = getattr(config, "hidden_size", 768)
    activations = 34 * tokens * hidden * layers * 4
    memory = 12 * counted.trainable + activations
    new = sum(
        p.numel() * p.element_size()
        for n, p in model.named_parameters()
        if p.requires_grad or dense_name(model, n) is None
    )
    states = 3 * new  # weights and two moments, for resume
    return cost.require(out, disk=new + states, memory=memory, task="Training")


def _history(trainer, stage: Stage, settings: Settings, counts: dict[str, int]) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "settings": dataclasses.asdict(settings),
        "counts": counts,
        "log": trainer.state.log_history,
    }


def _restore_forward(model: nn.Module) -> None:
    """SFTTrainer patches the model's forward with its fused head; give the class's own back."""
    model.__dict__.pop("forward", None)
