"""`sparsecraft methods`."""

from __future__ import annotations

import sparsecraft as sc


def test_methods_lists_every_recipe(run):
    text = run("methods")
    for name in sc.recipes.__all__:
        assert f"{name}: " in text
    for word in ("paper", "placement", "experts", "router", "exact_at_start"):
        assert word in text
