"""`sparsecraft export`, and `import` back."""

from __future__ import annotations


def test_export(run, fails, dense, converted, tmp_path):
    run("convert", "upcycling", "--model", dense, "--out", tmp_path / "up", "--num-experts", "4")
    text = run("export", tmp_path / "up", "--to", "mixtral", "--out", tmp_path / "mixtral")
    assert "as mixtral" in text and (tmp_path / "mixtral" / "config.json").exists()
    text = run("import", tmp_path / "mixtral", "--out", tmp_path / "back")
    assert "Imported from Mixtral." in text and "4 ffn replace every ffn" in text
    assert "Imported from Mixtral" in run("inspect", tmp_path / "back")
    assert "mixtures of mixtral" in fails("import", dense, "--out", tmp_path / "no")
    text = run("export", tmp_path / "up", "--dry-run")
    assert "mixtral: exact\n" in text and "qwen3_moe: no: " in text
    text = run("export", tmp_path / "up", "--to", "qwen2_moe", "--dry-run")
    assert text.startswith("qwen2_moe: exact\n  llama.cpp never renormalizes")
    said = fails("export", tmp_path / "up", "--to", "mixtrl", "--dry-run")
    assert "Did you mean 'mixtral'" in said
    assert "or --dry-run" in fails("export", tmp_path / "up", "--to", "mixtral")
    said = fails("export", converted, "--to", "mixtral", "--out", tmp_path / "no")
    assert "no exact form as mixtral" in said and not (tmp_path / "no").exists()
