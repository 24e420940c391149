"""`sparsecraft methods`."""

from __future__ import annotations

import sparsecraft as sc


def test_methods_lists_every_recipe(run):
    text = run("methods")
    for name in sc.recipes.__all__:
        assert f"{name}: " in text
    for word in ("paper", "placement", "experts", "router", "exact_at_start"):
        assert word in text


def test_methods_as_a_table(run):
    head, rule, *rows = run("methods", "--markdown").splitlines()
    assert {line.count("|") for line in (head, rule, *rows)} == {7}
    assert sorted(row.split("`")[1] for row in rows) == sorted(sc.recipes.__all__)
    (bam,) = (row for row in rows if row.startswith("| `bam` |"))
    assert "4 attentions in place of every attention; 4 networks in place of every FFN" in bam
    assert bam.endswith("| linear, soft; linear, top-1 | no |")
