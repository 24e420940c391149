"""The command `train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from sparsecraft.cli.options import Paths
from sparsecraft.training.options import TrainOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainOptions):
    """Train a converted model on chat, text or classification rows."""

    folder: Positional[str]
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


def train(command: TrainCommand, say: Callable[[str], None]) -> None:
    """Train and save the model that a command names."""
    import torch

    from sparsecraft.checkpoint.folder import check_free
    from sparsecraft.checkpoint.load import load
    from sparsecraft.training.train import train as train_model

    check_free(command.out, command.overwrite)
    model = load(command.folder)
    if command.dtype != "saved":
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(getattr(torch, command.dtype))
    report = train_model(
        model,
        command.data,
        command.out,
        resume=command.resume,
        overwrite=command.overwrite,
        **command.of_training(),
    )
    say(f"{report}\nSaved and read back: {command.out}")
