"""The page of this study: tables from its results."""

from __future__ import annotations

import json
import statistics

from benchmarks.lab.queue import read
from benchmarks.lab.tables import f, insert, markdown, mean_of, paired, run_rows
from benchmarks.lab.through_train import section
from benchmarks.pesc.arms import GROUPS, SCHEDULES, best_lr, cell_rows

PARTS = ("math", "code", "general", "gsm8k")
TIE = 0.005


def summary(results: list[dict]) -> list[dict]:
    """One row per cell: its best learning rate, the mean over seeds there, and the rest."""
    cells = []
    for schedule in SCHEDULES:
        for method in (m for group in GROUPS for m in group):
            best, inside = best_lr(results, method, schedule)
            if best is None:
                cells.append({"method": method, "schedule": schedule, "best": None})
                continue
            seeds = [
                r
                for r in results
                if (r["method"], r["schedule"], r["lr"]) == (method, schedule, best)
            ]
            mean = {k: statistics.mean(r["valid"][k] for r in seeds) for k in seeds[0]["valid"]}
            cells.append(
                {
                    "method": method,
                    "schedule": schedule,
                    "best": best,
                    "bracketed": inside,
                    "tried": list(cell_rows(results, method, schedule)),
                    "mc_by_seed": [r["mc"] for r in sorted(seeds, key=lambda r: r["seed"])],
                    "mc": statistics.mean(r["mc"] for r in seeds),
                    "valid": mean,
                    "rows": seeds,
                }
            )
    return cells


def loss_table(cells: list[dict]) -> str:
    rows = []
    for c in cells:
        if c["best"] is None:
            rows.append([c["method"], c["schedule"], "not run", *[None] * 8])
            continue
        valid = c["valid"]
        rows.append(
            [
                c["method"],
                c["schedule"],
                f"{c['best']:g}",
                "yes" if c["bracketed"] else "NO",
                f"**{c['mc']:.4f}**",
                " / ".join(f"{v:.4f}" for v in c["mc_by_seed"]),
                *(f(valid[k]) for k in PARTS),
                f(mean_of(c["rows"], "train_loss_tail")),
            ]
        )
    header = [
        "method",
        "schedule",
        "best LR",
        "bracketed",
        "M+C",
        "M+C by seed",
        "math",
        "code",
        "general",
        "gsm8k test",
        "train, last 5 %",
    ]
    return markdown(header, rows)


def cost_table(cells: list[dict]) -> str:
    rows = []
    for c in cells:
        if c["best"] is None:
            continue
        r = c["rows"]
        before = mean_of(r, "mi_bits_before")
        rows.append(
            [
                c["method"],
                c["schedule"],
                f"{r[0]['trainable'] / 1e6:.2f}",
                f"{r[0]['active'] / 1e6:.1f}",
                round(mean_of(r, "tokens_per_s") / 1e3, 1),
                f(mean_of(r, "train_s"), 1),
                r[0]["peak_gib"],
                f(mean_of(r, "routing", "entropy_mean"), 3),
                f(mean_of(r, "routing", "entropy_min"), 3),
                None
                if before is None
                else f"{before:.3f} -> {mean_of(r, 'routing', 'mi_bits'):.3f}",
            ]
        )
    header = [
        "method",
        "schedule",
        "trainable M",
        "active M",
        "k tokens/s",
        "train s",
        "peak GiB",
        "load entropy mean",
        "worst layer",
        "MI bits, random router -> trained",
    ]
    return markdown(header, rows)


def choice_table(cells: list[dict], base: dict | None) -> str:
    """Scores of the second seed's model at the best learning rate, by sum / by mean."""
    sources = [("untouched", None, base)] if base else []
    for c in cells:
        if c["best"] is not None:
            sources += [(c["method"], c["schedule"], r) for r in c["rows"] if "choice" in r]
    rows, tasks = [], ()
    for method, schedule, row in sources:
        tasks = tuple(row["choice"]["sum"])
        rows.append(
            [
                method,
                schedule,
                *(
                    f"{100 * row['choice']['sum'][t]:.1f} / {100 * row['choice']['mean'][t]:.1f}"
                    for t in tasks
                ),
            ]
        )
    return markdown(["method", "schedule", *tasks], rows)


def all_runs(results: list[dict]) -> str:
    names = ("method", "schedule", "lr", "seed")
    found = [r for r in results if r["method"] != "untouched"]
    found.sort(key=lambda r: (r["method"], r["schedule"], r["seed"], r["lr"]))
    rows = [
        [*line[:4], f(r["mc"]), *line[4:]]
        for r, line in zip(found, run_rows(found, names, PARTS), strict=True)
    ]
    header = ["method", "schedule", "LR", "seed", "M+C", "math", "code", "general", "gsm8k test"]
    return markdown(header, rows)


def comparisons(cells: list[dict]) -> str:
    """Differences of M+C at each side's own best learning rate; a minus favors the first."""
    pairs = (
        ("camelidae8", "adapter512", "equal parameters"),
        ("camelidae8", "adapter128", "equal active width"),
        ("camelidae8", "camel", "without adapters"),
        ("camelidae8", "camelidae8_nobalance", "balance loss"),
        ("camelidae4", "camelidae4_nobalance", "balance loss"),
        ("camelidae16", "camelidae16_nobalance", "balance loss"),
        ("camelidae16", "camelidae8", "16 or 8 experts"),
        ("camelidae4", "camelidae8", "4 or 8 experts"),
        ("upcycling4", "full", "upcycling or dense"),
    )
    by = {(c["method"], c["schedule"]): c for c in cells if c["best"] is not None}
    rows = []
    for first, second, what in pairs:
        for schedule in SCHEDULES:
            a, b = by.get((first, schedule)), by.get((second, schedule))
            if not (a and b):
                continue
            one, two = ({row["seed"]: row for row in cell["rows"]} for cell in (a, b))
            gap, seeds = paired(one, two, "mc"), len(one.keys() & two.keys())
            verdict = "tie" if abs(gap) < TIE else (first if gap < 0 else second) + " is better"
            if not (a["bracketed"] and b["bracketed"]):
                verdict = "none: a best is not bracketed"
            elif seeds < 2:
                verdict += ", one seed"
            gaps = [paired(one, two, "valid", part) for part in PARTS]
            cells_of = [f"{value:+.4f}" for value in (gap, *gaps)]
            rows.append([f"{first} vs {second}", what, schedule, *cells_of, verdict])
    header = [
        "comparison",
        "what",
        "schedule",
        "M+C",
        "math",
        "code",
        "general",
        "gsm8k test",
        f"verdict on M+C, {TIE} a tie",
    ]
    return markdown(header, rows)


def table(args) -> None:
    results = read(args.results)
    base = next((r for r in results if r["method"] == "untouched"), None)
    cells = summary(results)
    one = next(r for r in results if "machine" in r)
    note = f"{len(results)} runs; {one['machine']}, torch {one['torch']}."
    if base:
        note += " Untouched model: " + ", ".join(f"{k} {v:.4f}" for k, v in base["valid"].items())
    text = "\n\n".join(
        [
            note,
            "## At each method's best learning rate",
            loss_table(cells),
            "## Comparisons",
            comparisons(cells),
            "## Cost and routing",
            cost_table(cells),
            "## Choice tasks: accuracy in %, by summed / by mean log-probability",
            choice_table(cells, base),
            "## Every run",
            all_runs(results),
        ]
    )
    insert(args.page, text)
    section(args.page)
    out = [{k: v for k, v in c.items() if k != "rows"} for c in cells]
    args.page.with_name("cells.json").write_text(json.dumps(out, indent=1) + "\n")
    print(args.page.read_text())
