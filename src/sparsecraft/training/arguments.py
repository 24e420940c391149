"""The arguments of transformers' trainer for a stage."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

import torch

from sparsecraft.errors import SparsecraftError
from sparsecraft.recipe.stages import Stage
from sparsecraft.training.options import TrainOptions

log = logging.getLogger("sparsecraft")


def on_cpu() -> bool:
    """Whether Trainer will run on the CPU; it moves the model to a GPU if there is one."""
    return not torch.cuda.is_available()


def training_arguments(
    stage: Stage, settings: TrainOptions, rows: int, folder: Path
) -> dict[str, Any]:
    """What all of transformers' training arguments classes take."""
    world = processes()
    if settings.batch_size % world:
        raise SparsecraftError(
            f"batch_size is {settings.batch_size}, which {world} processes cannot share evenly."
        )
    each = settings.batch_size // world
    fits = [n for n in range(1, min(settings.micro_batch, each) + 1) if each % n == 0]
    micro_batch = max(fits)
    if micro_batch < min(settings.micro_batch, each):
        log.info(
            f"micro_batch is {settings.micro_batch}, which does not divide the {each} rows of a "
            f"step in a process: {micro_batch} at a time."
        )
    accumulation = each // micro_batch
    per_epoch = math.ceil(rows / (micro_batch * accumulation * world))
    steps = settings.steps or max(1, math.ceil(per_epoch * settings.epochs))
    if stage.optimizer == "adafactor" and settings.learning_rate * steps < 1:
        log.warning(
            f"The stage's Adafactor moves a parameter by {settings.learning_rate:g} of its size a "
            f"step; {steps} such steps change little, and least what starts at zero (the MoV paper "
            "takes 500,000). Raise the learning rate, or use variant='tuned' of the recipe."
        )
    wide = not on_cpu() and torch.cuda.is_bf16_supported()
    every = settings.save_every or (steps // 10 if steps >= 100 else None)
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": settings.learning_rate,
        **_schedule(stage, settings.schedule, steps),
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "optim": "adafactor" if stage.optimizer == "adafactor" else _adamw(wide),
        "use_cpu": on_cpu(),
        "bf16": wide,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_steps": settings.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it shows NaN as a loss that falls
        "save_strategy": "steps" if every else "no",
        "save_steps": every or steps,
        "report_to": list(settings.trackers) or "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not on_cpu(),
    }


def _adamw(wide: bool) -> str:
    """Trainer's name of it; in one launch on a GPU, but where a scaler leaves steps out."""
    return "adamw_torch_fused" if wide else "adamw_torch"


def _schedule(stage: Stage, schedule: str, steps: int) -> dict[str, Any]:
    warmup, ends = stage.warmup_steps or math.ceil(stage.warmup_ratio * steps), {}
    if schedule == "constant":
        schedule = "constant_with_warmup"
    elif schedule == "cosine" and stage.ends_at:
        schedule, ends = "cosine_with_min_lr", {"min_lr_rate": stage.ends_at}
    return {
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": ends,
        "warmup_steps": min(warmup, steps - 1),  # one step at least has a learning rate
    }


def by_fsdp() -> bool:
    """Whether accelerate will share the model among processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def processes() -> int:
    """How many processes train together, as torchrun and accelerate say it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
