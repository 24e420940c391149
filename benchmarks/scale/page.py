"""The page of the study, from its results."""

from __future__ import annotations

from pathlib import Path


def write(folder: Path) -> None:
    raise SystemExit("no page yet")
