"""`sparsecraft analyze`."""

from __future__ import annotations

import json
from pathlib import Path


def test_a_page_of_a_checkpoint(run, fails, converted, dense, tmp_path, rows):
    out = tmp_path / "report"
    other = tmp_path / "other.jsonl"
    other.write_text("".join(Path(rows).read_text().splitlines(keepends=True)[:9]))
    text = run("analyze", converted, "--data", rows, other, "--out", out, "--text", "say red")
    assert "What a token's first expert tells of its domain" in text
    assert f"Written to {out}: " in text and (out / "report.html").is_file()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["domains"] == [rows, str(other)] and metrics["text"]["tokens"]
    run("analyze", converted, "--data", rows, "--out", out, "--no-twin", "--no-drop")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["dropped"] is None and metrics["domains"] == [rows]
    assert "has no router" in fails("analyze", dense, "--data", rows, "--out", out)
    assert "--limit" in fails("analyze", converted, "--data", rows, "--out", out, "--limit", 0)
    file = tmp_path / "file"
    file.write_text("")
    assert str(file) in fails("analyze", converted, "--data", rows, "--out", file)


def test_a_split_network(run, routed, tmp_path, rows):
    out = tmp_path / "report"
    run("analyze", routed, "--data", rows, "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    for layer in metrics["layers"].values():
        assert "entropy" not in layer and sum(layer["experts_per_token"]) == metrics["tokens"]


def test_neurons_of_a_dense_model(run, fails, dense, converted, tmp_path, rows):
    out, other = tmp_path / "report", tmp_path / "other.jsonl"
    other.write_text("".join(Path(rows).read_text().splitlines(keepends=True)[:9]))
    given = "analyze", dense, "--neurons", "--data", rows, other, "--out", out
    text = run(*given)
    assert "Where the neurons of a domain lie" in text
    page = (out / "report.html").read_text()
    assert page.count("<img ") == 3 and "random weights" in page
    run(*given, "--no-twin", "--no-drop", "--score", "freq")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["twin"] is None and metrics["score"] == "freq"
    assert "one domain" in fails("analyze", dense, "--neurons", "--data", rows, "--out", out)
    assert "Did you mean" in fails(*given, "--score", "rmss")
    assert "--text" in fails(*given, "--text", "say red")


def test_the_log_of_a_training(run, fails, converted, tmp_path, rows):
    trained, out = tmp_path / "trained", tmp_path / "report"
    run("train", converted, "--data", rows, "--out", trained, "--steps", 4, "--batch-size", 4)
    text = run("analyze", trained, "--training", "--out", out)
    assert "What routers do over the steps of training" in text and (out / "report.html").is_file()
    assert "holds no log" in fails("analyze", converted, "--training", "--out", out)
    given = "analyze", trained, "--out", out
    assert "--data" in fails(*given) and "--data" in fails(*given, "--training", "--data", rows)
