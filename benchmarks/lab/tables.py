"""Pages: Markdown tables between two markers, made from results; and the numbers in them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

MARKS = {
    "tables": ("<!-- tables: written by the script -->", "<!-- end of tables -->"),
    "through": ("<!-- through sc.train: written by the script -->", "<!-- end of it -->"),
}


# ------------------------------------------------------------------ cells
def f(value: float | None, digits: int = 4) -> str | None:
    """A number with so many digits; None stays."""
    return None if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.0f} %"


def dig(row, *keys: str):
    """row[key][key]..., None where one is missing."""
    for key in keys:
        row = row.get(key) if isinstance(row, dict) else None
    return row


def mean(values: Iterable[float | None]) -> float | None:
    """The mean; None where there is no value, or one is None."""
    values = list(values)
    return None if not values or None in values else statistics.mean(values)


def mean_of(rows: Iterable[dict], *keys: str) -> float | None:
    """The mean of row[key][key]... over the rows that have it."""
    return mean(value for row in rows if (value := dig(row, *keys)) is not None)


def paired(a: Mapping[int, dict], b: Mapping[int, dict], *keys: str) -> float:
    """Mean difference of row[key][key]... over the seeds that both have: a seed fixes the data
    order. `a`, `b`: seed -> row."""
    seeds = a.keys() & b.keys()
    return statistics.mean(dig(a[s], *keys) - dig(b[s], *keys) for s in seeds)


def run_rows(rows: Iterable[dict], names: Iterable[str], parts: Iterable[str]) -> list[list]:
    """A line a run: what it was (`names`, rates short), and its loss on every part."""
    names, parts = list(names), list(parts)
    short = [name for name in names if name.endswith("lr")]
    return [
        [*(f"{r[n]:g}" if n in short else r[n] for n in names), *(f(r["valid"][p]) for p in parts)]
        for r in rows
    ]


# ------------------------------------------------------------------ pages
def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table; None becomes a dash."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join("-" if c is None else str(c) for c in r) + " |" for r in lines
    )


def insert(page: Path, text: str, what: str = "tables") -> None:
    """Put `text` between the markers of `page`, which are appended where there are none; the
    reading around them stays."""
    begin, end = MARKS[what]
    old = page.read_text() if page.exists() else f"# {page.stem}\n"
    if begin not in old:
        old = f"{old.rstrip()}\n\n{begin}\n{end}\n"
    head, _, rest = old.partition(begin)
    tail = rest.partition(end)[2]
    page.write_text(f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}")


def measure_and_write(args, measure: Callable, tables: Callable[[dict], str]) -> None:
    """Measure into `args.out`, unless `args.table`; put the tables into the page beside it."""
    if not args.table:
        args.out.write_text(json.dumps(measure(args), indent=1) + "\n")
    page = args.out.with_suffix(".md")
    insert(page, tables(json.loads(args.out.read_text())))
    print(page.read_text())
