"""`make families`: every family of the zoo by every kind of method, written to docs/families.md.

Each cell is examined as `tests/cases/examine.py` says. The command fails where anything is WRONG.

    python docs/families.py [--processes N] [--only NAME ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

HEAD = """\
# Families

Which models each kind of method works on. A cell is one conversion of a tiny random model of the
family, in float32 on the CPU:

- **exact**: the converted model gives the dense model's outputs, for inputs that reach all of it
  (text, images, sound). Every layer's experts, moved, move the outputs; saved and loaded again the
  model is the same in every bit; reverted it is the dense one in every bit.
- **part**: all that, and some modules of the nature that the recipe asks for are left out. The
  number says which; `convert` says the same (`Report.left_out`).
- **no**: refused before anything was changed; the number says why.

`bam` stands here with its one chosen network unscaled: as published it does not start as the dense
model. All recipes at copies of networks go where `upcycling` and `btx` go, all of LoRAs at Linears
where `molora` goes, all split networks where `gmoefication` goes.
"""


def examined(family: str) -> dict[str, tuple[str, str, dict[str, list[str]]]]:
    """Recipe -> verdict, reason, what is left out; of one family, in a process of its own."""
    import torch
    import transformers

    from tests.cases.examine import ZOO_RECIPES, examine, in_general
    from tests.cases.zoo import ZOO

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = {}
    for recipe in ZOO_RECIPES:
        cell = examine(family, recipe)
        reason = in_general(cell.reason, ZOO[family].model)
        found[recipe] = (cell.verdict, reason, cell.left_out)
    return found


class Notes:
    """Numbered reasons, each once."""

    def __init__(self):
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers) + 1)

    def lines(self) -> Iterator[str]:
        for text, number in self.numbers.items():
            yield f"{number}. {text}"


def table(results: dict[str, dict], notes: Notes) -> Iterator[str]:
    """The families under their headings, a row each."""
    from tests.cases.examine import ZOO_RECIPES
    from tests.cases.zoo import ZOO

    for group in dict.fromkeys(ZOO[name].group for name in results):
        yield f"\n## {group}\n"
        yield f"| family | class | {' | '.join(ZOO_RECIPES)} |"
        yield f"| {' | '.join(['---'] * (len(ZOO_RECIPES) + 2))} |"
        for name, cells in results.items():
            if ZOO[name].group == group:
                row = " | ".join(_cell(*cells[recipe], notes) for recipe in ZOO_RECIPES)
                yield f"| {name} | `{ZOO[name].model}` | {row} |"


def _cell(verdict: str, reason: str, left_out: dict[str, list[str]], notes: Notes) -> str:
    if verdict == "exact":
        return "exact"
    if verdict == "part":
        said = "; ".join(f"{why}: {', '.join(paths)}" for why, paths in left_out.items())
        return f"part {notes.number(f'Left out: {said}.')}"
    return f"{'no' if verdict == 'refused' else verdict} {notes.number(reason)}"


def certificate(options: argparse.Namespace, seconds: float, count: int) -> str:
    """By what and when the page was made."""
    import torch
    import transformers

    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    only = f"python docs/families.py --only {' '.join(options.only)}"
    command = only if options.only else "make families"
    return (
        f"Made by `{command}` at commit {commit or 'unknown'} in {seconds / 60:.0f} minutes: "
        f"{count} cells, {options.processes} processes of one thread, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {platform.system()} {platform.machine()}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", default=[], help="names of families")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "families.md")
    options = parser.parse_args()
    from tests.cases.zoo import ZOO

    names = [name for name in ZOO if not options.only or name in options.only]
    start = time.perf_counter()
    with get_context("spawn").Pool(options.processes, maxtasksperchild=8) as pool:
        results = {}
        for name, cells in zip(names, pool.imap(examined, names), strict=True):
            results[name] = cells
            print(f"{name}: {', '.join(verdict for verdict, _, _ in cells.values())}", flush=True)
    cells = [(n, r, cell) for n, row in results.items() for r, cell in row.items()]
    notes = Notes()
    rows = list(table(results, notes))
    said = certificate(options, time.perf_counter() - start, len(cells))
    counts = [sum(c[0] == verdict for _, _, c in cells) for verdict in ("exact", "part", "refused")]
    summary = "{} exact, {} in part, {} refused, of {}".format(*counts, len(cells))
    parts = [HEAD, f"{summary}. {said}", *rows, "\n## Notes\n", *notes.lines()]
    options.out.write_text("\n".join(parts) + "\n")
    wrong = [f"{n} by {r}: {cell[1]}" for n, r, cell in cells if cell[0] == "WRONG"]
    print(f"{options.out}: {summary}", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
