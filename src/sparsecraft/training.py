"""The one training path: a recipe's stages on SFTTrainer, Seq2SeqTrainer or Trainer."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainingArguments,
    TrainingArguments,
)
from trl import SFTConfig

from sparsecraft import checkpoint, cost, hub, resuming
from sparsecraft import data as data_module
from sparsecraft.errors import DataError, SparsecraftError, did_you_mean
from sparsecraft.evaluation import positions_of
from sparsecraft.folder import check_free
from sparsecraft.layer import dense_name
from sparsecraft.options import TrainOptions
from sparsecraft.recipe import Stage
from sparsecraft.sentences import Prompts
from sparsecraft.surgery import Conversion, conversion_of, set_trainable
from sparsecraft.trainers import (
    ProgressBar,
    RoutedSeq2SeqTrainer,
    RoutedSFTTrainer,
    RoutedTrainer,
    adapters_known,
    on_cpu,
    processes,
    training_arguments,
)

log = logging.getLogger("sparsecraft")

# On a CPU the papers' batches would take hours a step.
CPU_BATCH_SIZE, CPU_MAX_LENGTH = 8, 512
MICRO_BATCH_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a training run did.

    Attributes:
        out: the checkpoint folder.
        steps: optimizer steps, those before a resume included.
        loss: mean training loss; after a resume the mean of what was logged, before it too.
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
    tokenizer: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> TrainReport:
    """Train a converted model as its recipe says and save it as a new checkpoint.

    Causal models train on chat rows (every assistant turn) or text, encoder-decoder models on
    prompts and completions, classifiers (with their head) on rows of `text` and `label`. Several
    processes (`torchrun`, `accelerate launch`) share the work as in Trainer.

    Args:
        model: a converted model or its checkpoint folder.
        data: files, folders or hub datasets; see `sparsecraft.data`.
        out: the checkpoint folder to write. The state for `resume` is kept beside it, in
            `OUT.training`, until the run is complete.
        tokenizer: by default the checkpoint's or the base's own; one that is given is saved.
        resume: continue from the last state in `OUT.training`, exactly.
        overwrite: replace an existing folder once the new one is complete.
        options: fields of `sparsecraft.options.TrainOptions`, such as `steps` and `weights`.

    Raises:
        DataError, CheckpointError, ResourceError: before anything is written.
    """
    asked, out = _options(options), Path(out).resolve()
    model = checkpoint.load(model) if isinstance(model, (str, Path)) else model
    record = conversion_of(model)
    check_free(out, overwrite)
    checkpoint.check_loadable(model)
    _check_devices(model)
    states = out.with_name(f"{out.name}.training")
    _check_states(states, resume)
    reads, prompts = tokenizer or _tokenizer_of(record), Prompts.of(model)
    for number, stage in enumerate(record.recipe.stages):
        folder = states / f"{number}-{stage.name}"
        settings = _settings(model, stage, asked)
        dataset, counts = _dataset(model, data, reads, settings, prompts)
        _prepare_parameters(model, stage)
        log.info(_needs(model, settings, out))
        resuming.check(folder, resuming.describe(model, settings, dataset, processes()), resume)
        with _untouched(model), adapters_known(model):
            trainer = _trainer(model, stage, settings, dataset, reads, folder, prompts)
            report = _run(trainer, counts, out, resume)
        history = _history(trainer, stage, settings, report)
        record.report.setdefault("training", []).append(history)
    model.eval()
    if trainer.is_world_process_zero():
        checkpoint.save(model, out, overwrite=overwrite, tokenizer=tokenizer)
        shutil.rmtree(states, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return report


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Give back what trainers leave changed.

    SFTTrainer patches the model's forward with its fused head, and both write the tokenizer's
    special tokens into the configurations.
    """
    configurations = [c for c in (model.config, getattr(model, "generation_config", None)) if c]
    fields = [copy.deepcopy(c.__dict__) for c in configurations]
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        for configuration, before in zip(configurations, fields, strict=True):
            configuration.__dict__ = before


def _history(
    trainer: Any, stage: Stage, settings: TrainOptions, report: TrainReport
) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "steps": report.steps,
        "loss": report.loss,
        "settings": dataclasses.asdict(settings),
        "counts": report.counts,
        "log": trainer.state.log_history,
    }


def _options(options: dict[str, Any]) -> TrainOptions:
    known = {field.name for field in dataclasses.fields(TrainOptions)}
    for name in options:
        if name not in known:
            raise SparsecraftError(f"train has no option {name!r}." + did_you_mean(name, known))
    asked = TrainOptions(**options)
    whole = ("steps", "batch_size", "micro_batch", "max_length", "save_every", "log_every")
    for name in (*whole, "epochs", "learning_rate", "router_learning_rate"):
        value = getattr(asked, name)
        kinds = int if name in whole else (int, float)
        if value is not None and not (isinstance(value, kinds) and 0 < value < math.inf):
            raise SparsecraftError(
                f"{name} is {value!r}; it must be a positive "
                f"{'whole number' if name in whole else 'number'}."
            )
    if not isinstance(asked.seed, int) or asked.seed < 0:
        raise SparsecraftError(f"seed is {asked.seed!r}; it must be a whole number from 0.")
    if isinstance(asked.trackers, str):
        asked = dataclasses.replace(asked, trackers=(asked.trackers,))
    return asked


def _dataset(
    model: nn.Module,
    data: Any,
    tokenizer: Any,
    settings: TrainOptions,
    prompts: Prompts | None = None,
) -> tuple[Any, dict[str, int]]:
    rows, counts = data_module.prepare(
        data,
        tokenizer,
        max_length=settings.max_length,
        weights=settings.weights or None,
        packing=settings.packing,
        seed=settings.seed,
        task=data_module.TASK_OF_MODEL[_task(model)],
        prompts=prompts,
    )
    if prompts is not None:
        prompts.embeddings()  # of all, in large batches
    return rows, counts


def _run(trainer: Any, counts: dict[str, int], out: Path, resume: bool) -> TrainReport:
    """Train to the end, from the last complete state if asked to."""
    args, start = trainer.args, time.perf_counter()
    last = resuming.last_state(Path(args.output_dir)) if resume else None
    first_step = int(last.name.rpartition("-")[2]) if last else 0
    try:
        if first_step < args.max_steps:
            result = trainer.train(resume_from_checkpoint=str(last) if last else None)
            if args.save_strategy == "no":
                # Should the final save fail, the run can be resumed from its end.
                trainer.keep_state()
        else:  # it was interrupted after its last step
            trainer.restore(last)
    finally:
        trainer.progress.stop()
    seconds = time.perf_counter() - start
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    loss = sum(entry["loss"] for entry in logged) / max(1, len(logged))
    loss = loss if last else result.training_loss  # exact, but blind to what came before a resume
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes()
    tokens = counts["tokens"] / max(1, len(trainer.train_dataset)) * sequences
    speed = tokens * (args.max_steps - first_step) / seconds
    return TrainReport(out, trainer.state.global_step, loss, seconds, speed, counts)


def _settings(model: nn.Module, stage: Stage, asked: TrainOptions) -> TrainOptions:
    """The user's values, and the recipe's for what was left open."""
    longest = positions_of(model)
    length = CPU_MAX_LENGTH if on_cpu() else stage.max_length
    defaults = {
        "batch_size": CPU_BATCH_SIZE if on_cpu() else stage.batch_size,
        "max_length": min(length, longest) if longest else length,
        "learning_rate": stage.learning_rate,
        "schedule": stage.schedule,
    }
    if on_cpu() and (asked.batch_size is None or asked.max_length is None):
        log.info(
            f"On a CPU, unless told: {CPU_BATCH_SIZE} sequences of up to {CPU_MAX_LENGTH} tokens "
            f"a step; the recipe says {stage.batch_size} of {stage.max_length}."
        )
    filled = {key: value for key, value in defaults.items() if getattr(asked, key) is None}
    settings = dataclasses.replace(asked, **filled)
    router = settings.router_learning_rate
    if router is None and asked.learning_rate is None:
        router = stage.router_learning_rate
    fits = max(1, MICRO_BATCH_TOKENS // settings.max_length)
    if longest and settings.max_length > longest:
        raise SparsecraftError(
            f"max_length is {settings.max_length} and the model has {longest} positions."
        )
    return dataclasses.replace(
        settings,
        packing=settings.packing and _task(model) == "causal",
        router_learning_rate=settings.learning_rate if router is None else router,
        micro_batch=settings.micro_batch or min(settings.batch_size, fits),
    )


def _prepare_parameters(model: nn.Module, stage: Stage) -> None:
    """Let the stage's parameters require gradients, as float32 masters, in training mode.

    A classifier's head trains too: it is new for its task.
    """
    model.train()
    set_trainable(model, stage.trains)
    if _task(model) == "classification":
        for name, parameter in model.named_parameters():
            if not name.startswith(f"{model.base_model_prefix}."):
                parameter.requires_grad_(True)
    _float32_masters(model)


def _float32_masters(model: nn.Module) -> None:
    """Steps of 1e-4 relative size vanish in bf16; the layers compute in their input's dtype."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _trainer(
    model: nn.Module,
    stage: Stage,
    settings: TrainOptions,
    dataset: Any,
    tokenizer: Any,
    folder: Path,
    prompts: Prompts | None = None,
) -> Any:
    """The trainer of the model's task, for one stage."""
    trainer_class, arguments_class = {
        "causal": (RoutedSFTTrainer, SFTConfig),
        "seq2seq": (RoutedSeq2SeqTrainer, Seq2SeqTrainingArguments),
        "classification": (RoutedTrainer, TrainingArguments),
    }[_task(model)]
    arguments = training_arguments(stage, settings, len(dataset), folder)
    # transformers 5.2x renames gradient_checkpointing; TRL turns it on unless told otherwise.
    known = {field.name for field in dataclasses.fields(arguments_class)}
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
    arguments[name] = settings.activation_checkpointing
    if settings.activation_checkpointing:
        arguments[f"{name}_kwargs"] = {"use_reentrant": False}
    if arguments_class is SFTConfig:
        arguments["max_length"] = settings.max_length
        arguments["dataset_kwargs"] = {"skip_prepare_dataset": True}
    progress = ProgressBar(settings.progress)
    trainer = trainer_class(
        model=model,
        args=arguments_class(**arguments),
        train_dataset=dataset,
        data_collator=functools.partial(
            data_module.collate,
            pad_id=data_module.pad_id(tokenizer),
            packed=settings.packing,
            prompts=prompts,
        ),
        processing_class=tokenizer,
        callbacks=[progress],
    )
    trainer.progress = progress
    for callback in (PrinterCallback, ProgressCallback):  # they write to standard output
        trainer.remove_callback(callback)
    trainer.stage, trainer.router_learning_rate = stage, settings.router_learning_rate
    _float32_masters(model)  # SFTTrainer rounds what trains on a quantized base to bf16
    return trainer


def _task(model: nn.Module) -> str:
    task = hub.task_of(model)
    if task in data_module.TASK_OF_MODEL:
        return task
    raise SparsecraftError(
        f"{type(model).__name__} is an {task} model without a training objective here; use a "
        "...ForCausalLM, ...ForConditionalGeneration or ...ForSequenceClassification model."
    )


def _tokenizer_of(record: Conversion) -> Any:
    folder = record.folder or (record.origin and hub.resolve(record.origin, record.revision))
    tokenizer = hub.load_tokenizer(folder) if folder else None
    if tokenizer is None:
        raise DataError("The model came without a tokenizer; pass tokenizer=...")
    return tokenizer


def _check_states(folder: Path, resume: bool) -> None:
    states = [s for s in folder.glob("*") if s.is_dir() and resuming.last_state(s)]
    if resume and not states:
        raise SparsecraftError(
            f"There is nothing to resume: {folder} holds no complete training state. "
            "Train without resume, with save_every for states to come back to."
        )
    if not resume and states:
        raise SparsecraftError(
            f"{folder} holds the state of an interrupted run; resume it, or delete the folder."
        )
    if folder.exists() and not folder.is_dir():
        raise SparsecraftError(f"{folder} is a file; training keeps its state there. Move it away.")


def _check_devices(model: nn.Module) -> None:
    """Refuse copies of the model on several GPUs in one process: their routing is not seen."""
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if torch.cuda.device_count() > 1 and processes() == 1 and not spread:
        raise SparsecraftError(
            f"{torch.cuda.device_count()} GPUs are visible to one process. Launch one for each, "
            "`torchrun --nproc-per-node N -m sparsecraft train ...`, or show it one GPU, "
            "`CUDA_VISIBLE_DEVICES=0 sparsecraft train ...`."
        )


def _needs(model: nn.Module, settings: TrainOptions, out: Path) -> str:
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
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    free = None if on_cpu() else torch.cuda.mem_get_info(rank)[0]
    return cost.require(out, disk=new + states, memory=memory, task="Training", free_memory=free)
