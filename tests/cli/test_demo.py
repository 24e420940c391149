"""`sparsecraft demo`."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_the_demo_lowers_every_held_out_loss(run, tmp_path):
    text = run("demo", "--out", tmp_path / "demo")
    assert text.count("falls") == 3 and "DOES NOT FALL" not in text
