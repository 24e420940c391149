"""What commit 1d32273 wrote in format 1 is read as it was meant: see make_format1.py.

`format1` is never written to; a test that writes has a copy.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import sparsecraft as sc
from sparsecraft.conversion.stream import convert_files
from sparsecraft.recipe.formats import from_json
from sparsecraft.recipe.stages import Stage
from sparsecraft.training.trainers import RoutedTrainerMixin
from tests.cases import RECIPES, dense
from tests.golden.recipe_names import recipe_of

FORMAT1 = Path(__file__).resolve().parent / "format1"
# Of the largest logit. In float32 processors round otherwise, one was 1.3e-5 away; in float64 only
# the rounding of what was written is left.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-5}


def read(name: str):
    return json.loads((FORMAT1 / name).read_text())


EXPRESSIONS, CHECKPOINTS, PEFT = (read(f"{n}.json") for n in ("recipes", "checkpoints", "peft"))
KEYS = read("state_dict_keys.json")
ON_BASE = [name for name, base in CHECKPOINTS.items() if base]

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")


def assert_says(model: torch.nn.Module, name: str) -> None:
    """The model gives the logits that it gave."""
    inputs = load_file(FORMAT1 / "expected" / f"{name}.safetensors")
    wanted = inputs.pop("logits")
    scale = max(1.0, wanted.abs().max().item())
    for dtype, tolerance in TOLERANCES.items():
        with torch.no_grad():
            logits = copy.deepcopy(model).to(dtype).eval()(**inputs).logits
        assert logits.shape == wanted.shape
        assert (logits - wanted).abs().max() <= tolerance * scale


def base_of(name: str | None) -> str | None:
    return name and str(FORMAT1 / "base" / name)


def loaded(name: str, **options) -> torch.nn.Module:
    return sc.load(FORMAT1 / "checkpoints" / name, base=base_of(CHECKPOINTS[name]), **options)


# ------------------------------------------------------------------------------------------ recipes


# What recipes say since then that they did not say, path -> its value in the old file.
SAID_SINCE = {"mixlora": {"stages.0.epochs": None}, "moefication": {"stages.0.epochs": None}}
for _name in ("bam", "btx", "drop_upcycling", "nexus", "virtual_groups"):
    SAID_SINCE[_name] = {"stages.0.ends_at": 0.0}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_recipe_reads_as_what_its_function_gives(name):
    written, made = from_json(read(f"recipes/{name}.json")), recipe_of(name, EXPRESSIONS[name])
    if isinstance(made.stages[0], Stage):
        made = sc.override(made, SAID_SINCE.get(made.name, {}))
    assert written == made


def test_every_recipe_has_been_written():
    files = {path.stem for path in (FORMAT1 / "recipes").glob("*.json")}
    assert files == set(EXPRESSIONS)
    assert {name.removeprefix("case__") for name in files if name.startswith("case__")} == set(KEYS)


@pytest.mark.parametrize("name", KEYS)
def test_a_converted_model_has_the_same_tensors(name):
    model = dense("llama")
    sc.convert(model, RECIPES[name].make(), certify=False)
    found = {
        key: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
        for key, t in model.state_dict().items()
        if not key.endswith("_extra_state")  # how split networks run came after this format
    }
    assert found == KEYS[name]


# -------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_gives_its_logits(name):
    model = loaded(name)
    half = name.endswith("bfloat16")
    assert model.dtype == (torch.bfloat16 if half else torch.float32)
    # Products of halves round as the machine does; those of floats differ by less than 1e-5.
    assert_says(loaded(name, dtype="float32") if half else model, name)


@pytest.mark.parametrize("name", ON_BASE)
def test_a_checkpoint_finds_the_base_that_it_names(name, monkeypatch):
    monkeypatch.chdir(FORMAT1)  # the manifest says base/llama
    assert_says(sc.load(f"checkpoints/{name}"), name)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_saved_and_read_again(name, tmp_path):
    sc.save(loaded(name), tmp_path / "again")
    assert_says(sc.load(tmp_path / "again", dtype="float32"), name)


def test_budgets_and_calibrations_are_those_that_were_saved():
    known = {
        "moefication_budget": (0.75, []),
        "gmoefication_own_rule": (None, []),
        "lte_calibrated": (0.4, [(0.25, 0.75), (0.5, 0.625), (1.0, 0.0)]),
        "d2dmoe_trained": (0.5, [(0.25, 0.75), (0.5, 0.625), (1.0, 0.0)]),
    }
    for name, wanted in known.items():
        running = loaded(name).sparsecraft.running
        assert (running.budget, running.calibration) == wanted


# ------------------------------------------------------------------------------------- PEFT folders


@pytest.mark.parametrize("name", PEFT)
def test_peft_reads_an_adapter(name):
    model = sc.hub.load_dense(base_of(PEFT[name]))
    assert_says(PeftModel.from_pretrained(model, FORMAT1 / "peft" / name), f"peft_{name}")


@pytest.mark.parametrize("name", PEFT)
def test_an_adapter_is_read_as_a_converted_model(name, monkeypatch):
    folder = FORMAT1 / "peft" / name
    assert_says(sc.load(folder, base=base_of(PEFT[name])), f"peft_{name}")
    monkeypatch.chdir(FORMAT1)
    assert_says(sc.load(folder), f"peft_{name}")


# -------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("kind", ["training", "training_dealt"])
def test_an_interrupted_training_goes_on(tmp_path, kind, monkeypatch):
    now = RoutedTrainerMixin._auxiliary

    def as_then(self, model, routings, masks, share):
        """The balance loss of every micro-batch weighed alike, whatever its share of the items."""
        found = now(self, model, routings, masks, share)
        # Before the first step, passes are measured.
        return found / (share * getattr(self, "current_gradient_accumulation_steps", 1))

    monkeypatch.setattr(RoutedTrainerMixin, "_auxiliary", as_then)
    folder = shutil.copytree(FORMAT1 / kind, tmp_path / kind)
    options = json.loads((folder / "options.json").read_text())
    rows = str(FORMAT1 / "rows.jsonl")
    report = sc.train(folder / "start", rows, folder / "out", resume=True, **options)
    assert report.steps == options["steps"]
    assert not (folder / "out.training").exists()
    assert_says(sc.load(folder / "out"), kind)


def test_an_interrupted_stream_goes_on(tmp_path):
    folder = shutil.copytree(FORMAT1 / "stream", tmp_path / "stream")
    base = shutil.copytree(FORMAT1 / "base" / "llama", tmp_path / "base")
    left = folder / ".out.partial"
    progress = json.loads((left / "progress.json").read_text())
    # Git keeps no times, and the versions of other packages are not what is tested.
    for name, (_, changed) in progress["task"]["base"].items():
        os.utime(base / name, ns=(changed, changed))
    versions = {"sparsecraft": sc.__version__, "torch": str(torch.__version__)}
    progress["task"]["versions"] |= versions
    (left / "progress.json").write_text(json.dumps(progress))
    kept = {file: (left / file).stat().st_ino for file in progress["finished"]}
    assert len(kept) == 3

    recipe = from_json(json.loads((folder / "recipe.json").read_text()))
    options = json.loads((folder / "options.json").read_text())
    convert_files(str(base), recipe, folder / "out", resume=True, **options)
    assert {file: (folder / "out" / file).stat().st_ino for file in kept} == kept
    assert not left.exists()
    assert_says(sc.load(folder / "out"), "stream")
