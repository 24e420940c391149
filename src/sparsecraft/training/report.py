"""What a training run did, and what the checkpoint remembers of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsecraft.evaluation.history import moved_lines
from sparsecraft.recipe.stages import Fit, Stage
from sparsecraft.surgery.record import Conversion
from sparsecraft.training.options import TrainOptions

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
        moved: name of each stage -> how many tensors should have moved, how many have, and why the
            others have not; see `sparsecraft.training.moved`.
        skipped: steps that the scaler of a float16 run left out.
    """

    out: Path
    steps: int
    loss: float
    seconds: float
    tokens_per_second: float
    counts: dict[str, int]
    moved: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: int = 0

    def __str__(self) -> str:
        dropped = {key: self.counts[key] for key in DROPPED if self.counts.get(key)}
        return (
            f"{self.steps} steps, mean loss {self.loss:.3f}, {self.seconds:.0f} s, "
            f"{self.tokens_per_second:.0f} tokens/s."
            + (f" Rows dropped: {dropped}." if dropped else "")
            + (f" Steps left out by the scaler: {self.skipped}." if self.skipped else "")
            + "".join(f"\n{line}" for name in self.moved for line in self._moved_lines(name))
        )

    def _moved_lines(self, stage: str) -> list[str]:
        first, *others = moved_lines(self.moved[stage])
        return [f"Stage {stage!r}: {first}", *others]


def note(
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
        "moved": report.moved[stage.name],
    }
    record.report.setdefault("training", []).append(entry | found)
