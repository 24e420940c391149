"""A run that diverges ends with an error that says where, and replaces nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.dense.sound import check_weights, fault_of, is_finite
from sparsecraft.errors import (
    CheckpointError,
    HubError,
    SparsecraftError,
    SurgeryError,
    TrainingError,
)
from sparsecraft.training.resume import last_state
from sparsecraft.training.trainers import RoutedSFTTrainer
from tests import cases, tiny
from tests.moe.test_state import running
from tests.training.test_train import FAST, converted, parameters

RUN = FAST | {"steps": 6, "log_every": 1}


@pytest.fixture
def rows(tmp_path) -> str:
    return tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows())


def train(model, rows, out, **options):
    return sc.train(model, rows, out, tokenizer=tiny.tokenizer(), **RUN | options)


def spoil_at(monkeypatch, step: int, spoil) -> None:
    """Let `spoil(trainer)` happen before a step, in the place of what makes a run diverge."""
    original = RoutedSFTTrainer.compute_loss

    def compute_loss(trainer, model, inputs, *args, **kwargs):
        if trainer.state.global_step == step - 1 and model.training:
            spoil(trainer)
        return original(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RoutedSFTTrainer, "compute_loss", compute_loss)


def an_expert(trainer) -> tuple[str, nn.Parameter]:
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return next((name, p) for name, p in named if name.endswith("layers.1.mlp.experts.up"))


def nan_weight(trainer) -> None:
    an_expert(trainer)[1].data[0, 0, 0] = torch.nan


def nan_gradient(trainer) -> None:
    an_expert(trainer)[1].register_hook(lambda gradient: gradient * torch.nan)


def huge_gradient(trainer) -> None:
    an_expert(trainer)[1].register_hook(lambda gradient: torch.full_like(gradient, 1e30))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (nan_weight, r"step 4: 'model\.layers\.1\.mlp\.experts\.up'.* 1 of .*not finite"),
        (nan_gradient, r"step 4: the gradient of 'model\.layers\.1\.mlp\.experts\.up' holds"),
        (huge_gradient, r"step 4: the gradient of .* is too large for its own norm"),
    ],
)
@pytest.mark.parametrize("micro_batch", [4, 1])
def test_what_is_not_finite_is_named_with_its_step(
    spoil, words, micro_batch, tmp_path, rows, monkeypatch
):
    spoil_at(monkeypatch, 4, spoil)
    with pytest.raises(TrainingError, match=words):
        train(converted(), rows, tmp_path / "out", micro_batch=micro_batch)
    assert not (tmp_path / "out").exists()


def test_the_first_module_whose_output_is_not_finite_is_named(tmp_path, rows, monkeypatch):
    def spoil(trainer):
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.model.layers[1].mlp.experts.activation = nn.Threshold(10.0, torch.inf)

    spoil_at(monkeypatch, 3, spoil)
    with pytest.raises(TrainingError, match=r"step 3: the loss .*'model\.layers\.1\.mlp.experts"):
        train(converted(), rows, tmp_path / "out")


@pytest.mark.parametrize("save_every", [None, 2])
def test_a_run_that_diverges_keeps_the_good_checkpoint_and_the_last_good_state(
    save_every, tmp_path, rows, monkeypatch
):
    out = tmp_path / "out"
    train(converted(), rows, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as spoiled:
        spoil_at(spoiled, 5, nan_weight)
        with pytest.raises(TrainingError, match="step 5"):
            train(converted(), rows, out, save_every=save_every, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    if save_every is None:
        assert not list(tmp_path.glob("out.training/*/checkpoint-*"))
        return
    state = last_state(next((tmp_path / "out.training").iterdir()))
    assert state.name == "checkpoint-4"
    assert all(is_finite(t) for _, t in sc_tensors(state))
    straight, resumed = converted(), converted()
    train(straight, rows, tmp_path / "straight", save_every=2)
    train(resumed, rows, out, save_every=2, resume=True, overwrite=True)
    pairs = zip(parameters(resumed).items(), parameters(straight).items(), strict=True)
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in pairs)


def sc_tensors(folder):
    from sparsecraft.checkpoint import tensorfile

    return tensorfile.read(folder / "moe.safetensors")


def test_a_learning_rate_that_breaks_the_model_is_no_success_on_the_command_line(
    tmp_path, rows, capsys
):
    base = tiny.save_dense(tmp_path / "base")
    options = ["camelidae", "--model", base, "--num-experts", "2", "--adapter-dim", "4"]
    assert main(["convert", *options, "--out", str(tmp_path / "in")]) == 0
    shutil.copytree(tmp_path / "in", tmp_path / "good")
    capsys.readouterr()
    run = ["--data", rows, "--batch-size", "2", "--max-length", "64", "--no-progress"]
    for steps in ("2", "5"):  # broken by the last step, and before it
        words = ["--steps", steps, "--learning-rate", "1e30", "--overwrite"]
        folders = [str(tmp_path / "in"), "--out", str(tmp_path / "good")]
        assert main(["train", *folders, *run, *words]) == 1
        said = capsys.readouterr()
        assert f"diverged in step {min(int(steps), 3)}" in said.err and not said.out
        assert "--save-every" in said.err and "Traceback" not in said.err
    assert not json.loads((tmp_path / "good" / "report.json").read_text()).get("training")
    check_weights(sc.load(tmp_path / "good"), SurgeryError)


def test_a_fit_that_diverges_leaves_the_model_as_it_was(tmp_path, rows):
    model = tiny.llama()
    sc.convert(model, sc.recipes.gmoefication(num_experts=4))
    with torch.no_grad():  # finite weights whose product is not
        for layer in model.model.layers:
            layer.mlp.experts.first.mul_(1e25)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stages = (model.sparsecraft.recipe.stages[-1].name,)
    with pytest.raises(TrainingError, match=r"loss of 'model\.layers\.\d\.mlp' is (nan|inf)"):
        train(model, rows, tmp_path / "out", stages=stages)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# ------------------------------------------------------------------------------- what is no weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_is_enough(dtype, value):
    tensor = torch.ones(3, 5, dtype=dtype)
    assert fault_of(tensor) is None
    tensor[1, 2] = value
    assert "1 of 15 numbers that are not finite" in fault_of(tensor)


def test_integers_are_no_weights_and_masks_are_none_either():
    assert "int32" in fault_of(torch.ones(2, dtype=torch.int32))
    assert "bool" in fault_of(torch.ones(2, dtype=torch.bool))
    assert fault_of(torch.ones(4).to(torch.float8_e4m3fn)) is None
    assert fault_of(torch.empty(0)) is None
    model = cases.dense("llama")
    model.register_buffer("mask", torch.full((2, 2), -torch.inf))
    check_weights(model, SurgeryError)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_integers_in_the_files_of_a_base_are_refused_at_every_door(tmp_path, kind):
    """transformers casts them to floating numbers, and what is in memory looks like weights."""
    folder, name = tmp_path / "base", "model.layers.0.mlp.up_proj.weight"
    model = tiny.llama()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state[name] = (state[name] * 1000).to(torch.int8)
    state.pop("lm_head.weight")
    tiny.save_dense(folder)
    (folder / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    said = rf"'{name}' of .*base holds numbers of type int8"
    with pytest.raises(HubError, match=said):
        sc.hub.load_dense(str(folder))
    with pytest.raises(SurgeryError, match=said):
        loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
        sc.convert(loaded, sc.recipes.molora(2))
    for how in ([], ["--stream"]):
        words = ["convert", "molora", "--num-experts", "2", "--model", str(folder)]
        assert main([*words, "--out", str(tmp_path / "out"), *how]) == 1
        assert not (tmp_path / "out").exists()


def broken(model: nn.Module, value: float = torch.nan) -> nn.Module:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    return model


def test_a_base_with_nan_is_refused_before_anything(tmp_path):
    model = broken(tiny.llama())
    with pytest.raises(SurgeryError, match=r"layers\.1\.mlp\.down_proj\.weight'.*not finite"):
        sc.convert(model, sc.recipes.camelidae(2, adapter_dim=4))
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    for how in ([], ["--stream"]):
        words = ["convert", "upcycling", "--num-experts", "2", "--model", str(tmp_path / "base")]
        assert main([*words, "--out", str(tmp_path / "out"), *how]) == 1
        assert not [path for path in tmp_path.iterdir() if path.name != "base"]


@pytest.mark.parametrize("how", [[], ["--stream"]])
def test_a_source_with_nan_is_refused_before_anything(how, tmp_path, capsys):
    base = tiny.save_dense(tmp_path / "base")
    bad = tiny.save_dense(tmp_path / "bad")
    broken(tiny.llama(), torch.inf).save_pretrained(bad)
    words = ["convert", "btx", "--num-experts", "2", "--model", base, "--sources", base, bad]
    assert main([*words, "--out", str(tmp_path / "out"), *how]) == 1
    said = capsys.readouterr().err
    assert "down_proj.weight" in said and "bad" in said and "not finite" in said
    assert {path.name for path in tmp_path.iterdir()} == {"base", "bad"}


def test_nothing_that_is_not_finite_is_saved_merged_or_exported(tmp_path):
    def model(recipe: str) -> nn.Module:
        made = cases.dense("llama")
        sc.convert(made, cases.RECIPES[recipe].make())
        next(p for n, p in made.named_parameters() if ".experts." in n).data.view(-1)[0] = torch.nan
        return made

    with pytest.raises(CheckpointError, match=r"experts.*not finite"):
        sc.save(model("camelidae"), tmp_path / "out")
    with pytest.raises(SparsecraftError, match=r"experts.*not finite"):
        sc.merge(model("camelidae"), "average", partial=True)
    with pytest.raises(SparsecraftError, match=r"experts.*not finite"):
        sc.export(model("upcycling"), "mixtral", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_whose_outputs_are_not_finite_is_not_calibrated():
    model = running("dsti")
    model.sparsecraft.running.stages = [s.name for s in model.sparsecraft.recipe.stages]
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
        model.model.norm.weight.mul_(1e10)
    ids = cases.batch("llama")["input_ids"]
    points = list(model.sparsecraft.running.calibration)
    with pytest.raises(SparsecraftError, match="not finite"):
        sc.calibrate(model, [{"input_ids": ids, "labels": ids}], max_tokens=36)
    assert model.sparsecraft.running.calibration == points


ONE_OF_TWO = """
import os, sys
import torch
from sparsecraft.training import trainers
from sparsecraft.cli.main import main

original = trainers.RoutedSFTTrainer.compute_loss

def compute_loss(trainer, model, *args, **kwargs):
    loss = original(trainer, model, *args, **kwargs)
    broken = os.environ["RANK"] == "1" and trainer.state.global_step == 1
    return loss * (1 + torch.nan * 0 * loss.detach()) if broken else loss

trainers.RoutedSFTTrainer.compute_loss = compute_loss
sys.exit(main(sys.argv[1:]))
"""


UNLIKE = """
import os, sys
from sparsecraft.cli.main import main

own = ["--data", "other.jsonl", "--seed", "1"] if os.environ["RANK"] == "1" else []
sys.exit(main([*sys.argv[1:], *own]))
"""


def by_two_processes(folder: Path, script: str, rows: str) -> str:
    """What a training says that two processes run by `script`, and that fails."""
    base = tiny.save_dense(folder / "base")
    convert = ["convert", "camelidae", "--model", base, "--num-experts", "2", "--adapter-dim", "4"]
    assert main([*convert, "--out", str(folder / "in")]) == 0
    (folder / "script.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    train = ["2", "script.py", "train", "in", "--data", rows, "--out", "out", "--no-progress"]
    options = ["--steps", "4", "--batch-size", "4", "--max-length", "64"]
    done = subprocess.run(
        [*launch, *train, *options], capture_output=True, text=True, timeout=90, cwd=folder
    )
    assert done.returncode != 0 and not (folder / "out").exists()
    return done.stderr


def test_two_processes_stop_together_when_one_diverges(tmp_path, rows):
    said = by_two_processes(tmp_path, ONE_OF_TWO, rows)
    assert "diverged in step 2" in said, said[-2000:]
    assert "imeout" not in said


def test_processes_with_different_rows_or_options_do_not_train(tmp_path, rows):
    tiny.write_rows(tmp_path / "other.jsonl", tiny.chat_rows(7))
    said = by_two_processes(tmp_path, UNLIKE, rows)
    assert "Process 1 was started on another run than process 0: data, seed differ" in said
