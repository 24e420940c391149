"""The page of the study, from its results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write(folder: Path) -> None:
    """README.md beside results.json."""
    found = json.loads((folder / "results.json").read_text())
    (folder / "README.md").write_text("\n".join(_page(found)) + "\n")


def _page(found: dict[str, Any]) -> Iterator[str]:
    yield "# Memory: said against measured\n"
    yield (
        "What `train`, `convert` and `eval` say before they begin, in GB (10^9 bytes), and the "
        "peak beyond what was in use, each row in a process of its own. `train` and `eval` begin "
        "with the model in memory; rows x tokens are those of a micro-batch, of two in a step, or "
        "of a batch. On a CPU the peak is of resident memory that no file stands behind, sampled "
        "every 2 ms, so that it holds what the C library keeps of freed tensors: 1.2 of what "
        "lives is said there. On a GPU it is torch's own count (`max_memory_allocated`)."
    )
    for device, part in found.items():
        versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
        model = "SmolLM2-135M" if device == "cpu" else "a random Llama of about 1B parameters"
        yield f"\n## {device}: {model}\n"
        yield (
            f"`python -m benchmarks.memory run --device {device}`, {part['machine']}, commit "
            f"{part['commit']}, {versions}.\n"
        )
        yield "| run | said | measured | said / measured |\n| --- | --- | --- | --- |"
        for name, row in part["rows"].items():
            ratio = row["said"] / row["measured"]
            yield f"| {name} | {row['said']:.2f} | {row['measured']:.2f} | {ratio:.2f} |"
