"""`sparsecraft calibrate`, and what `--budget` of other verbs makes of it."""

from __future__ import annotations

import json
import re

import pytest

import sparsecraft as sc


def test_calibrate_sets_a_budget_that_other_verbs_can_change(run, fails, routed, tmp_path, rows):
    out = tmp_path / "half"
    said = fails("generate", routed, "--prompt", "say red", "--budget", "0.5")
    assert "sparsecraft calibrate" in said
    text = run(
        "calibrate", routed, "--data", rows, "--target-flops", "0.5", "0.8", "--out", out
    )  # fmt: skip
    found = re.search(r"target 0.5: threshold (\S+), (\S+)% of the experts, FFN FLOPs (\S+)", text)
    running = sc.load(out).sparsecraft.running
    assert running.budget == pytest.approx(float(found[2]) / 100, abs=1e-3)
    assert 0.4 < float(found[3]) <= 0.5 and "target 0.8" in text and "(dense" in text
    assert sc.load(routed).sparsecraft.running.budget is None  # only --out was written
    # In place, with the tokenizer that was there.
    text = run("calibrate", out, "--data", rows, "--target-flops", "0.8", "--max-tokens", "300")
    assert f"saved and read back: {out}" in text
    assert sc.load(out).sparsecraft.running.budget != running.budget
    losses = {}
    for budget in ("1.0", "recipe", None):
        asked = ("--budget", budget) if budget else ()
        report = tmp_path / "found.json"
        run("eval", out, "--data", rows, "--json", report, *asked)
        losses[budget] = json.loads(report.read_text())["loss"][rows]["loss"]
    assert len(set(losses.values())) == 3
    assert run("generate", out, "--prompt", "say red", "--max-new-tokens", "3", "--budget", "1")


def test_calibrate_and_sweep_refuse_what_cannot_be(
    fails, run, dense, routed, converted, tmp_path, rows
):
    assert "no split networks" in fails("calibrate", converted, "--data", rows)
    assert "least is" in fails("calibrate", routed, "--data", rows, "--target-flops", "0.01")
    run("convert", "lte", "--model", dense, "--out", tmp_path / "new", "--num-experts", "4")
    for verb in (("calibrate",), ("sweep", "--out", tmp_path / "s")):
        said = fails(verb[0], tmp_path / "new", "--data", rows, *verb[1:])
        assert "not been trained" in said and "sparsecraft train DIR" in said
    said = fails("chat", converted, "--budget", "0.5")
    assert "no split networks" in said
