"""The tables of the page: means over seeds, and how often a sign of the paper holds."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.lab.tables import f, insert, markdown

COLUMNS = (
    ("train_error", "train error", 4),
    ("error", "error", 4),
    ("error_top1", "of the best expert alone", 4),
    ("information", "I(E;Y)", 3),
    ("information_released", "I(E; predicted)", 3),
    ("sample_entropy", "H_s", 3),
    ("usage_entropy", "H_u", 3),
)
# What the paper's tables show: (of arm, against arm, measure, its sign there).
SIGNS = (
    ("original", "single", "error", -1),
    ("attentive", "original", "error", -1),
    ("attentive", "original", "sample_entropy", -1),
    ("original + importance", "original", "error", -1),
    ("original + importance", "original", "information", 1),
    ("original + importance", "original", "usage_entropy", 1),
    ("original + similarity", "original", "error", -1),
    ("original + similarity", "original", "information", 1),
    ("original + similarity", "original", "sample_entropy", -1),
    ("original + 10 x similarity", "original", "error", -1),
    ("original + 10 x similarity", "original", "information", 1),
    ("original + 10 x similarity", "original", "sample_entropy", -1),
    ("attentive + importance", "attentive", "information", 1),
    ("attentive + importance", "attentive", "sample_entropy", -1),
    ("attentive + importance", "attentive", "usage_entropy", 1),
    ("attentive + similarity", "attentive", "error", -1),
    ("attentive + similarity", "attentive", "information", 1),
    ("attentive + similarity", "attentive", "sample_entropy", -1),
    ("attentive + 10 x similarity", "attentive", "error", -1),
    ("attentive + 10 x similarity", "attentive", "information", 1),
    ("attentive + 10 x similarity", "attentive", "sample_entropy", -1),
    ("distilled: attentive + importance", "attentive + importance", "error", -1),
    ("distilled: attentive + similarity", "attentive + similarity", "error", -1),
    ("distilled, trunk too: attentive + importance", "attentive + importance", "error", -1),
    ("distilled, trunk too: attentive + similarity", "attentive + similarity", "error", -1),
)
CLEAR = 2.0  # standard errors


def write(results: dict, page: Path) -> None:
    runs, about = results["runs"], results["about"]
    arms = [name for name in runs[0] if name != "seed"]
    head = ["arm", "parameters", "median error", *(title for _, title, _ in COLUMNS)]
    rows = []
    for arm in arms:
        first = runs[0][arm]
        cells = [_cell([run[arm] for run in runs], key, digits) for key, _, digits in COLUMNS]
        median = f(statistics.median(run[arm]["error"] for run in runs))
        rows.append([arm, first["parameters"], median, *cells])
    where = f"torch {about['torch']}, one thread, {about['seconds']} s at a load of {about['load']}"
    text = [
        f"## {len(runs)} seeds, {where}",
        "Mean and standard error over seeds, of 597 held-out samples.",
        markdown(head, rows),
        "## The paper's signs",
        "Differences of the same seed (split, start and order), mean and standard error; `seeds` "
        "counts those with the paper's sign.",
        markdown(
            ["what", "against", "measure", "paper", "here", "holds", "seeds"], [*_signs(runs)]
        ),
    ]
    insert(page, "\n\n".join(text))
    print(page.read_text())


def _cell(results: list[dict], key: str, digits: int) -> str | None:
    if key not in results[0]:
        return None
    mean, deviation = _mean([result[key] for result in results])
    return f"{f(mean, digits)} ± {f(deviation, digits)}"


def _mean(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return statistics.mean(values), 0.0
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def _signs(runs: list[dict]):
    for arm, other, key, sign in SIGNS:
        differences = [run[arm][key] - run[other][key] for run in runs]
        mean, deviation = _mean(differences)
        holds = "yes" if mean * sign > 0 else "no"
        if abs(mean) < CLEAR * deviation:
            holds = f"unclear ({holds})"
        paper = "lower" if sign < 0 else "higher"
        seeds = f"{sum(d * sign > 0 for d in differences)} of {len(runs)}"
        here = f"{mean:+.4f} ± {deviation:.4f}"
        yield [arm, other, key.replace("_", " "), paper, here, holds, seeds]
