"""Plant faults and see which the tests notice; see the package's docstring."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import chain
from pathlib import Path

from benchmarks.mutation.named import named
from benchmarks.mutation.operators import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path("src/sparsecraft")
# Files and folders below it whose code is changed.
WHERE = (
    "moe/losses.py", "moe/routing.py", "moe/routers", "moe/experts", "data", "checkpoint",
)  # fmt: skip
# The first pass takes the narrowest tests of each mutant, the second all others of what lives on.
TESTS_FIRST = 120
SECONDS_FIRST, SECONDS_SECOND = 600, 900
NOTICED = ("killed", "timeout")
SOUND = Mutant("errors.py", 1, 0, "", "")  # no fault at all
COVERAGE = Path(".coverage.mutation")
# A recipe is made when a table of tests is read, outside of any test.
READ_FIRST = {"recipes/": ["tests/recipes/test_published.py"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("cover", "run"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--count", type=int, default=200, help="mutants made from syntax trees")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--marks", default="not gpu and not slow", help="pytest's -m")
    parser.add_argument("--tests", nargs="*", default=[], help="what `cover` runs: by default all")
    parser.add_argument("--only", choices=("all", "named", "made"), default="all")
    parser.add_argument("--again", type=Path, help="only what lived in this earlier --out")
    parser.add_argument("--coverage", type=Path, default=ROOT / COVERAGE)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("mutants.json"))
    asked = parser.parse_args()
    cover(asked) if asked.what == "cover" else run(asked)


def cover(asked: argparse.Namespace) -> None:
    """The suite once, noting for each line the tests that run it."""
    command = [sys.executable, "-m", "pytest", "-n", str(asked.jobs), "-p", "no:cacheprovider"]
    command += ["-m", asked.marks, f"--cov={SOURCE}", "--cov-context=test", "--cov-report="]
    command += asked.tests
    subprocess.run(command, cwd=ROOT, env=os.environ | {"COVERAGE_FILE": str(asked.coverage)})


def run(asked: argparse.Namespace) -> None:
    """Each mutant in a process of its own, on a copy of the sources."""
    chosen = _lived(asked.again) if asked.again else _chosen(asked)
    covering = _covering(asked.coverage, chosen)
    for heavy in ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "pytest"):
        importlib.import_module(heavy)  # once, for all processes
    start = time.perf_counter()
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(asked.jobs, fork) as pool:
        known = sorted({test for tests in covering.values() for test in tests})
        there = pool.submit(_in_a_child, SOUND, ["--collect-only", *known], SECONDS_SECOND).result()
        if there["end"] != "survived":  # pytest's refusal would count as notice
            raise SystemExit(f"Run `cover` again, these tests are not there: {there.get('by')}")
        results = _both_passes(pool, covering)
        _mark_unsound(pool, covering, results.values())
    rows = [_row(m) | results[m] for m in chosen]
    counts = Counter(row["end"] for row in rows)
    seconds = time.perf_counter() - start
    killed = sum(counts[end] for end in NOTICED)
    print(f"{killed} of {len(rows)} mutants killed ({killed / len(rows):.1%}), {seconds:.0f} s")
    for row in rows:
        if row["end"] not in NOTICED:
            print(f"  {row['end']}: {row['file']}:{row['line']} {row['fault']}")
    report = {"seed": asked.seed, "counts": counts, "seconds": round(seconds), "mutants": rows}
    asked.out.write_text(json.dumps(report, indent=1) + "\n")


def _both_passes(
    pool: ProcessPoolExecutor, covering: dict[Mutant, list[str]]
) -> dict[Mutant, dict]:
    first = {m: tests[:TESTS_FIRST] for m, tests in covering.items()}
    results = _one_pass(pool, 1, first, SECONDS_FIRST)
    lives = {m for m, result in results.items() if result["end"] == "survived"}
    others = {m: tests[TESTS_FIRST:] for m, tests in covering.items() if m in lives}
    second = _one_pass(pool, 2, {m: t for m, t in others.items() if t}, SECONDS_SECOND)
    for result in second.values():
        if result["end"] == "timeout":  # of many tests, not of a loop without end
            result["end"] = "unfinished"
    return results | second


def _one_pass(
    pool: ProcessPoolExecutor, number: int, tests: dict[Mutant, list[str]], limit: float
) -> dict[Mutant, dict]:
    ends = pool.map(_in_a_child, tests, tests.values(), [limit] * len(tests))
    found = {}
    for mutant, end in zip(tests, ends, strict=True):
        found[mutant] = end | {"pass": number}
        print(f"{end['end']}: {mutant.file}:{mutant.line} {mutant} {end.get('by')}", flush=True)
    return found


def _mark_unsound(
    pool: ProcessPoolExecutor, covering: dict[Mutant, list[str]], results: Iterable[dict]
) -> None:
    """A fault counts as noticed by no test that fails without any fault too."""
    known = {test for tests in covering.values() for test in tests}
    by = [(result, row.partition(" ")[2]) for result in results for row in result.get("by", ())]
    killers = sorted({test for test in known for _, row in by if row.startswith(test)})
    ends = pool.map(_in_a_child, [SOUND] * len(killers), [[test] for test in killers])
    wrong = [t for t, found in zip(killers, ends, strict=True) if found["end"] != "survived"]
    for result, row in by:
        if result["end"] == "killed" and row.startswith(tuple(wrong)):
            result["end"] = "unsound"


def _chosen(asked: argparse.Namespace) -> list[Mutant]:
    chosen = [] if asked.only == "made" else named(ROOT / SOURCE)
    return chosen if asked.only == "named" else chosen + _drawn(asked.count, asked.seed)


def _row(mutant: Mutant) -> dict:
    """What a report says of a mutant, and `_lived` finds it by."""
    text, at = _place(mutant)
    about = {"file": mutant.file, "line": mutant.line, "fault": str(mutant)}
    return about | {"text": text, "at": at, "named": bool(mutant.about)}


def _place(mutant: Mutant) -> tuple[str, int]:
    """The line of a mutant without its indent, and where in it the change is."""
    before, after = (source := _source(mutant.file))[: mutant.start], source[mutant.start :]
    left, right = before.rpartition("\n")[2], after.partition("\n")[0]
    return (left + right).strip(), len(left.lstrip())


@cache
def _source(file: str) -> str:
    return (ROOT / SOURCE / file).read_text()


def _lived(report: Path) -> list[Mutant]:
    """The mutants that lived in an earlier report, where the source still has their line."""
    rows = [row for row in json.loads(report.read_text())["mutants"] if row["end"] not in NOTICED]
    made = (mutants(ROOT / SOURCE, file) for file in _files() & {row["file"] for row in rows})
    there = defaultdict(list)
    for mutant in chain(named(ROOT / SOURCE), *made):
        there[_key(_row(mutant))].append(mutant)
    near = [sorted(there[_key(row)], key=lambda m: abs(m.line - row["line"]))[:1] for row in rows]
    found = list(dict.fromkeys(chain(*near)))
    print(f"{len(found)} of {len(rows)} mutants that lived are still there")
    return found


def _key(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("file", "fault", "text", "at"))


def _files() -> set[str]:
    """All whose code is changed."""
    root = ROOT / SOURCE
    return {
        str(path.relative_to(root))
        for place in WHERE
        for path in ([root / place] if place.endswith(".py") else (root / place).rglob("*.py"))
        if path.name != "corpus.py"  # the words of the demonstration's data
    }


def _drawn(count: int, seed: int) -> list[Mutant]:
    """As many mutants, of every file its share."""
    found = {file: mutants(ROOT / SOURCE, file) for file in sorted(_files())}
    total = sum(map(len, found.values()))
    generator = random.Random(seed)
    drawn = []
    for all_of_file in found.values():
        share = round(count * len(all_of_file) / total)
        drawn += generator.sample(all_of_file, min(len(all_of_file), max(1, share)))
    generator.shuffle(drawn)
    return drawn[:count]


def _covering(coverage: Path, chosen: list[Mutant]) -> dict[Mutant, list[str]]:
    """The tests that run each mutant's line, those of the fewest lines first: they are about it."""
    connection = sqlite3.connect(coverage)
    from coverage.numbits import numbits_to_nums

    lines: dict[tuple[str, int], set[str]] = defaultdict(set)
    breadth: Counter[str] = Counter()
    wanted = {m.file for m in chosen}
    query = (
        "select file.path, context.context, line_bits.numbits from line_bits "
        "join file on file.id = line_bits.file_id join context on context.id = line_bits.context_id"
    )
    for path, context, bits in connection.execute(query):
        test = context.rpartition("|")[0]  # an id may hold a bar
        numbers = numbits_to_nums(bits)
        breadth[test] += len(numbers)
        file = path.partition(f"{SOURCE}/")[2]
        if test and file in wanted:
            for number in numbers:
                lines[file, number].add(test)
    return {
        m: _first(m) + sorted(_near(lines, m), key=lambda test: (breadth[test], test))
        for m in chosen
    }


def _first(mutant: Mutant) -> list[str]:
    return [test for place, tests in READ_FIRST.items() if mutant.file.startswith(place)
            for test in tests]  # fmt: skip


def _near(lines: dict[tuple[str, int], set[str]], mutant: Mutant) -> set[str]:
    """Tests of the mutant's own line or, where a statement spans several, of one just above it; of
    the whole file for what runs when it is imported, by whichever test came first."""
    if _in_a_function(mutant):
        for line in range(mutant.line, max(0, mutant.line - 8), -1):
            if lines[mutant.file, line]:
                return lines[mutant.file, line]
    return set().union(*(tests for (file, _), tests in lines.items() if file == mutant.file))


def _in_a_function(mutant: Mutant) -> bool:
    return any(
        node.body[0].lineno <= mutant.line <= node.end_lineno
        for node in ast.walk(ast.parse(_source(mutant.file)))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )


def _in_a_child(mutant: Mutant, tests: list[str], limit: float = SECONDS_FIRST) -> dict:
    if not tests:
        return {"end": "not covered", "seconds": 0}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            os._exit(_tested(mutant, tests, Path(folder)))
        end = _waited(child, limit)
        output = (Path(folder) / "output").read_text(errors="replace")
    failed = [row for row in output.splitlines() if row.startswith(("FAILED", "ERROR"))]
    seconds = round(time.perf_counter() - start, 1)
    by = failed[:1] or output.splitlines()[-1:]
    return {"end": end, "seconds": seconds, "tests": len(tests), "by": by}


def _waited(child: int, limit: float) -> str:
    until = time.monotonic() + limit
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {0: "survived", 5: "not covered"}.get(code, "killed")
        time.sleep(0.2)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "timeout"


def _tested(mutant: Mutant, tests: list[str], folder: Path) -> int:
    """The exit status of pytest on a copy of the sources with the fault."""
    output = os.open(folder / "output", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / SOURCE / mutant.file
    path.write_text(mutant.text(path.read_text()))
    sys.path.insert(0, str(folder / "src"))
    os.environ["PYTHONPATH"] = f"{folder / 'src'}:{os.environ.get('PYTHONPATH', '')}"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.chdir(ROOT)
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([*options, "--basetemp", str(folder / "tmp"), *tests]))


if __name__ == "__main__":
    main()
