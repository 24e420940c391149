"""`sparsecraft compare`."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests import tiny


@pytest.fixture
def given(dense, converted, rows, tmp_path) -> list[str]:
    other = tiny.write_rows(tmp_path / "other.jsonl", tiny.chat_rows(30))
    return [dense, converted, "--data", rows, other, "--out", str(tmp_path / "report")]


def test_tables_files_and_a_page_of_its_own(run, given, dense, converted, tmp_path):
    text = run("compare", *given)
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["model", "loss", "difference"]  # piped, so that none is broken
    assert "baseline" in lines[1] and "the same" in lines[2]
    assert "camelid: the same loss as model, to four digits." in lines
    assert any("prefill" in line and "CPU" in line for line in lines)
    out = tmp_path / "report"
    assert f"Written to {out}: comparison.png, metrics.json, report.html" in lines
    found = json.loads((out / "metrics.json").read_text())
    assert [model["name"] for model in found["models"]] == [dense, converted]
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert page.count("<img ") == 1 and page.count("<table>") == 2
    assert not re.findall(r"""(?:src|href|srcset)=["'](?!data:)""", page)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", page)


def test_a_narrow_terminal_gets_a_model_in_a_column(run, given, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    text = re.sub(r"\x1b\[[0-9;]*m", "", run("compare", *given))
    assert text.splitlines()[0].split() == ["model", "camelid"]
    assert max(map(len, text.split("\n\n")[0].splitlines())) <= 80


def test_errors_are_in_flags(fails, given, dense, converted, rows, tmp_path):
    with_rows = ["--data", rows, "--out", tmp_path / "out"]
    assert "two or more models" in fails("compare", dense, *with_rows)
    assert "same folder" in fails("compare", dense, dense, *with_rows)
    assert "no model folder './nowhere'" in fails("compare", dense, "./nowhere", *with_rows)
    empty = ["--data", "--out", tmp_path / "out"]
    assert fails("compare", dense, converted, *empty).endswith("pass --data FILE.")
    assert "--limit" in fails("compare", *given, "--limit", 0)
    assert "--max-length is 1" in fails("compare", *given, "--max-length", 1)
    assert "--data holds" in fails("compare", dense, converted, "--data", rows, rows, "--out", "x")
    file = tmp_path / "file"
    file.write_text("")
    assert f"--out {file} is a file" in fails("compare", *given[:4], "--out", file)
    broken = tmp_path / "broken"
    shutil.copytree(converted, broken)
    (broken / "recipe.json").unlink()
    assert "recipe.json is missing" in fails("compare", dense, broken, *with_rows)
