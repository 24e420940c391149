"""`sparsecraft train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsecraft.cli.console import Command, Say
from sparsecraft.cli.options import Based, Folder, Paths
from sparsecraft.training.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class TrainCommand(Command, TrainOptions, Based):
    """Train a converted model on chat, text or classification rows."""

    folder: Folder
    """Checkpoint of a converted model."""
    data: Paths
    """Files, folders or hub datasets."""
    out: Path
    """Checkpoint folder to write."""
    resume: bool = False
    """Continue an interrupted run exactly."""
    overwrite: bool = False
    """Replace an existing folder once the new one is complete."""
    dtype: Literal["saved", "float32", "bfloat16"] = "saved"
    """Cast the frozen parameters; those that train are float32."""


def run(command: TrainCommand, say: Say) -> None:
    """Load, train stage after stage, save, report."""
    from sparsecraft.checkpoint.load import load
    from sparsecraft.checkpoint.replacing import claimed
    from sparsecraft.evaluation.history import start_line
    from sparsecraft.evaluation.report import left_out_lines
    from sparsecraft.surgery.record import conversion_of
    from sparsecraft.training.train import train

    with claimed(command.out, command.overwrite):
        model = load(command.folder, command.base)
        if command.dtype != "saved":
            _cast_frozen(model, command.dtype)
        report = train(
            model,
            command.data,
            command.out,
            resume=command.resume,
            overwrite=command.overwrite,
            **command.of_training(),
        )
        record = conversion_of(model)
        lines = [str(report), start_line(record.recipe, record.report)]
        lines += [*left_out_lines(record.left_out), f"Saved and read back: {command.out}"]
        say("\n".join(lines))


def _cast_frozen(model: Any, dtype: str) -> None:
    import torch

    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(getattr(torch, dtype))
