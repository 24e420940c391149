"""A stage that trains by gradient, on SFTTrainer, Seq2SeqTrainer or Trainer."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig

from sparsecraft.checkpoint.rebuild import memory_to_rebuild
from sparsecraft.checkpoint.space import require, require_disk
from sparsecraft.checkpoint.wide import wide_type, widened
from sparsecraft.data.batches import collate
from sparsecraft.data.limits import pad_id
from sparsecraft.data.prepare import count_tokens, pack
from sparsecraft.data.sentences import Prompts
from sparsecraft.dense.memory import enough_memory, gigabytes
from sparsecraft.moe import cost
from sparsecraft.moe.names import dense_name
from sparsecraft.recipe.stages import Stage
from sparsecraft.surgery.record import conversion_of
from sparsecraft.surgery.trainable import set_trainable
from sparsecraft.training.arguments import by_fsdp, processes, training_arguments
from sparsecraft.training.deal import deal, directed, sampled
from sparsecraft.training.defaults import disk_of, objective_of
from sparsecraft.training.engine import set_up
from sparsecraft.training.heads import head_is_plain
from sparsecraft.training.memory import (
    divisors,
    free_here,
    largest_that_fits,
    longest_row,
    step_memory,
)
from sparsecraft.training.micro_batches import LOWER
from sparsecraft.training.moved import Before, watched_routers
from sparsecraft.training.options import TrainOptions
from sparsecraft.training.progress import ProgressBar
from sparsecraft.training.report import TrainReport, note
from sparsecraft.training.resume import (
    check_alike,
    check_same_run,
    describe,
    looked_through,
    note_micro_batch,
    noted_micro_batch,
    read_as,
)
from sparsecraft.training.trainers import (
    RoutedCausalTrainer,
    RoutedSeq2SeqTrainer,
    RoutedSFTTrainer,
    RoutedTrainer,
    adapters_known,
)

log = logging.getLogger("sparsecraft")


@dataclass(frozen=True, slots=True)
class Run:
    """What all stages of one call of `train` share.

    Attributes:
        model: converted.
        tokenizer: that rows are read with.
        out: the checkpoint folder to write.
        prompts: takes in the prompt of every row, for routers that decide by sentence.
        resume: continue from the last state.
        unpacked: why rows are not packed though packing was asked for; None if they are, or it
            was not.
        chooses: whether the micro-batch was left open.
    """

    model: nn.Module
    tokenizer: Any
    out: Path
    prompts: Prompts | None = None
    resume: bool = False
    unpacked: str | None = None
    chooses: bool = False

    @property
    def noted(self) -> dict[str, str]:
        """What the report of every stage says of the run."""
        return {"unpacked": self.unpacked} if self.unpacked else {}


def descend(
    run: Run,
    stage: Stage,
    settings: TrainOptions,
    dataset: Any,
    counts: dict[str, int],
    folder: Path,
) -> tuple[Any, TrainReport]:
    """Run a stage that trains by gradient; its trainer too, which knows the other processes.

    Args:
        dataset: the stage's rows, and in `counts` how many were read, dropped and kept.
        folder: where its state is kept.
    """
    model = run.model
    prepare_parameters(model, stage)
    require_disk(run.out, disk_of(model), "Training")
    dataset = sampled(dataset, stage.deal) if stage.deal else dataset
    described = describe(model, settings, dataset)
    check_same_run(folder, described, run.resume, read_as(model))
    found: dict[str, Any] = {}
    if stage.deal:
        where = {"pad_id": pad_id(run.tokenizer, model), "resume": run.resume}
        dataset, found["buckets"] = deal(model, dataset, folder, **where)
        counts = counts | {"dealt": len(dataset)} | count_tokens(dataset)
        if settings.packing:
            dataset = pack(dataset, settings.max_length, settings.seed)
    forced = directed(model) if stage.deal else nullcontext()
    with _untouched(model), adapters_known(model), forced:
        should = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        trainer = make_trainer(run, stage, settings, dataset, folder)
        check_alike(described)
        settings = _sized(trainer, run, settings, folder)
        set_up(trainer)
        before = Before(model, should)
        with watched_routers(model, trainer.evidence):
            report = _run(trainer, counts, run)
        moved = trainer.moved(before)
    report = replace(report, moved={stage.name: moved})
    found |= {"log": trainer.state.log_history} | run.noted
    note(conversion_of(model), stage, settings, report, **found)
    return trainer, report


def _sized(trainer: Any, run: Run, settings: TrainOptions, folder: Path) -> TrainOptions:
    """The settings with a micro-batch that fits, if it was left open; says what the run needs.

    A run that is resumed and leaves it open goes on with what it had, to end in the same bits.
    """
    args, model = trainer.args, run.model
    disk, most = disk_of(model), args.per_device_train_batch_size
    if by_fsdp():  # it shares the model later, and what passes take with it
        log.info(f"Training needs {gigabytes(disk)} of disk; memory is not measured under FSDP2.")
        return settings
    batch = most * args.gradient_accumulation_steps
    length, row = longest_row(trainer.train_dataset)
    memory = step_memory(trainer, length, row, most)
    if run.chooses:
        kept = noted_micro_batch(folder) if run.resume else None
        rows = kept or largest_that_fits(memory, batch, most, args.device)
        trainer.set_micro_batch(max(divisors(batch, min(rows, most))))
    rows = args.per_device_train_batch_size
    if trainer.is_world_process_zero():
        note_micro_batch(folder, rows)
    task = f"Training by micro-batches of {rows} x {length} tokens"
    free = free_here(args.device)
    wide = widened(model) if wide_type(model)[0] else 0
    again = memory_to_rebuild(cost.bytes_of(model), free, wide)
    saving = memory.moments + again
    peak = max(memory.peak(rows, accumulates=rows < batch), saving)
    log.info(require(run.out, disk=disk, memory=peak, task=task, free_memory=free))
    return replace(settings, micro_batch=rows)


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


def _run(trainer: Any, counts: dict[str, int], run: Run) -> TrainReport:
    """Train to the end, from the last complete state if asked to."""
    args, start = trainer.args, time.perf_counter()
    last, lost = looked_through(Path(args.output_dir)) if run.resume else (None, [])
    if lost:
        log.warning(
            f"Passed over, because it is not as it was written: {'; '.join(lost)}. The stage goes "
            f"on from {last or 'its start'}."
        )
    first_step = int(last.name.rpartition("-")[2]) if last else 0
    try:
        if first_step < args.max_steps:
            with enough_memory("Training", LOWER):
                trainer.train(resume_from_checkpoint=str(last) if last else None)
            trainer.check_model()
            if args.save_strategy == "no":
                # Should the final save fail, the run can be resumed from its end.
                trainer.keep_state()
        else:  # it was interrupted after its last step
            trainer.restore(last)
    finally:
        trainer.progress.stop()
    seconds = time.perf_counter() - start
    loss = mean_loss(trainer.state.log_history)
    rows = max(1, len(trainer.train_dataset))
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes()
    tokens = counts["tokens"] / rows * min(sequences, rows)
    speed = tokens * (args.max_steps - first_step) / seconds
    return TrainReport(run.out, trainer.state.global_step, loss, seconds, speed, counts)


def mean_loss(log: list[dict[str, Any]]) -> float:
    """The mean over all steps, before a resume too; each line's loss is one of those since the
    last line, over all processes."""
    total, before = 0.0, 0
    for entry in log:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - before)
            before = entry["step"]
    return total / max(1, before)


def prepare_parameters(model: nn.Module, stage: Stage) -> None:
    """Let the stage's parameters require gradients, as float32 masters, in training mode.

    A classifier's head trains too: it is new for its task.
    """
    model.train()
    set_trainable(model, stage.trains)
    if objective_of(model) == "classification":
        for name, parameter in model.named_parameters():
            if not name.startswith(f"{model.base_model_prefix}."):
                parameter.requires_grad_(True)
    _float32_masters(model)


def _float32_masters(model: nn.Module) -> None:
    """Steps of 1e-4 relative size vanish in bf16; the layers compute in their input's dtype."""
    masters = conversion_of(model).masters
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
            masters |= {dense} if (dense := dense_name(model, name)) else set()


def _classes(model: nn.Module) -> tuple[type[Trainer], type[TrainingArguments]]:
    """The trainer of a model's task, and its arguments."""
    objective = objective_of(model)
    if objective == "causal" and head_is_plain(model):
        return RoutedSFTTrainer, SFTConfig
    return {
        "causal": (RoutedCausalTrainer, TrainingArguments),
        "seq2seq": (RoutedSeq2SeqTrainer, Seq2SeqTrainingArguments),
        "classification": (RoutedTrainer, TrainingArguments),
    }[objective]


def make_trainer(run: Run, stage: Stage, settings: TrainOptions, dataset: Any, folder: Path) -> Any:
    """The trainer of the model's task, for one stage."""
    model, tokenizer = run.model, run.tokenizer
    trainer_class, arguments_class = _classes(model)
    arguments = training_arguments(stage, settings, len(dataset), folder)
    # transformers 5.2x renames gradient_checkpointing; TRL turns it on by default.
    known = {field.name for field in dataclasses.fields(arguments_class)}
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
    arguments[name] = settings.activation_checkpointing
    if settings.activation_checkpointing:
        arguments[f"{name}_kwargs"] = {"use_reentrant": False}
    if arguments_class is SFTConfig:
        arguments["max_length"] = settings.max_length
        arguments["dataset_kwargs"] = {"skip_prepare_dataset": True}
        # SFTTrainer turns a mixture's own balance loss on, whatever its configuration says.
        if not getattr(model.config.get_text_config(), "output_router_logits", False):
            arguments["router_aux_loss_coef"] = 0.0
    progress = ProgressBar(settings.progress)
    trainer = trainer_class(
        model=model,
        args=arguments_class(**arguments),
        train_dataset=dataset.with_format("numpy"),  # lists of numbers cost ten times as much
        data_collator=functools.partial(
            collate,
            pad_id=pad_id(tokenizer, model),
            packed=settings.packing,
            prompts=run.prompts,
        ),
        # Trainer would write the tokenizer's padding over the configuration's, by which a
        # classifier and T5 find their way; SFTTrainer would fetch a tokenizer of its own.
        processing_class=tokenizer if arguments_class is SFTConfig else None,
        callbacks=[progress],
    )
    if settings.activation_checkpointing:  # as Trainer does when it begins, before it is measured
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": arguments[f"{name}_kwargs"]})
    trainer.progress = progress
    for callback in (PrinterCallback, ProgressCallback):  # they write to standard output
        trainer.remove_callback(callback)
    trainer.stage, trainer.router_learning_rate = stage, settings.router_learning_rate
    _float32_masters(model)  # SFTTrainer rounds what trains on a quantized base to bf16
    return trainer
