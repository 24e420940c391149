"""The page of this study: tables from its results."""

from __future__ import annotations

import json
import math
import statistics

from benchmarks.cohere.arms import ARMS, GROUPS, Run, best_run, grids, uniform
from benchmarks.lab.queue import read
from benchmarks.lab.tables import f, insert, markdown, mean_of, paired, run_rows
from benchmarks.lab.through_train import section

PARTS = ("held_out", "unseen", "general", "math", "code")
PAIRS = (
    ("mov10", "ia3", "many vectors or one"),
    ("mov10", "mov10_uniform", "routing or a uniform mixture"),
    ("molora5", "molora5_uniform", "routing or a uniform mixture"),
    ("mov10_top2", "mov10", "top-2 or soft"),
    ("mov10_top2_raw", "mov10", "top-2 unnormalized or soft"),
    ("mov10_top2_raw", "mov10_top2", "unnormalized or normalized"),
    ("mov10_sentence", "mov10", "sentence or token"),
    ("mov10_released", "mov10", "released code or paper"),
    ("mov10_released_top2", "mov10_released", "released: top-2 or soft"),
    ("molora5_top2", "molora5", "top-2 or soft"),
    ("molora5_top2_raw", "molora5", "top-2 unnormalized or soft"),
    ("molora5_sentence", "molora5", "sentence or token"),
    ("mov30", "mov10", "30 or 10 vectors"),
    ("molora10", "molora5", "10 or 5 experts"),
    ("molora2", "molora5", "2 or 5 experts"),
)


# ------------------------------------------------------------------ cells
def cells_of(results: list[dict]) -> dict[str, dict]:
    """Arm -> its best learning rates, whether they are bracketed, and its rows there."""
    cells = {}
    for name in (name for group in GROUPS for name in group):
        best = best_run(results, name)
        if best is None or not ARMS[name].search:
            continue
        found = grids(results, name)
        key = Run.of(best).key[:4]
        rows = [r for r in results if "valid" in r and _key(r)[:4] == key]
        cells[name] = {
            "rows": {r["seed"]: r for r in rows},
            "lr": best["lr"],
            "router_lr": best["router_lr"] if best["router"] and not uniform(name) else None,
            "bracketed": all(grid[1] for grid in found.values()),
            "trainable": best["trainable"],
            "router": 0 if uniform(name) else best["router"],
            "tried": [[r["lr"], r["router_lr"], r["valid"]["held_out"]]
                      for r in results if r["method"] == name and "valid" in r],
        }  # fmt: skip
    return cells


def _key(row: dict) -> tuple:
    return Run.of(row).key


def mean(cell: dict, *keys: str) -> float | None:
    return mean_of(cell["rows"].values(), *keys)


def matched(cells: dict[str, dict], name: str) -> str | None:
    """The LoRA whose trainable size is nearest, of those that have been run; None for a LoRA."""
    if name.startswith("lora"):
        return None
    found = {n: c["trainable"] for n, c in cells.items() if n.startswith("lora")}
    return min(found, key=lambda n: abs(found[n] - cells[name]["trainable"]), default=None)


def _size(cells: dict[str, dict], name: str, lora: str) -> str:
    ratio = cells[lora]["trainable"] / cells[name]["trainable"]
    words = "equal parameters" if 0.85 <= ratio <= 1.15 else "the nearest LoRA"
    return f"{words}, the LoRA's {ratio:.2f} times as many"


def _lr(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


# ------------------------------------------------------------------ tables
def loss_table(cells: dict[str, dict], base: dict | None) -> str:
    rows = []
    if base:
        rows.append(["untouched", *[None] * 5, *(f(base["valid"][p]) for p in PARTS), None])
    for name, c in cells.items():
        seeds = [f(r["valid"]["held_out"]) for _, r in sorted(c["rows"].items())]
        rows.append([
            name, f"{c['trainable'] / 1e6:.2f}", matched(cells, name),
            _lr(c["lr"]), _lr(c["router_lr"]), "yes" if c["bracketed"] else "NO",
            *(f(mean(c, "valid", part)) for part in PARTS), " / ".join(seeds),
        ])  # fmt: skip
    header = ["method", "trainable M", "matched LoRA", "best LR", "router's LR", "bracketed",
              "**held-out**", "unseen tasks", "general", "math", "code",
              "held-out by seed"]  # fmt: skip
    return markdown(header, rows)


def error(a: dict, b: dict, documents: dict[tuple, dict]) -> float | None:
    """Standard error over documents of the held-out difference, on the seeds that both have."""
    seeds = sorted(a["rows"].keys() & b["rows"].keys())
    sums, labels = [], 0.0
    for seed in seeds:
        own = [documents.get(_key(c["rows"][seed])) for c in (a, b)]
        if None in own:
            return None
        sums.append([x - y for x, y in zip(own[0]["held_out"], own[1]["held_out"], strict=True)])
        labels = sum(own[0]["held_out"]) / a["rows"][seed]["valid"]["held_out"]
    gaps = [statistics.mean(values) for values in zip(*sums, strict=True)]
    return statistics.stdev(gaps) * math.sqrt(len(gaps)) / labels


def comparisons(cells: dict[str, dict], documents: dict[tuple, dict]) -> str:
    """A minus favors the first; each side at its own best learning rates, paired by seed."""
    pairs = [(n, m, _size(cells, n, m)) for n in cells if (m := matched(cells, n))]
    rows = []
    for first, second, what in (*pairs, *PAIRS):
        if first not in cells or second not in cells:
            continue
        a, b = cells[first], cells[second]
        seeds = len(a["rows"].keys() & b["rows"].keys())
        if not seeds:
            continue
        gaps = [paired(a["rows"], b["rows"], "valid", part) for part in PARTS]
        gap = gaps[PARTS.index("held_out")]
        noise = error(a, b, documents)
        verdict = "none: a best is not bracketed"
        if a["bracketed"] and b["bracketed"] and noise is not None:
            verdict = "tie" if abs(gap) < 2 * noise else f"{first if gap < 0 else second} is better"
        shown = [f"{value:+.4f}" for value in gaps]
        rows.append([f"{first} vs {second}", what, seeds, *shown, f(noise), verdict])
    header = ["comparison", "what", "seeds", "**held-out**", "unseen tasks", "general", "math",
              "code", "standard error over documents", "verdict on held-out, 2 errors a tie",
              ]  # fmt: skip
    return markdown(header, rows)


def choice_table(cells: dict[str, dict], base: dict | None) -> str:
    """Accuracy by mean log-probability, the median over templates, mean over seeds."""
    keys = ("average", "sciq", "commonsense_qa", "cosmos_qa", "ag_news", "ag_news balanced",
            "ag_news AUC")  # fmt: skip
    sources = {"untouched": {"rows": {0: base}}} if base else {}
    rows = []
    for name, c in (sources | cells).items():
        values = [mean(c, "choice", "mean", key) for key in keys]
        if values[0] is not None:
            total = mean(c, "choice", "sum", "average")
            rows.append([name, f"{100 * total:.1f}", *(f"{100 * v:.1f}" for v in values)])
    return markdown(["method", "average by sum", *(k.replace("_qa", "") for k in keys)], rows)


def cost_table(cells: dict[str, dict]) -> str:
    rows = []
    for name, c in cells.items():
        best = max(c["rows"].values(), key=lambda r: r["seed"])
        rows.append([
            name, f"{c['router'] / 1e6:.2f}" if c["router"] else None,
            round(mean(c, "tokens_per_s") / 1e3, 1), f(mean(c, "train_s"), 1), best["peak_gib"],
            best["mode"], *(f(mean(c, "routing", k), 3) for k in
                            ("entropy", "load_entropy", "mi_bits")),
            f(best.get("start", {}).get("held_out")),
        ])  # fmt: skip
    header = ["method", "of it router M", "k tokens/s", "train s", "peak GiB", "mode",
              "entropy of the scores / log E", "load entropy, first choice",
              "MI bits with domain", "held-out at the start, if not exact"]  # fmt: skip
    return markdown(header, rows)


def extra_table(results: list[dict]) -> str:
    """Runs at learning rates that were set, not searched: the paper's, and Adafactor's."""
    rows = []
    for name, arm in ARMS.items():
        for schedule, lr in arm.extra:
            own = [r for r in results if r["method"] == name and "valid" in r
                   and (r["schedule"], r["lr"]) == (schedule, lr)]  # fmt: skip
            if name != "untouched":
                rows += [[name.removesuffix("_adafactor"), arm.optimizer, schedule, f"{lr:g}",
                          r["seed"], *(f(r["valid"][part]) for part in PARTS)]
                         for r in own]  # fmt: skip
    return markdown(["method", "optimizer", "schedule", "LR of all", "seed", *PARTS], rows)


def all_runs(results: list[dict]) -> str:
    found = sorted((r for r in results if "valid" in r), key=_key)
    lines = run_rows(found, ("method", "schedule", "lr", "router_lr", "seed"), PARTS)
    rows = [[*line, f(mean_of([r], "choice", "mean", "average"), 3)]
            for r, line in zip(found, lines, strict=True)]  # fmt: skip
    header = ["method", "schedule", "LR", "router's LR", "seed", *PARTS, "choice average"]
    return markdown(header, rows)


def table(args) -> None:
    results = read(args.results)
    documents = {_key(r): r for r in read(args.results.with_suffix(".documents"))}
    base = next((r for r in results if r["method"] == "untouched"), None)
    cells = cells_of(results)
    failed = {r["method"] for r in results if "failed" in r}
    one = next(r for r in results if "machine" in r)
    note = f"{len(results)} runs; {one['machine']}, torch {one['torch']}."
    if failed:
        note += f" Failed: {', '.join(sorted(failed))}."
    text = "\n\n".join([
        note,
        "## At each method's best learning rates", loss_table(cells, base),
        "## Comparisons", comparisons(cells, documents),
        "## Choice tasks: %, by mean log-probability, median over templates",
        choice_table(cells, base),
        "## Cost and routing", cost_table(cells),
        "## At set learning rates", extra_table(results),
        "## Every run", all_runs(results),
    ])  # fmt: skip
    insert(args.page, text)
    section(args.page)
    out = {n: {k: v for k, v in c.items() if k != "rows"}
           | {"valid": {p: mean(c, "valid", p) for p in PARTS}, "seeds": sorted(c["rows"])}
           for n, c in cells.items()}  # fmt: skip
    args.page.with_name("cells.json").write_text(json.dumps(out, indent=1) + "\n")
    print(args.page.read_text())
