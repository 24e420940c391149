"""`sparsecraft convert`."""

from __future__ import annotations

import json
import os

import pytest

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.dense import hub
from sparsecraft.dense.packaged import alias_folder

SMALL = ["--num-experts", "4", "--adapter-dim", "16", "--lora-rank", "4"]


def test_convert_prints_needs_counts_claim_and_certificate(run, dense, tmp_path, rows):
    out = tmp_path / "camelid"
    text = run("convert", "camelidae", "--model", dense, "--out", out, *SMALL, "--data", rows)
    assert "GB of memory" in text and "GB of disk" in text
    assert "Claim: exact at start" in text
    # One random batch and five batches of eight rows, of which the certificate takes four.
    assert "on 5 probe batch(es)" in text and "max |logit difference| 0.0e+00" in text
    report = json.loads((out / "report.json").read_text())["conversion"]
    assert report["certificate"]["max_difference"] == 0 and f"{report['cost']['new']:,}" in text
    readme = (out / "README.md").read_text()
    assert dense in readme and "license: apache-2.0" in readme


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_without_a_recipe_lists_the_recipes(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["convert", flag])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "usage: sparsecraft convert RECIPE" in text
    assert ", ".join(sc.recipes.__all__) in text


def test_help_of_a_recipe_shows_its_parameters_in_whole_lines(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as ended:
        main(["convert", "camelidae", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "--top-k INT" in text and "--match-params" in text
    assert "Adapters per token. (default: 2)" in text


def test_recipe_parameters_are_flags_and_deeper_fields_are_set(run, dense, tmp_path):
    run(
        "convert", "camelidae", "--model", dense, "--out", tmp_path / "out", *SMALL,
        "--top-k", "3", "--variant", "released", "--set", "router.temperature=0.5",
    )  # fmt: skip
    recipe = sc.load(tmp_path / "out").sparsecraft.recipe
    router = recipe.edits[0].router
    assert (router.select.k, router.temperature, recipe.variant) == (3, 0.5, "released")


def test_numbers_by_layer_are_several_words_of_a_flag(run, fails, dense, tmp_path):
    out, base = tmp_path / "layers", ("convert", "upcycling", "--model", dense, "--out")
    run(*base, out, "--num-experts", "2", "4", "--set", "top_k=1,2", "--no-certify")
    assert sc.load(out).sparsecraft.recipe == sc.recipes.upcycling([2, 4], [1, 2])
    assert "experts.num_experts by layer: 2, 4" in run("inspect", out)
    none = tmp_path / "none"
    assert "has 3 numbers" in fails(*base, none, "--num-experts", "2", "4", "8")
    assert "In layer 0, --top-k is 3" in fails(*base, none, "--num-experts", "2", "4", "--top-k=3")
    assert "give one number for each layer" in fails(*base, none, "--num-experts")
    assert not none.exists()


def test_a_repeated_option_adds_to_the_first(run, dense, tmp_path):
    out = tmp_path / "molora"
    changes = ["--set", "router.temperature=0.5", "--seed=1", "--set", "experts.alpha=3"]
    run("convert", "molora", "--model", dense, "--out", out, "--num-experts", "2", *changes)
    edit = sc.load(out).sparsecraft.recipe.edits[0]
    assert (edit.router.temperature, edit.experts.alpha) == (0.5, 3.0)


def test_the_size_is_set_once(fails, dense, tmp_path):
    base = ("convert", "lora", "--model", dense, "--out", tmp_path / "x", "--match-params", "ia3")
    for more in (("--rank", "8"), ("--set", "experts.rank=8")):
        assert "both set the size of 'lora'" in fails(*base, *more)


def test_no_disk_no_conversion(fails, dense, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    said = fails("convert", "camelidae", "--model", dense, "--out", tmp_path / "out", *SMALL)
    assert "of disk" in said and "free" in said and not (tmp_path / "out").exists()


def test_an_unreachable_hub_is_one_sentence(fails, tmp_path):
    said = fails("convert", "camelidae", "--model", "owner/model", "--out", tmp_path / "out")
    assert len(said) < 300 and "owner/model" in said


def test_a_family_without_a_donor(fails, tmp_path):
    import transformers

    folder = tmp_path / "mamba"
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    transformers.MambaForCausalLM(config).save_pretrained(folder)
    said = fails("convert", "camelidae", "--model", folder, "--out", tmp_path / "out")
    assert "no feed-forward network of a known form" in said


@pytest.mark.smollm2
def test_smollm2_becomes_camelidae_exactly_and_answers(run, tmp_path):
    if not alias_folder("smollm2").exists():
        pytest.skip("`make test` fetches SmolLM2 first; its cache folder is empty")
    out = tmp_path / "camelid"
    text = run("convert", "camelidae", "--model", "smollm2", "--out", out, "--adapter-dim", "64")
    assert "max |logit difference| 0.0e+00" in text and "37,370,880" in text
    text = run(
        "generate", out, "--prompt", "What is the capital of France?", "--max-new-tokens", "16"
    )
    assert "Paris" in text
    for name in os.listdir(hub.resolve("smollm2")):
        if "token" in name or "template" in name or name == "generation_config.json":
            assert (out / name).read_bytes() == (hub.resolve("smollm2") / name).read_bytes()


@pytest.mark.smollm2
def test_smollm2_upcycled_is_within_a_ten_thousandth(run, tmp_path):
    if not alias_folder("smollm2").exists():
        pytest.skip("`make test` fetches SmolLM2 first; its cache folder is empty")
    out = tmp_path / "upcycled"
    run("convert", "upcycling", "--model", "smollm2", "--out", out, "--num-experts", "4")
    certificate = json.loads((out / "report.json").read_text())["conversion"]["certificate"]
    assert certificate["logit_difference"] <= 1e-4 and certificate["logit_scale"] > 30
