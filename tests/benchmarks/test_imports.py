"""Every benchmark can be imported without a GPU and without optional packages."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
)


@pytest.mark.parametrize("module", MODULES)
def test_imports(module):
    assert importlib.import_module(module).__doc__
