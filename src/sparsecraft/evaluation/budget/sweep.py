"""Score against FLOPs and latency of a split model, over budgets.

Both the score and the FLOPs are of the same held-out data, and the FLOPs are those of the experts
that ran there: routers counted, padding left out.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from sparsecraft.checkpoint.load import load_any
from sparsecraft.checkpoint.replacing import adding
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.evaluation.budget.calibration import rule_of
from sparsecraft.evaluation.budget.latency import CONTEXT, ROUNDS, latencies
from sparsecraft.evaluation.budget.loads import Batch, Source, ffn_flops, model_flops, observe
from sparsecraft.evaluation.budget.plots import sweep_png
from sparsecraft.evaluation.budget.thresholds import Search
from sparsecraft.evaluation.machine import machine
from sparsecraft.recipe.words import count_words
from sparsecraft.surgery.budget import set_budget, split_layers, unchanged
from sparsecraft.surgery.record import conversion_of, tokenizer_of

log = logging.getLogger("sparsecraft")

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BATCH_SIZES = (1, 16)
MAX_TOKENS = 16_384
# Of the rows, where no other data is given to find thresholds on.
CALIBRATION_SHARE = 0.25

COLUMNS = {
    "budget": "budget",
    "share": "experts run",
    "ffn_flops": "FFN FLOPs",
    "model_flops": "model FLOPs",
    "loss": "loss",
    "loss_change": "loss change",
    "accuracy": "accuracy",
    "score": "score",
    "share_min": "layer min",
    "share_max": "layer max",
    "load_cv": "load CV",
}
DETAILS = ("share_", "load_", "union_", "latency_")
AXES = {"loss": "held-out loss (nats per token)", "accuracy": "held-out accuracy"}


AGAINST = "Compared with this model with every expert, whatever it was trained from."


@dataclass(frozen=True, slots=True)
class Sweep:
    """What `sweep` measured.

    Attributes:
        rows: one for each budget, that of every expert first. `budget`: share of experts asked for.
            `share`, `share_min`, `share_max`: of experts that ran, over layers; `load_cv`: see
            `Observed`. `threshold` or `k`. `ffn_flops`, `model_flops`: over the dense ones, routers
            included. `loss`, `loss_change` (relative), `accuracy`, `score`. For each batch size B:
            `union_B`, share of a layer's experts that any of B tokens runs; `latency_ms_B` with the
            quartiles `latency_low_B` and `latency_high_B`; `relative_B`, over dense.
        notes: data, machine, and what was left out.
        score: the column that is the score.
        batch_sizes: those that were timed.
    """

    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    score: str
    batch_sizes: tuple[int, ...]

    def cells(self, brief: bool = False) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table, as text; columns without a value are left out."""
        names = dict(COLUMNS)
        for size in self.batch_sizes:
            names[f"union_{size}"] = f"union of {size}"
            names[f"latency_ms_{size}"] = f"ms at batch {size}"
            names[f"relative_{size}"] = f"x all at {size}"
        if brief:
            names = {key: name for key, name in names.items() if not key.startswith(DETAILS)}
        kept = [key for key in names if any(row.get(key) is not None for row in self.rows)]
        return [names[key] for key in kept], [
            [_text(key, row, row.get(key)) for key in kept] for row in self.rows
        ]

    def table(self) -> Table:
        """Budgets, FLOPs, scores and relative latencies; the files have the rest."""
        header, rows = self.cells(brief=True)
        table = Table(*header, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        header, rows = self.cells()
        lines = [f"| {' | '.join(header)} |", f"|{' ---: |' * len(header)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([*lines, "", *self.notes]) + "\n"


def sweep(
    model: nn.Module | str | Path,
    data: Any,
    *,
    out: str | Path,
    shares: Sequence[float] = SHARES,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    calibration_data: Any = None,
    tokenizer: Any = None,
    max_tokens: int | None = MAX_TOKENS,
    max_length: int | None = None,
    context: int = CONTEXT,
    rounds: int = ROUNDS,
    score: Callable[[nn.Module], float] | None = None,
) -> Sweep:
    """Measure a split model at several budgets; write `sweep.png`, `sweep.csv`, `sweep.md`.

    The model is left as it was. Rules by threshold are calibrated for every share first.

    Args:
        model: a converted model whose routers are made, or its checkpoint folder.
        data: what `calibrate` takes; held out from training.
        out: folder of the files, made if it is missing.
        shares: of experts; 1.0, the dense function, is measured in any case.
        batch_sizes: of the passes that are timed; none skips that.
        calibration_data: where thresholds are found. None takes the first quarter of `data` (rows
            of files are shuffled with a fixed seed); the score is then of the others.
        max_tokens: tokens to score, and as many to calibrate on, at most; None is all.
        context: tokens in a causal model's cache when one more is timed.
        rounds: times that each pass is timed.
        score: measures the model instead of `evaluate`, for models without loss or accuracy.

    Raises:
        SparsecraftError: no split networks, untrained routers, or shares outside (0, 1].
        DataError: too few rows, or data without a score.
        CheckpointError: the folder cannot be written, or another process writes it.
    """
    _check_measuring(context, rounds, Path(out))
    shares = _checked(shares, batch_sizes)
    with adding(out) as folder:
        if isinstance(model, (str, Path)):
            model, own = load_any(str(model))
            tokenizer = tokenizer or own
        select = rule_of(model)
        limits, tokenizer = (max_tokens, max_length), tokenizer or tokenizer_of(model)
        held, calibrated, split = _split(model, data, calibration_data, tokenizer, *limits, select)
        with unchanged(model):
            settings, notes = _settings(model, shares, calibrated, select)
            seen = [_row(model, setting, held, batch_sizes, score, select) for setting in settings]
            for size in batch_sizes:
                _time(model, settings, seen, held, size, context, rounds)
        _compare_losses(seen)
        notes = (f"{split}. {AGAINST}", machine(model), *notes)
        result = Sweep(tuple(seen), notes, _score_name(seen[0]), tuple(batch_sizes))
        _write(model, result, folder, context, rounds)
    return result


def _compare_losses(rows: list[dict[str, Any]]) -> None:
    """Add each row's relative change of the loss against the first row's."""
    for row in rows:
        loss = row["loss"]
        row["loss_change"] = None if loss is None else loss / rows[0]["loss"] - 1


@dataclass(frozen=True, slots=True)
class Setting:
    """One budget to be measured."""

    budget: float
    share: float
    threshold: float | None
    points: tuple[tuple[float, float], ...]

    def use(self, model: nn.Module) -> None:
        conversion_of(model).running.calibration = list(self.points)
        set_budget(model, self.share)


def _check_measuring(context: int, rounds: int, out: Path) -> None:
    """Refuse before anything is measured what would fail at its end."""
    for name, value in (("context", context), ("rounds", rounds)):
        if type(value) is not int or value < 1:
            raise SparsecraftError(f"{name} is {value!r}; it must be a whole number from 1.")
    if out.exists() and not out.is_dir():
        raise SparsecraftError(f"{out} is a file; a sweep writes a folder. Choose another --out.")


def _checked(shares: Sequence[float], batch_sizes: Sequence[int]) -> list[float]:
    for share in shares:
        if not (isinstance(share, (int, float)) and 0 < share <= 1):
            raise SparsecraftError(f"shares has {share!r}; each lies above 0 and at most at 1.")
    for size in batch_sizes:
        if type(size) is not int or size < 1:
            raise SparsecraftError(f"batch_sizes has {size!r}; each is a whole number from 1.")
    return sorted({1.0, *map(float, shares)}, reverse=True)


def _split(
    model: nn.Module,
    data: Any,
    calibration_data: Any,
    tokenizer: Any,
    max_tokens: int | None,
    max_length: int | None,
    select: str,
) -> tuple[list[Batch], list[Batch], str]:
    """Batches to score, batches to calibrate on, and a sentence that says which is which."""
    source = Source(model, data, tokenizer, max_length, split="test")
    if select == "top_k":
        held = calibrated = source.batches(max_tokens)
        said = f"Score of all {len(source)} rows; top-k needs no thresholds"
    elif calibration_data is None:
        first = max(1, round(CALIBRATION_SHARE * len(source)))
        held = source.batches(max_tokens, start=first)
        calibrated = source.batches(max_tokens, end=first)
        said = f"Thresholds from the first {first} of {len(source)} rows, score of the others"
    else:
        held = source.batches(max_tokens)
        other = Source(model, calibration_data, tokenizer, max_length, split="train")
        calibrated = other.batches(max_tokens)
        said = "Thresholds from the calibration data, score of the data"
    if not held or not calibrated:
        raise DataError(
            f"The data has {len(source)} rows or batches, too few to score some and calibrate on "
            "others; pass more, or calibration_data=..."
        )
    return held, calibrated, said


def _settings(
    model: nn.Module, shares: Sequence[float], batches: Sequence[Batch], select: str
) -> tuple[list[Setting], list[str]]:
    """The budgets to measure, the dense function first, and what was left out."""
    found, notes = [Setting(1.0, 1.0, None, ())], []
    search = None if select == "top_k" else Search(model, batches, select)
    counts: set[tuple] = set()
    for share in (s for s in shares if s < 1):
        try:
            if search is None:
                set_budget(model, share)
                key = tuple(layer.router.k for layer in split_layers(model).values())
                setting = Setting(share, share, None, ())
            else:
                trial = search.below(share, of=lambda t: t.share)
                key = (trial.threshold,)
                setting = Setting(
                    share, trial.share, trial.threshold, tuple(search.points(keep=trial))
                )
        except SparsecraftError as error:
            notes.append(f"Budget {share:g} was left out: {error}")
            continue
        if key in counts:
            notes.append(f"Budget {share:g} was left out: it runs what the one above it does.")
            continue
        counts.add(key)
        found.append(setting)
    for note in notes:
        log.warning(note)
    return found, notes


def _row(
    model: nn.Module,
    setting: Setting,
    batches: Sequence[Batch],
    batch_sizes: Sequence[int],
    score: Callable[[nn.Module], float] | None,
    select: str,
) -> dict[str, Any]:
    setting.use(model)
    seen = observe(model, batches, groups=batch_sizes)
    dense = setting.budget == 1
    ffn = 1.0 if dense else ffn_flops(model, seen.shares)
    layers = split_layers(model).values()
    return {
        "budget": setting.budget,
        "share": seen.share,
        "share_min": min(seen.shares.values()),
        "share_max": max(seen.shares.values()),
        "load_cv": seen.load_cv,
        "threshold": setting.threshold,
        "k": max(layer.router.k for layer in layers) if select == "top_k" else None,
        "ffn_flops": ffn,
        "model_flops": 1.0 if dense else model_flops(model, ffn),
        "loss": seen.loss,
        "accuracy": seen.accuracy,
        "score": None if score is None else float(score(model)),
        **{f"union_{size}": seen.unions.get(size) for size in batch_sizes},
    }


def _time(
    model: nn.Module,
    settings: Sequence[Setting],
    rows: Sequence[dict[str, Any]],
    batches: Sequence[Batch],
    size: int,
    context: int,
    rounds: int,
) -> None:
    """Time a pass of `size` at every setting, into the rows."""
    uses = [lambda setting=setting: setting.use(model) for setting in settings]
    timed = latencies(model, uses, batches, batch_size=size, context=context, rounds=rounds)
    for row, found in zip(rows, timed, strict=True):
        row[f"latency_ms_{size}"], row[f"relative_{size}"] = found.median, found.relative
        row[f"latency_low_{size}"], row[f"latency_high_{size}"] = found.low, found.high


def _score_name(dense: dict[str, Any]) -> str:
    for name in ("score", "accuracy", "loss"):
        if dense[name] is not None:
            return name
    raise DataError(
        "The data has no labels to score the model by; pass score=, a function of the model."
    )


def _write(model: nn.Module, result: Sweep, out: Path, context: int, rounds: int) -> None:
    with (out / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(result.rows[0]))
        writer.writeheader()
        writer.writerows(result.rows)
    recipe = conversion_of(model).recipe
    (out / "sweep.md").write_text(f"# {recipe.name} ({recipe.variant})\n\n{result.markdown()}")
    timed = f"Latency: one eager pass, cache of {context} tokens if causal, {rounds} rounds."
    experts = next(count_words(edit) for edit in recipe.edits if edit.experts.parts)
    sweep_png(
        out / "sweep.png",
        result.rows,
        score=result.score,
        axis=AXES.get(result.score, "score"),
        title=f"{recipe.name} ({recipe.variant}), {experts} experts in each FFN",
        note=" ".join([*result.notes[:2], *([timed] if result.batch_sizes else [])]),
        batch_sizes=result.batch_sizes,
    )


def _text(key: str, row: dict[str, Any], value: Any) -> str:
    if value is None:
        return ""
    if key == "loss_change":
        return f"{value:+.1%}"
    if key in ("loss", "accuracy", "score"):
        return f"{value:.4f}"
    if key.startswith("latency_ms"):
        size = key.rpartition("_")[2]
        return f"{value:.2f} ({row[f'latency_low_{size}']:.2f}-{row[f'latency_high_{size}']:.2f})"
    if key == "budget":
        return f"{value:g}"
    return f"{value:.2f}" if key == "load_cv" or key.startswith("relative") else f"{value:.1%}"
