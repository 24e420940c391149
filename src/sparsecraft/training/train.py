"""The one training path: a recipe's stages on SFTTrainer, Seq2SeqTrainer or Trainer."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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

from sparsecraft.checkpoint.folder import check_free
from sparsecraft.checkpoint.load import load
from sparsecraft.checkpoint.save import check_loadable, save
from sparsecraft.data.batches import collate
from sparsecraft.data.encoding import pad_id
from sparsecraft.data.prepare import TASK_OF_MODEL, count_tokens, pack, prepare
from sparsecraft.data.sentences import Prompts
from sparsecraft.dense import hub
from sparsecraft.dense.loading import load_tokenizer
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.split_report import summary
from sparsecraft.moe.context import layer_masks
from sparsecraft.moe.init.graph import check_metis
from sparsecraft.recipe.stages import Fit, Stage
from sparsecraft.surgery.record import Conversion, conversion_of
from sparsecraft.surgery.trainable import set_trainable
from sparsecraft.training.arguments import processes, training_arguments
from sparsecraft.training.deal import check_deal, deal, directed, sampled
from sparsecraft.training.defaults import fill, fit_tokens, needs, read, stages_of, task_of
from sparsecraft.training.fit.fit import fit
from sparsecraft.training.options import TrainOptions
from sparsecraft.training.progress import ProgressBar
from sparsecraft.training.resume import check_folder, check_same_run, describe, last_state, read_as
from sparsecraft.training.staging import staged
from sparsecraft.training.trainers import (
    TOKEN_MASK,
    RoutedSeq2SeqTrainer,
    RoutedSFTTrainer,
    RoutedTrainer,
    adapters_known,
)

log = logging.getLogger("sparsecraft")

# Why rows are not trained on, among `TrainReport.counts`.
DROPPED = ("too_long", "no_trainable_token")


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

    def __str__(self) -> str:
        dropped = {key: self.counts[key] for key in DROPPED if self.counts.get(key)}
        return (
            f"{self.steps} steps, mean loss {self.loss:.3f}, {self.seconds:.0f} s, "
            f"{self.tokens_per_second:.0f} tokens/s."
            + (f" Rows dropped: {dropped}." if dropped else "")
        )


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
        data: files, folders or hub datasets; see `sparsecraft.data.prepare`.
        out: the checkpoint folder to write. The state for `resume` is kept beside it, in
            `OUT.training`, until the run is complete.
        tokenizer: by default the checkpoint's or the base's own; one that is given is saved.
        resume: continue from the last state in `OUT.training`, exactly.
        overwrite: replace an existing folder once the new one is complete.
        options: fields of `sparsecraft.training.options.TrainOptions`, such as `steps` and
            `weights`.

    Raises:
        DataError, CheckpointError, ResourceError: before anything is written.
    """
    asked, out = read(options), Path(out).resolve()
    model = load(model) if isinstance(model, (str, Path)) else model
    record = conversion_of(model)
    check_free(out, overwrite)
    check_loadable(model)
    _check_devices(model)
    states = out.with_name(f"{out.name}.training")
    check_folder(states, resume, asked.stages)
    trainer = None
    reads, prompts = tokenizer or _tokenizer_of(record), Prompts.of(model)
    stages = stages_of(record.recipe, asked.stages)
    _check_stages(model, [stage for _, stage in stages])
    for number, stage in stages:
        folder = states / f"{number}-{stage.name}"
        settings = fill(model, stage, asked)
        dataset, counts = _dataset(model, data, reads, settings, prompts, stage.deals)
        with staged(model, stage):
            if isinstance(stage, Fit):
                report = _fit(model, stage, settings, dataset, reads, counts, out)
            else:
                trainer, report = _descend(
                    model, stage, settings, dataset, reads, prompts, folder, counts, out, resume
                )
    model.eval()
    if trainer is None or trainer.is_world_process_zero():
        save(model, out, overwrite=overwrite, tokenizer=tokenizer)
        shutil.rmtree(states, ignore_errors=True)
    if trainer is not None:
        trainer.accelerator.wait_for_everyone()
    return report


def _check_stages(model: nn.Module, stages: list[Stage | Fit]) -> None:
    """Refuse what a stage cannot do, before those in front of it have cost anything."""
    for stage in stages if processes() > 1 else ():
        if isinstance(stage, Fit) or stage.deal:
            does = "fits routers" if isinstance(stage, Fit) else "deals rows out"
            raise SparsecraftError(
                f"Stage {stage.name!r} {does} in one process and was started in {processes()}; "
                "train the other stages with torchrun (--stages NAME), and this one without."
            )
    check_deal(model, stages, task_of(model))
    edits = conversion_of(model).recipe.edits
    splits = [e.experts for e in edits if e.experts.parts]
    fits = any(isinstance(stage, Fit) for stage in stages)
    if fits and any(spec.partition.startswith("coactivation") for spec in splits):
        check_metis()


def _descend(
    model: nn.Module,
    stage: Stage,
    settings: TrainOptions,
    dataset: Any,
    tokenizer: Any,
    prompts: Prompts | None,
    folder: Path,
    counts: dict[str, int],
    out: Path,
    resume: bool,
) -> tuple[Any, TrainReport]:
    """A stage that trains by gradient; its trainer too, which knows the other processes."""
    _prepare_parameters(model, stage)
    log.info(needs(model, settings, out))
    dataset = sampled(dataset, stage.deal) if stage.deal else dataset
    run = describe(model, settings, dataset, processes())
    check_same_run(folder, run, resume, read_as(model))
    found: dict[str, Any] = {}
    if stage.deal:
        dataset, found["buckets"] = deal(
            model, dataset, folder, pad_id=pad_id(tokenizer), resume=resume
        )
        counts = counts | {"dealt": len(dataset)} | count_tokens(dataset)
        if settings.packing:
            dataset = pack(dataset, settings.max_length, settings.seed)
    forced = directed(model) if stage.deal else nullcontext()
    with _untouched(model), adapters_known(model), forced:
        trainer = _trainer(model, stage, settings, dataset, tokenizer, folder, prompts)
        report = _run(trainer, counts, out, resume)
    _note(conversion_of(model), stage, settings, report, log=trainer.state.log_history, **found)
    return trainer, report


def _fit(
    model: nn.Module,
    stage: Fit,
    settings: TrainOptions,
    dataset: Any,
    tokenizer: Any,
    counts: dict[str, int],
    out: Path,
) -> TrainReport:
    """A stage that fits the routers of split networks to what the networks read."""
    spec = dataclasses.replace(stage, tokens=fit_tokens(stage, settings))
    rows = settings.micro_batch
    batches = (
        collate(
            list(dataset.select(range(start, min(start + rows, len(dataset))))),
            pad_id(tokenizer),
            packed=settings.packing,
        )
        for start in range(0, len(dataset), rows)
    )
    start = time.perf_counter()
    found = fit(model, batches, spec, masks=_masks_of, seed=settings.seed)
    seconds = time.perf_counter() - start
    log.info(f"Stage {stage.name!r}: {summary(found)}, {seconds:.0f} s.")
    losses = [layer["loss"] for layer in found["layers"].values() if "loss" in layer]
    loss = sum(losses) / max(1, len(losses))
    speed = found["tokens"] / seconds
    report = TrainReport(out, found["steps"], loss, seconds, speed, counts)
    _note(conversion_of(model), stage, settings, report, fit=found)
    return report


def _masks_of(model: nn.Module, batch: dict[str, Any]) -> Any:
    return layer_masks(model, batch, batch.get(TOKEN_MASK))


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


def _note(
    record: Conversion,
    stage: Stage | Fit,
    settings: TrainOptions,
    report: TrainReport,
    **found: Any,
) -> None:
    """Put what a stage did into the report that the checkpoint keeps."""
    entry = {
        "stage": stage.name,
        "steps": report.steps,
        "loss": report.loss,
        "settings": dataclasses.asdict(settings),
        "counts": report.counts,
    }
    record.report.setdefault("training", []).append(entry | found)


def _dataset(
    model: nn.Module,
    data: Any,
    tokenizer: Any,
    settings: TrainOptions,
    prompts: Prompts | None = None,
    whole: bool = False,
) -> tuple[Any, dict[str, int]]:
    """The run's rows and their counts; `whole` leaves them unpacked."""
    rows, counts = prepare(
        data,
        tokenizer,
        max_length=settings.max_length,
        weights=settings.weights or None,
        packing=settings.packing and not whole,
        seed=settings.seed,
        task=TASK_OF_MODEL[task_of(model)],
        prompts=prompts,
    )
    if prompts is not None:
        prompts.embeddings()  # of all, in large batches
    return rows, counts


def _run(trainer: Any, counts: dict[str, int], out: Path, resume: bool) -> TrainReport:
    """Train to the end, from the last complete state if asked to."""
    args, start = trainer.args, time.perf_counter()
    last = last_state(Path(args.output_dir)) if resume else None
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


def _prepare_parameters(model: nn.Module, stage: Stage) -> None:
    """Let the stage's parameters require gradients, as float32 masters, in training mode.

    A classifier's head trains too: it is new for its task.
    """
    model.train()
    set_trainable(model, stage.trains)
    if task_of(model) == "classification":
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
    }[task_of(model)]
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
    progress = ProgressBar(settings.progress)
    trainer = trainer_class(
        model=model,
        args=arguments_class(**arguments),
        train_dataset=dataset,
        data_collator=functools.partial(
            collate,
            pad_id=pad_id(tokenizer),
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


def _tokenizer_of(record: Conversion) -> Any:
    folder = record.folder or (record.origin and hub.resolve(record.origin, record.revision))
    tokenizer = load_tokenizer(folder) if folder else None
    if tokenizer is None:
        raise DataError("The model came without a tokenizer; pass tokenizer=...")
    return tokenizer


def _check_devices(model: nn.Module) -> None:
    """Refuse copies of the model on several GPUs in one process: their routing is not seen."""
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if torch.cuda.device_count() > 1 and processes() == 1 and not spread:
        raise SparsecraftError(
            f"{torch.cuda.device_count()} GPUs are visible to one process. Launch one for each, "
            "`torchrun --nproc-per-node N -m sparsecraft train ...`, or show it one GPU, "
            "`CUDA_VISIBLE_DEVICES=0 sparsecraft train ...`."
        )
