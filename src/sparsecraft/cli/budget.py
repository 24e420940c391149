"""The commands `calibrate` and `sweep`, and what `--budget` says. Torch-free until they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

# A share of the experts, or the rule of the model's recipe.
Budget = float | Literal["recipe"]


Paths = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CalibrateCommand:
    """Find the threshold, or number of experts, for a share of the FLOPs, and save it."""

    folder: Positional[str]
    """Checkpoint of a split model whose routers are trained."""
    data: Paths
    """Files to measure on, not those that it is judged by."""
    target_flops: tuple[float, ...] = (0.5,)
    """FLOPs of the split networks, routers included, over dense; of several the first is set."""
    out: Path | None = None
    """Write to this folder; otherwise the checkpoint itself is written again."""
    max_tokens: int | None = 16_384
    """Read so many tokens of the data; None is all."""
    max_length: int | None = None
    """Longer rows are dropped."""
    overwrite: bool = False
    """Replace an existing `--out` once the new one is complete."""


def run_calibrate(command: CalibrateCommand, say: Callable[[str], None]) -> None:
    from sparsecraft.checkpoint.folder import check_free
    from sparsecraft.checkpoint.load import load_any
    from sparsecraft.checkpoint.save import save
    from sparsecraft.evaluation.budget.calibration import calibrate

    if command.out is not None:
        check_free(command.out, command.overwrite)
    model, tokenizer = load_any(command.folder)
    found = calibrate(
        model,
        command.data,
        target_flops=command.target_flops,
        tokenizer=tokenizer,
        max_tokens=command.max_tokens,
        max_length=command.max_length,
    )
    say(str(found))
    out = command.folder if command.out is None else command.out
    overwrite = command.overwrite or command.out is None
    save(model, out, overwrite=overwrite)
    say(f"Budget {found.settings[0].share:.3f} set, saved and read back: {out}")


@dataclass(frozen=True, kw_only=True)
class SweepCommand:
    """Draw score and latency of a split model against its FLOPs, over budgets."""

    folder: Positional[str]
    """Checkpoint of a split model whose routers are trained."""
    data: Paths
    """Files to score it on."""
    out: Path
    """Folder for sweep.png, sweep.csv and sweep.md."""
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Budgets; the dense function is measured in any case."""
    batch_sizes: tuple[int, ...] = (1, 16)
    """Of the passes that are timed."""
    latency: bool = True
    """Time passes."""
    calibration_data: Paths = ()
    """Files to find thresholds on; otherwise the first quarter of the rows of `--data`."""
    max_tokens: int | None = 16_384
    """Score so many tokens, and calibrate on so many; None is all."""
    max_length: int | None = None
    """Longer rows are dropped."""
    context: int = 128
    """Tokens before the one that is timed."""
    rounds: int = 20
    """Times that each pass is timed."""


def run_sweep(command: SweepCommand, say: Callable[[str], None]) -> None:
    from rich.console import Console

    from sparsecraft.evaluation.budget.sweep import sweep

    found = sweep(
        command.folder,
        command.data,
        out=command.out,
        shares=command.shares,
        batch_sizes=command.batch_sizes if command.latency else (),
        calibration_data=command.calibration_data or None,
        max_tokens=command.max_tokens,
        max_length=command.max_length,
        context=command.context,
        rounds=command.rounds,
    )
    Console(width=max(Console().width, 100)).print(found.table())
    for note in found.notes:
        say(note)
    say(f"Written: {command.out / 'sweep.png'}, sweep.csv, sweep.md")


def set_for(model: Any, budget: Budget | None) -> None:
    """Set the budget that a command was given, if it was."""
    from sparsecraft.surgery.budget import set_budget, warn_untrained

    if budget is not None:
        set_budget(model, None if budget == "recipe" else budget)
        warn_untrained(model)
