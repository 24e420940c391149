"""The command line, run as a user runs it: results on standard output, errors in one sentence."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sparsecraft as sc
from sparsecraft.cli.console import gathered
from sparsecraft.cli.main import VERBS, main
from sparsecraft.dense import hub
from sparsecraft.dense.packaged import alias_folder
from tests import tiny

ROOT = Path(__file__).parents[2]
SMALL = ["--num-experts", "4", "--adapter-dim", "16", "--lora-rank", "4"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> str:
    return tiny.save_dense(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def converted(dense, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("converted") / "camelid")
    assert main(["convert", "camelidae", "--model", dense, "--out", out, *SMALL]) == 0
    return out


@pytest.fixture
def run(capsys):
    def run(*arguments: object) -> str:
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    capsys.readouterr()
    return run


@pytest.fixture
def fails(capsys):
    def fails(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 1
        captured = capsys.readouterr()
        sentence = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(sentence) == 1 and "Traceback" not in captured.err
        return sentence[0]

    return fails


def rows_file(folder: Path, count: int = 40) -> str:
    return tiny.write_rows(folder / "rows.jsonl", tiny.chat_rows(count))


def test_convert_prints_needs_counts_claim_and_certificate(run, dense, tmp_path):
    out = tmp_path / "camelid"
    data = rows_file(tmp_path)
    text = run("convert", "camelidae", "--model", dense, "--out", out, *SMALL, "--data", data)
    assert "GB of memory" in text and "GB of disk" in text
    assert "Claim: exact at start" in text
    # One random batch and five batches of eight rows, of which the certificate takes four.
    assert "max |logit difference| 0.0e+00 on 5 probe batch(es)" in text
    report = json.loads((out / "report.json").read_text())["conversion"]
    assert report["certificate"]["max_difference"] == 0 and f"{report['cost']['new']:,}" in text
    readme = (out / "README.md").read_text()
    assert dense in readme and "license: apache-2.0" in readme


def test_recipe_parameters_are_flags_and_deeper_fields_are_set(run, dense, tmp_path):
    run(
        "convert", "camelidae", "--model", dense, "--out", tmp_path / "out", *SMALL,
        "--top-k", "3", "--variant", "released", "--set", "router.temperature=0.5",
    )  # fmt: skip
    recipe = sc.load(tmp_path / "out").sparsecraft.recipe
    router = recipe.edits[0].router
    assert (router.select.k, router.temperature, recipe.variant) == (3, 0.5, "released")


def test_train_evaluate_inspect_generate(run, converted, tmp_path):
    rows, out = rows_file(tmp_path), tmp_path / "sft"
    text = run(
        "train", converted, "--data", rows, rows, "--weights", "2", "1", "--out", out,
        "--steps", "6", "--batch-size", "4", "--max-length", "64", "--learning-rate", "1e-2",
        "--no-progress",
    )  # fmt: skip
    assert text.startswith("6 steps, mean loss") and f"Saved and read back: {out}" in text
    text = run("eval", out, "--data", rows, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"{found['loss'][rows]['loss']:.4f}" in text and "load_entropy" in text
    text = run("inspect", out)
    cost = sc.count(sc.load(out))
    for name in ("total", "new", "trainable", "active"):
        assert f"{getattr(cost, name):,}" in text
    assert "claimed exact" in text and "6 steps" in text and "load entropy" in text
    answer = run("generate", out, "--prompt", "say red", "--max-new-tokens", "5")
    streamed = run("generate", out, "--prompt", "say red", "--max-new-tokens", "5", "--stream")
    assert answer.strip() == streamed.strip()


def test_chat_keeps_the_conversation(run, converted, monkeypatch):
    lines = iter(["say red", "say blue", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    seen = []
    from sparsecraft.serving import generation

    answer = generation.answer
    monkeypatch.setattr(
        generation,
        "answer",
        lambda model, tokenizer, messages, **k: (
            seen.append(len(messages))
            or answer(model, tokenizer, messages, **{**k, "max_new_tokens": 3})
        ),
    )
    run("chat", converted)
    assert seen == [1, 3]


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


def test_methods_as_a_table(run):
    head, rule, *rows = run("methods", "--markdown").splitlines()
    assert {line.count("|") for line in (head, rule, *rows)} == {7}
    assert sorted(row.split("`")[1] for row in rows) == sorted(sc.recipes.__all__)
    (bam,) = (row for row in rows if row.startswith("| `bam` |"))
    assert "4 attentions in place of every attention; 4 networks in place of every FFN" in bam
    assert bam.endswith("| linear, soft; linear, top-1 | no |")


def test_methods_lists_every_recipe(run):
    text = run("methods")
    for name in sc.recipes.__all__:
        assert f"{name}: " in text
    for word in ("paper", "placement", "experts", "router", "exact_at_start"):
        assert word in text


def test_bad_input_is_one_sentence_and_writes_nothing(fails, dense, converted, tmp_path):
    out = tmp_path / "out"
    base = ("--model", dense, "--out", out)
    assert "Did you mean 'camelidae'" in fails("convert", "camelida", *base)
    assert "one of adapter" in fails("convert", *base)
    assert "--top-k is 9 with --num-experts 8" in fails(
        "convert", "camelidae", *base, "--top-k", "9"
    )
    said = fails("convert", "camelidae", *base, "--set", "router.temprature=1")
    assert "temperature" in said
    assert "no '='" in fails("convert", "camelidae", *base, "--set", "router.temperature")
    assert "mlp" in fails("convert", "camelidae", *base, "--paths", "model.layer.*.mlp")
    assert "matches none" in fails("convert", "camelidae", *base, "--paths", "nowhere")
    missing = tmp_path / "missing"
    assert "missing" in fails("convert", "camelidae", "--model", missing, "--out", out)
    said = fails("convert", "camelidae", "--model", dense, "--out", converted)
    assert "exists already" in said
    said = fails("train", dense, "--data", rows_file(tmp_path), "--out", out)
    assert "no sparsecraft checkpoint" in said
    assert "no.jsonl" in fails("train", converted, "--data", tmp_path / "no.jsonl", "--out", out)
    assert "nothing to evaluate" in fails("eval", converted)
    assert "Did you mean 'train'" in fails("trian")
    assert not out.exists()


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


def test_generate_refuses_encoders(fails, tmp_path):
    from tests import cases

    folder = tmp_path / "bert"
    cases.dense("bert").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    assert "does not generate" in fails("generate", folder, "--prompt", "x")


def test_help_is_quick_and_imports_no_torch():
    script = (
        "import sys, time; start = time.perf_counter()\n"
        "from sparsecraft.cli.main import main\n"
        "assert main({argv}) == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    for argv, seconds in ((["--help"], 1.0), (["convert", "--help"], 3.0)):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script.format(argv=argv)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert time.perf_counter() - start < seconds
        assert "usage: sparsecraft" in done.stdout


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "sparsecraft", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == sc.__version__


def readme_commands() -> list[list[str]]:
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("sparsecraft ")]


def test_the_readme_shows_commands():
    assert {command[0] for command in readme_commands()} >= {"convert", "train", "eval", "generate"}


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_readme_commands_parse(command, capsys):
    verb, *arguments = command
    assert verb in VERBS
    help_of = [verb, arguments[0], "--help"] if verb == "convert" else [verb, "--help"]
    try:
        main(help_of)
    except SystemExit as ended:
        assert ended.code == 0
    text = capsys.readouterr().out
    for word in arguments:
        if word.startswith("--"):
            assert word in text, f"sparsecraft {verb} has no option {word}"


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
    assert certificate["max_difference"] <= 1e-4 and certificate["scale"] > 30


@pytest.mark.slow
def test_the_demo_lowers_every_held_out_loss(run, tmp_path):
    text = run("demo", "--out", tmp_path / "demo")
    assert text.count("falls") == 3 and "DOES NOT FALL" not in text


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


def test_a_peft_folder_is_a_model_too(run, converted, tmp_path):
    out = tmp_path / "peft"
    run("export", converted, "--to", "peft", "--out", out)
    assert run("generate", out, "--prompt", "one", "--max-new-tokens", "2") == run(
        "generate", converted, "--prompt", "one", "--max-new-tokens", "2"
    )


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("D --set a=1 --out O --set b=2 c=3", "D --set a=1 b=2 c=3 --out O"),
        ("D --data=x --data y", "D --data x y"),
        ("D --prompt=--help --seed 1 --seed 2", "D --prompt=--help --seed 1 --seed 2"),
        ("--limit 3 D --flag=False", "--limit 3 D --flag=False"),
    ],
)
def test_only_options_of_several_values_are_gathered(given, wanted):
    assert gathered(given.split()) == wanted.split()
    assert gathered(["--prompt", "-- a = b", "--system", ""]) == [
        "--prompt",
        "-- a = b",
        "--system",
        "",
    ]


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Path:
    """A checkpoint of a split model whose routers pass for trained."""
    from tests.surgery.test_budget import RECIPES, made

    model = tiny.llama()
    sc.convert(model, RECIPES["d2dmoe"](), certify=False)
    out = tmp_path_factory.mktemp("routed") / "split"
    return sc.save(made(model), out, tokenizer=tiny.tokenizer())


def test_calibrate_sets_a_budget_that_other_verbs_can_change(run, fails, routed, tmp_path):
    rows, out = rows_file(tmp_path), tmp_path / "half"
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


def test_calibrate_and_sweep_refuse_what_cannot_be(fails, run, dense, routed, converted, tmp_path):
    rows = rows_file(tmp_path)
    assert "no split networks" in fails("calibrate", converted, "--data", rows)
    assert "least is" in fails("calibrate", routed, "--data", rows, "--target-flops", "0.01")
    run("convert", "lte", "--model", dense, "--out", tmp_path / "new", "--num-experts", "4")
    for verb in (("calibrate",), ("sweep", "--out", tmp_path / "s")):
        said = fails(verb[0], tmp_path / "new", "--data", rows, *verb[1:])
        assert "not been trained" in said and "sparsecraft train DIR" in said
    said = fails("chat", converted, "--budget", "0.5")
    assert "no split networks" in said


def test_sweep_writes_its_files_and_prints_the_table(run, fails, routed, tmp_path):
    rows, out = rows_file(tmp_path), tmp_path / "sweep"
    text = run(
        "sweep", routed, "--data", rows, "--out", out, "--shares", "0.5", "--batch-sizes", "1",
        "--rounds", "2", "--context", "8",
    )  # fmt: skip
    assert "FFN FLOPs" in text and "x all at 1" in text and "first 10 of 40 rows" in text
    assert {p.name for p in out.iterdir()} == {"sweep.csv", "sweep.md", "sweep.png"}
    said = fails("sweep", routed, "--data", rows, "--out", out, "--shares", "2")
    assert "shares has 2.0" in said


def test_a_split_checkpoint_merges_at_a_budget_of_one(tmp_path, capsys):
    base = tiny.save_dense(tmp_path / "dense")
    model = sc.hub.load_dense(base)
    sc.convert(model, sc.recipes.moefication(4, relu=False))
    sc.set_budget(model, 0.5)
    sc.save(model, tmp_path / "split")
    folder, out = str(tmp_path / "split"), str(tmp_path / "merged")
    assert main(["merge", folder, "--out", out]) == 1
    assert "--budget 1.0" in capsys.readouterr().err
    assert main(["merge", folder, "--out", out, "--budget", "1.0"]) == 0
    merged = sc.hub.load_dense(out)
    ids = torch.arange(3, 12)[None]
    assert torch.equal(merged(ids).logits, sc.hub.load_dense(base)(ids).logits)
