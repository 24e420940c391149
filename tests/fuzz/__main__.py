"""`python -m tests.fuzz`: many edited folders, and a table of what came of them.

Ends with 1 if one of them made another library's error, ran code, wrote outside of the scratch
folder, took more than 30 seconds or 2 GB, ended the process, or gave other logits from a folder of
ours. `--from N --count 1` repeats case N.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

ENDS = ("read", "refused", "foreign", "slow", "died")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    from tests.fuzz import folders

    with tempfile.TemporaryDirectory() as root:
        folders.make(Path(root) / "made")
        wanted = {i: _as_made(Path(root), i) for i in range(len(folders.KINDS))}
        numbers = range(options.first, options.first + options.count)
        jobs = [(root, number, wanted[number % len(folders.KINDS)]) for number in numbers]
        found = []
        with get_context("fork").Pool(options.processes) as pool:
            for case in pool.imap_unordered(_case, jobs, chunksize=8):
                found.append(case)
                for fault in case[3]:
                    print(f"case {case[0]}, {case[1]}: {fault}", flush=True)
    return report(found)


def _as_made(root: Path, kind: int) -> str | None:
    """A digest of the logits of a folder that nothing has edited."""
    from tests.fuzz import folders
    from tests.fuzz.child import watch

    made = folders.KINDS[kind]
    scratch = root / "work" / f"as-made-{kind}"
    shutil.copytree(root / "made" / made.name, scratch / "folder")
    seen = watch(made.read, scratch / "folder", scratch, limit=120)
    if seen.end != "read":
        raise SystemExit(f"{made.name} is not read as it was made: {seen.said}")
    return seen.logits


def _case(job: tuple[str, int, str | None]) -> tuple:
    from tests.fuzz import folders
    from tests.fuzz.child import watch
    from tests.fuzz.mutations import mutate

    root, number, wanted = job
    kind = folders.KINDS[number % len(folders.KINDS)]
    scratch = Path(root) / "work" / f"{number}" / "x"
    shutil.copytree(Path(root) / "made" / kind.name, scratch)
    said = mutate(scratch, random.Random(number), signed=kind.signed)
    seen = watch(kind.read, scratch, scratch)
    shutil.rmtree(scratch.parent, ignore_errors=True)
    faults = faults_of(seen, kind.own, wanted)
    return number, f"{kind.name} ({said})", f"{kind.name}, {title(kind)}", faults, *_cost(seen)


def _cost(seen) -> tuple[str, float, int]:
    return seen.end, seen.seconds, seen.memory


def title(kind) -> str:
    word = kind.read.__name__.replace("_", " ")
    return f"{word}, signed anew" if kind.signed else word


def faults_of(seen, own: bool, wanted: str | None) -> list[str]:
    """What must not happen and did."""
    from tests.fuzz.child import MEMORY

    faults = [f"{seen.end}: {seen.said}"] if seen.end in ("foreign", "slow", "died") else []
    faults += [f"code ran: {what}" for what in seen.ran]
    faults += [f"wrote {path}" for path in seen.wrote]
    if seen.memory > MEMORY:
        faults.append(f"took {seen.memory / 2**30:.1f} GB")
    if own and seen.end == "read" and seen.logits != wanted:
        faults.append("other logits from a folder of ours")
    return faults


def report(found: list[tuple]) -> int:
    """Print the table; 1 if something must not be there."""
    kinds: dict[str, Counter] = {}
    worst: dict[str, tuple[float, int]] = {}
    for _, _, kind, faults, end, seconds, memory in found:
        kinds.setdefault(kind, Counter()).update({end: 1, "faults": len(faults)})
        longest, largest = worst.get(kind, (0.0, 0))
        worst[kind] = max(longest, seconds), max(largest, memory)
    print("\n| what is read | " + " | ".join((*ENDS, "faults", "longest", "memory")) + " |")
    print("|---|" + "---|" * (len(ENDS) + 3))
    for kind, counts in sorted(kinds.items()):
        cells = [str(counts[word]) for word in (*ENDS, "faults")]
        longest, largest = worst[kind]
        print(f"| {kind} | {' | '.join(cells)} | {longest:.1f} s | {largest / 2**20:.0f} MB |")
    faults = sum(counts["faults"] for counts in kinds.values())
    print(f"\n{len(found)} edited folders, {faults} faults.")
    return 1 if faults or not found else 0


if __name__ == "__main__":
    sys.exit(main())
