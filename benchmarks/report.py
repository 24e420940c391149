"""Results files, one JSON object a line; and tables for the pages in this folder: Markdown between
two markers, made from the JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

BEGIN, END = "<!-- tables: written by the script -->", "<!-- end of tables -->"


class Rows:
    """The results file, and a copy of it where results are fetched from."""

    def __init__(self, path: Path, copy: Path | None):
        self.path, self.copy = path, copy
        path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[dict]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines]

    def put(self, row: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if self.copy:
            shutil.copy(self.path, self.copy)


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table; None becomes a dash."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join("-" if c is None else str(c) for c in r) + " |" for r in lines
    )


def insert(page: Path, tables: str) -> None:
    """Put `tables` between the markers of `page`; the reading around them stays."""
    text = page.read_text() if page.exists() else f"# {page.stem}\n\n{BEGIN}\n{END}\n"
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    page.write_text(f"{head}{BEGIN}\n\n{tables.strip()}\n\n{END}{tail}")


def measure_and_write(args, measure: Callable, tables: Callable[[dict], str]) -> None:
    """Measure into `args.out`, unless `args.table`; put the tables into the page beside it."""
    if not args.table:
        args.out.write_text(json.dumps(measure(args), indent=1) + "\n")
    page = args.out.with_suffix(".md")
    insert(page, tables(json.loads(args.out.read_text())))
    print(page.read_text())
