"""What the experts of every routed recipe do after a short training on three domains: the figures
of `analyze` as a table, and one picture of each for the recipe's page.

    python -m benchmarks.parts data --data DATA --work .parts       # rows for a bare machine
    python -m benchmarks.reports run --work .parts --gpus 0 0 1 1   # processes on GPUs
    python -m benchmarks.reports table

A recipe of several models starts from three dense models, each trained on one of the domains.
`--tiny` runs a tiny random model on a CPU, to try the program.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.lab.queue import Rows, read
from benchmarks.lab.tables import f, insert, markdown
from benchmarks.parts.run import DOMAINS
from benchmarks.reports import run as runs

HERE = Path(__file__).parent
PICTURES = HERE.parent.parent / "docs" / "methods" / "pictures"


def run(args) -> None:
    """The recipes asked for, dense models of domains first, in one process for each GPU given."""
    args.sources.mkdir(parents=True, exist_ok=True)
    if any(name in runs.JOINED for name in args.recipes):
        runs.shared_out(args, runs.train_domain, list(DOMAINS))
    found = Rows(args.results)
    for row in runs.shared_out(args, runs.one, args.recipes):
        found.put(row)
    table(args)


# ------------------------------------------------------------------ page
def table(args) -> None:
    page = args.results.with_name("README.md")
    newest = {row["recipe"]: row for row in read(args.results)}
    insert(page, tables([newest[name] for name in runs.RECIPES if name in newest]))
    print(page.read_text())


def tables(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        layers = list(row["layers"].values())
        known = [layer for layer in layers if layer["bits"] is not None]
        lines.append(
            [
                row["recipe"],
                max(layer["experts"] for layer in layers),
                *(f(mean_of(layers, key), digits) for key, digits in (("load_entropy", 3),)),
                sum(layer["dead"] for layer in layers),
                f(mean_of(layers, "H_s"), 2),
                f(mean_of(layers, "H_u"), 2),
                f(mean_of(known, "bits"), 3),
                f(mean_of(known, "chance"), 3),
                f(mean_of(known, "twin"), 3),
                f"{sum(layer['p'] <= 0.05 for layer in known)} of {len(layers)}",
                f(row["dropped"], 3),
            ]
        )
    header = ["recipe", "experts", "load entropy", "dead", "H_s", "H_u", "I(expert; domain)"]
    header += ["chance", "random routers", "layers beyond chance", "most lost without an expert"]
    machines = sorted({f"{row['machine']}, torch {row['torch']}" for row in rows})
    return f"{'; '.join(machines)}.\n\n{markdown(header, lines)}"


def mean_of(layers: list[dict], key: str) -> float | None:
    values = [layer[key] for layer in layers if layer.get(key) is not None]
    return statistics.mean(values) if values else None


VERBS = {"run": run, "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("--work", type=Path, default=Path(".parts"), help="the unpacked rows")
    parser.add_argument("--sources", type=Path, default=Path(".parts/dense"))
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    parser.add_argument("--reports", type=Path, help="write the whole page of each recipe here")
    parser.add_argument("--recipes", nargs="+", choices=runs.RECIPES, default=[*runs.RECIPES])
    parser.add_argument("--gpus", type=int, nargs="*", default=(), help="one process for each")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, to try it")
    args = parser.parse_args()
    VERBS[args.verb](args)


if __name__ == "__main__":
    main()
