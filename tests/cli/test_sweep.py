"""`sparsecraft sweep`."""

from __future__ import annotations


def test_sweep_writes_its_files_and_prints_the_table(run, fails, routed, tmp_path, rows):
    out = tmp_path / "sweep"
    text = run(
        "sweep", routed, "--data", rows, "--out", out, "--shares", "0.5", "--batch-sizes", "1",
        "--rounds", "2", "--context", "8",
    )  # fmt: skip
    assert "FFN FLOPs" in text and "x all at 1" in text and "first 10 of 40 rows" in text
    assert {p.name for p in out.iterdir()} == {"sweep.csv", "sweep.md", "sweep.png"}
    said = fails("sweep", routed, "--data", rows, "--out", out, "--shares", "2")
    assert "shares has 2.0" in said
