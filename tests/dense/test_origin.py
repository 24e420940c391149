"""The base of a checkpoint has the name that others know it by: hub id and commit, or its path."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants

import sparsecraft as sc
from sparsecraft.checkpoint.jsonfile import json_digest
from sparsecraft.checkpoint.load import load_any
from sparsecraft.conversion.stream import convert_files
from sparsecraft.dense import hub
from sparsecraft.errors import CheckpointError
from tests import tiny

IDS = torch.arange(3, 43)[None]
ID, A, B, C = "org/m", "a" * 40, "b" * 40, "c" * 40
ADAPTERS = sc.recipes.camelidae(num_experts=2, adapter_dim=4, lora_rank=2)
COPIES = sc.recipes.upcycling(num_experts=2)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def write_model(folder: Path, seed: int, template: str = tiny.CHATML) -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")


def write_cache(root: Path) -> Path:
    """A hub cache with three commits: main is at A, the branch v1 at B; C has A's weights and a
    model of its own in a subfolder."""
    repository = root / "models--org--m"
    for commit, seed in ((A, 0), (B, 1), (C, 0)):
        write_model(repository / "snapshots" / commit, seed, f"{tiny.CHATML}{{# {commit[0]} #}}")
    write_model(repository / "snapshots" / C / "inner", 3)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(A)
    (repository / "refs" / "v1").write_text(B)
    return repository


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return write_cache(tmp_path / "cache")


def by_transformers(revision, **kwargs):
    revision = revision or "main"
    return transformers.AutoModelForCausalLM.from_pretrained(ID, revision=revision, **kwargs)


def by_us(revision, **kwargs):
    return hub.load_dense(ID, revision=revision, **kwargs)


def manifest(folder: Path) -> dict:
    return json.loads((folder / "recipe.json").read_text())


def edit_base(folder: Path, **fields) -> None:
    """As an older version wrote it."""
    data = manifest(folder)
    data["base"] |= fields
    data.pop("digest")
    (folder / "recipe.json").write_text(json.dumps({**data, "digest": json_digest(data)}))


def test_a_dense_model_by_its_id_comes_with_its_tokenizer(cache):
    model, tokenizer = load_any(ID)
    assert torch.equal(logits(model), logits(by_us(None)))
    assert f"# {A[0]} #" in tokenizer.chat_template


def saved(model, out: Path, recipe=ADAPTERS) -> Path:
    sc.convert(model, recipe)
    return sc.save(model, out)


@pytest.mark.parametrize("load", [by_transformers, by_us])
@pytest.mark.parametrize(("revision", "commit"), [(None, A), ("v1", B), (B, B)])
def test_id_and_commit_are_remembered(load, revision, commit, cache, tmp_path, monkeypatch):
    model = load(revision)
    out = saved(model, tmp_path / "out")
    base = manifest(out)["base"]
    assert (base["name"], base["revision"]) == (ID, commit)
    assert (out / "moe.safetensors").stat().st_size < 40_000  # nothing of the base
    card = (out / "README.md").read_text()
    assert f"base_model: {ID}\n" in card and f"{ID}, revision {commit}" in card
    wanted = logits(model)
    (cache / "refs" / "main").write_text(C if commit == B else B)  # main moves on
    assert torch.equal(logits(sc.load(out)), wanted)
    assert torch.equal(logits(sc.load(out, base=ID)), wanted)
    shutil.copytree(tmp_path / "cache", tmp_path / "elsewhere")  # another machine
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    loaded, tokenizer = load_any(str(out))
    assert torch.equal(logits(loaded), wanted) and f"# {commit[0]} #" in tokenizer.chat_template
    again = sc.save(loaded, tmp_path / "again")
    assert manifest(again)["base"] == base
    shutil.rmtree(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"'org/m' at {commit}.*base=FOLDER"):
        sc.load(out)


@pytest.mark.parametrize("load", [by_transformers, by_us])
def test_a_model_in_a_subfolder_is_found_again(load, cache, tmp_path):
    model = load(C, subfolder="inner")
    out = saved(model, tmp_path / "out")
    base = manifest(out)["base"]
    assert (base["name"], base["revision"], base["subfolder"]) == (ID, C, "inner")
    assert (out / "moe.safetensors").stat().st_size < 40_000
    assert torch.equal(logits(sc.load(out)), logits(model))
    local = str(cache / "snapshots" / C)
    model = transformers.AutoModelForCausalLM.from_pretrained(local, subfolder="inner")
    assert manifest(saved(model, tmp_path / "local"))["base"] == base


def test_another_cache(tmp_path):
    write_cache(tmp_path / "own")
    model = by_us("v1", cache_dir=tmp_path / "own")
    out = saved(model, tmp_path / "out")
    base = manifest(out)["base"]
    assert (base["name"], base["revision"]) == (ID, B)
    folder = tmp_path / "own" / "models--org--m" / "snapshots" / B
    assert torch.equal(logits(sc.load(out, base=str(folder))), logits(model))
    model = by_transformers("v1", cache_dir=tmp_path / "own")  # where, the model does not say
    out = saved(model, tmp_path / "whole")
    assert torch.equal(logits(sc.load(out)), logits(model))


def test_files_of_a_commit_that_moved_only_in_its_settings(cache, tmp_path):
    """A and C have the same weights: the commit that was named is the one that is taken."""
    out = saved(by_us(C), tmp_path / "out")
    assert manifest(out)["base"]["revision"] == C
    assert "# c #" in (out / "chat_template.jinja").read_text()


def test_a_stream_and_sources_have_names_too(cache, tmp_path):
    report = convert_files(ID, sc.recipes.btx(2), tmp_path / "out", sources=[ID, ID])
    base = manifest(tmp_path / "out")["base"]
    assert (base["name"], base["revision"]) == (ID, A)
    assert report.sources == (f"{ID} at {A}",) * 2
    model = by_us(None)
    assert sc.convert(model, sc.recipes.btx(2), sources=[ID, ID]).sources == report.sources


def test_a_lora_names_its_base_and_commit(cache, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["up_proj"], revision="v1")
    lora = peft.get_peft_model(by_transformers("v1"), settings)
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    lora.save_pretrained(tmp_path / "lora")
    model = by_us("v1")
    sc.convert(
        model, sc.override(sc.recipes.btx(2), {"others": "mean"}), sources=[tmp_path / "lora"] * 2
    )
    assert torch.allclose(logits(model), logits(lora.eval()), atol=1e-4)
    molora = sc.recipes.molora(2, rank=2)
    with pytest.raises(sc.SparsecraftError, match="trained on 'org/m'"):
        sc.convert(by_us(None), molora, sources=[tmp_path / "lora"] * 2)


def test_a_peft_folder_says_id_and_commit(cache, tmp_path):
    pytest.importorskip("peft")
    model = by_us("v1")
    sc.convert(model, sc.recipes.molora(2, rank=2))
    sc.export(model, "peft", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (ID, B)
    assert torch.equal(logits(sc.load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("given", ["relative", "home", "link", "slash", "user's own"])
def test_a_local_base_is_found_from_anywhere(given, tmp_path, monkeypatch):
    write_model(tmp_path / "home" / "base", 0)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    os.symlink(tmp_path / "home" / "base", tmp_path / "link")
    names = {
        "relative": "base",
        "home": "~/base",
        "link": str(tmp_path / "link"),
        "slash": "./base/",
    }
    if given in names:
        model = hub.load_dense(names[given])
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained("base/")
    out = saved(model, tmp_path / "out")
    convert_files(names.get(given, "base"), COPIES, tmp_path / "streamed")
    monkeypatch.chdir(tmp_path)
    assert (out / "moe.safetensors").stat().st_size < 40_000
    assert torch.equal(logits(sc.load(out)), logits(model))
    assert Path(manifest(tmp_path / "streamed")["base"]["name"]).is_absolute()


def test_checkpoints_from_before_commits_were_remembered(cache, tmp_path, monkeypatch):
    model = by_us(None)
    out = saved(model, tmp_path / "out")
    edit_base(out, revision=None)  # the id alone, and main moves on
    (cache / "refs" / "main").write_text(B)
    assert torch.equal(logits(sc.load(out)), logits(model))
    edit_base(out, name=f"/gone/hub/models--org--m/snapshots/{A}")  # a path of another machine
    loaded = sc.load(out)
    assert torch.equal(logits(loaded), logits(model))
    base = manifest(sc.save(loaded, tmp_path / "again"))["base"]
    assert (base["name"], base["revision"]) == (ID, A)
