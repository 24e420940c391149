"""`sparsecraft generate`."""

from __future__ import annotations

from tests import tiny


def test_generate_refuses_encoders(fails, tmp_path):
    from tests import cases

    folder = tmp_path / "bert"
    cases.dense("bert").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    said = fails("generate", folder, "--prompt", "x")
    assert "does not generate text." in said and "eval" not in said  # which refuses it too


def test_a_peft_folder_is_a_model_too(run, converted, tmp_path):
    out = tmp_path / "peft"
    run("export", converted, "--to", "peft", "--out", out)
    assert run("generate", out, "--prompt", "one", "--max-new-tokens", "2") == run(
        "generate", converted, "--prompt", "one", "--max-new-tokens", "2"
    )
