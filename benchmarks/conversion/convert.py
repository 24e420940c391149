"""Whole-process time and peak memory of `sparsecraft convert` and of the help texts.

Command: python -m benchmarks.conversion.convert [--runs 3]
Peers, measured on a similar machine before this project began (two CPU cores, fp32, four copies
of SmolLM2's FFN): MixtureKit 15.9 s, mergekit-moe 20.9 to 24.6 s and 2.19 GB; neither certifies
nor reads back.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
COMMAND = "python -m benchmarks.conversion.convert"
CONVERT = ["convert", "upcycling", "--model", "smollm2", "--num-experts", "4", "--dtype", "float32"]
COMMANDS = {
    "convert upcycling, 4 experts": [*CONVERT, "--out", "{out}"],
    "--help": ["--help"],
    "convert --help": ["convert", "--help"],
    "convert camelidae --help": ["convert", "camelidae", "--help"],
}


def measure(arguments: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident gigabytes of one process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sparsecraft"]
        command += [a.format(out=f"{folder}/out") for a in arguments]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        assert status == 0, command
    return seconds, usage.ru_maxrss * 1024 / 1e9  # kilobytes on Linux


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    results = {}
    for name, arguments in COMMANDS.items():
        found = [measure(arguments) for _ in range(runs)]
        seconds = [s for s, _ in found]
        results[name] = {
            "seconds_median": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "peak_gb": max(gb for _, gb in found),
        }
    machine = (
        f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}"
    )
    record = {
        "command": "python -m benchmarks.conversion.convert",
        "machine": machine,
        "runs": runs,
    }
    (HERE / "convert.json").write_text(json.dumps({**record, "results": results}, indent=2) + "\n")
    lines = ["| command | median s | min..max s | peak GB |", "|---|---|---|---|"]
    lines += [
        f"| `{name}` | {r['seconds_median']:.2f} | {r['seconds_min']:.2f}..{r['seconds_max']:.2f} "
        f"| {r['peak_gb']:.2f} |"
        for name, r in results.items()
    ]
    page = (
        "# Conversion: time and memory of the whole process\n\n"
        f"Command: `{COMMAND} --runs {runs}`; {machine}. float32, certificate,\n"
        "save and read-back included; the package's files were in the page cache.\n\n"
        + "\n".join(lines)
        + "\n\nPeers, measured earlier on a machine of this size, the same four copies:\n"
        "MixtureKit 15.9 s, mergekit-moe 20.9 to 24.6 s and 2.19 GB; neither certifies nor\n"
        "reads back.\n"
    )
    (HERE / "convert.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
