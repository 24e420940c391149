"""train(): the stages of a recipe, one after the other, and the checkpoint that they leave."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsecraft.checkpoint.companions import check_settings
from sparsecraft.checkpoint.load import load
from sparsecraft.checkpoint.replacing import claimed
from sparsecraft.checkpoint.save import check_loadable, save
from sparsecraft.data.batches import collate
from sparsecraft.data.limits import pad_id
from sparsecraft.data.prepare import TASK_OF_MODEL, prepare
from sparsecraft.data.sentences import Prompts
from sparsecraft.dense.memory import outside_of_inference_mode
from sparsecraft.dense.sharing import is_sharded
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.split_report import summary
from sparsecraft.moe.context import layer_masks
from sparsecraft.moe.init.graph import check_metis
from sparsecraft.recipe.stages import Fit, Stage
from sparsecraft.surgery.elsewhere import note as note_elsewhere
from sparsecraft.surgery.record import conversion_of, tokenizer_of
from sparsecraft.training.arguments import by_fsdp, processes
from sparsecraft.training.deal import check_deal
from sparsecraft.training.defaults import checked, fill, fit_tokens, objective_of, stages_of
from sparsecraft.training.descend import Run, descend
from sparsecraft.training.fit.fit import NOT_BETTER, before_fit, fit
from sparsecraft.training.moved import Evidence, say
from sparsecraft.training.moved import found as moved_by
from sparsecraft.training.options import TrainOptions
from sparsecraft.training.packing import leak
from sparsecraft.training.report import TrainReport, note, noted_if_done
from sparsecraft.training.resume import check_folder
from sparsecraft.training.staging import staged
from sparsecraft.training.trainers import (
    TOKEN_MASK,
)

log = logging.getLogger("sparsecraft")


@outside_of_inference_mode()
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
        TrainingError: a loss, a gradient or a weight is not finite, or something has changed that
            a stage does not train. `out` is as it was, and the last state waits for `resume`.
    """
    asked = checked(options)
    with claimed(out, overwrite) as path:
        model = load(model) if isinstance(model, (str, Path)) else model
        record = conversion_of(model)
        check_loadable(model)
        note_elsewhere(model)
        check_settings(model, tokenizer)
        _check_devices(model)
        states = path.with_name(f"{path.name}.training")
        check_folder(states, resume, asked.stages)
        stages = stages_of(record.recipe, asked.stages)
        _check_stages(model, [stage for _, stage in stages])
        reader = tokenizer or _tokenizer_of(model)
        asked, unpacked = _packable(model, reader, stages, asked)
        run = Run(
            model, reader, path, Prompts.of(model), resume, unpacked, asked.micro_batch is None
        )
        with noted_if_done(record):
            trainer, report = _run_stages(run, stages, data, asked, states)
            _finish(run, states, overwrite, tokenizer, trainer)
    return report


def _run_stages(
    run: Run, stages: list[tuple[int, Stage | Fit]], data: Any, asked: TrainOptions, states: Path
) -> tuple[Any | None, TrainReport]:
    """The stages in turn: the last trainer, which knows the other processes, and what they did."""
    trainer, moved = None, {}
    for number, stage in stages:
        settings = fill(run.model, stage, asked)
        dataset, counts = _dataset(run, data, settings, whole=stage.deals)
        with staged(run.model, stage, settings.seed):
            if isinstance(stage, Fit):
                report = _fit(run, stage, settings, dataset, counts)
            else:
                folder = states / f"{number}-{stage.name}"
                trainer, report = descend(run, stage, settings, dataset, counts, folder)
        moved |= report.moved
    return trainer, dataclasses.replace(report, moved=moved)


def _finish(run: Run, states: Path, overwrite: bool, tokenizer: Any, trainer: Any | None) -> None:
    """Write the checkpoint, by the first process of several, and let go of what `resume` reads."""
    run.model.eval()
    first = trainer is None or trainer.is_world_process_zero()
    if first or is_sharded(run.model):  # all processes give their parts, and the first one writes
        save(run.model, run.out, overwrite=overwrite, tokenizer=tokenizer)
    if first:
        shutil.rmtree(states, ignore_errors=True)
    if trainer is not None:
        trainer.accelerator.wait_for_everyone()


def _check_stages(model: nn.Module, stages: list[Stage | Fit]) -> None:
    """Refuse what a stage cannot do, before those in front of it have cost anything."""
    for stage in stages if processes() > 1 else ():
        if isinstance(stage, Fit) or stage.deal:
            does = "fits routers" if isinstance(stage, Fit) else "assigns rows"
            raise SparsecraftError(
                f"Stage {stage.name!r} {does} in one process and was started in {processes()}; "
                "train the other stages with torchrun (--stages NAME), and this one without."
            )
    if by_fsdp() and len(stages) > 1:
        raise SparsecraftError(
            f"FSDP2 shares a model once in a run, and {len(stages)} stages would run; train "
            f"{stages[0].name!r} alone (--stages {stages[0].name}), then the next from its "
            "checkpoint."
        )
    check_deal(model, stages, objective_of(model))
    edits = conversion_of(model).recipe.edits
    splits = [e.experts for e in edits if e.experts.parts]
    fits = any(isinstance(stage, Fit) for stage in stages)
    if fits and any(spec.partition.startswith("coactivation") for spec in splits):
        check_metis()


def _fit(
    run: Run, stage: Fit, settings: TrainOptions, dataset: Any, counts: dict[str, int]
) -> TrainReport:
    """A stage that fits the routers of split networks to what the networks read."""
    spec = dataclasses.replace(stage, tokens=fit_tokens(stage, settings))
    rows = settings.micro_batch
    batches = (
        collate(
            list(dataset.select(range(start, min(start + rows, len(dataset))))),
            pad_id(run.tokenizer, run.model),
            packed=settings.packing,
        )
        for start in range(0, len(dataset), rows)
    )
    start, before = time.perf_counter(), before_fit(run.model, stage)
    found = fit(run.model, batches, spec, masks=_masks_of, seed=settings.seed)
    moved = moved_by(before, run.model, Evidence(otherwise=NOT_BETTER))
    say(stage.name, moved)
    seconds = time.perf_counter() - start
    log.info(f"Stage {stage.name!r}: {summary(found)}, {seconds:.0f} s.")
    losses = [layer["loss"] for layer in found["layers"].values() if "loss" in layer]
    loss = sum(losses) / max(1, len(losses))
    speed = found["tokens"] / seconds
    report = TrainReport(
        run.out, found["steps"], loss, seconds, speed, counts, moved={stage.name: moved}
    )
    note(conversion_of(run.model), stage, settings, report, fit=found, **run.noted)
    return report


def _packable(
    model: nn.Module, tokenizer: Any, stages: list[tuple[int, Stage | Fit]], asked: TrainOptions
) -> tuple[TrainOptions, str | None]:
    """The options, without packing where documents of a pack would see each other, and how."""
    settings = fill(model, stages[0][1], asked)
    if not settings.packing:
        return asked, None
    why = leak(model, tokenizer, settings.max_length, settings.micro_batch)
    if why is None:
        return asked, None
    log.warning(
        f"Rows are not packed, each is a sequence of its own: in this {type(model).__name__} {why}."
    )
    return dataclasses.replace(asked, packing=False), why


def _masks_of(model: nn.Module, batch: dict[str, Any]) -> Any:
    return layer_masks(model, batch, batch.get(TOKEN_MASK))


def _dataset(
    run: Run, data: Any, settings: TrainOptions, *, whole: bool = False
) -> tuple[Any, dict[str, int]]:
    """The run's rows and their counts; `whole` leaves them unpacked."""
    rows, counts = prepare(
        data,
        run.tokenizer,
        max_length=settings.max_length,
        weights=settings.weights or None,
        packing=settings.packing and not whole,
        seed=settings.seed,
        task=TASK_OF_MODEL[objective_of(run.model)],
        prompts=run.prompts,
        model=run.model,
    )
    if run.prompts is not None:
        run.prompts.embeddings()  # of all, in large batches
    return rows, counts


def _tokenizer_of(model: nn.Module) -> Any:
    if found := tokenizer_of(model):
        return found
    raise DataError("The model came without a tokenizer; pass tokenizer=...")


def _check_devices(model: nn.Module) -> None:
    """Refuse copies of the model on several GPUs in one process: their routing is not seen."""
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if torch.cuda.device_count() > 1 and processes() == 1 and not spread:
        raise SparsecraftError(
            f"{torch.cuda.device_count()} GPUs are visible to one process. Launch one for each, "
            "`torchrun --nproc-per-node N -m sparsecraft train ...`, or show it one GPU, "
            "`CUDA_VISIBLE_DEVICES=0 sparsecraft train ...`."
        )
