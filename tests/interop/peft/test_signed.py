"""What PEFT and transformers write of our adapters is signed, and what they read is checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sparsecraft as sc
from sparsecraft.errors import CheckpointError
from tests import tiny
from tests.checkpoint.folders import IDS, edit


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return tiny.save_dense(tmp_path_factory.mktemp("base"))


def dense(base: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base)


def trained(base: str, **options) -> PeftModel:
    model = get_peft_model(dense(base), sc.MoloraConfig(num_experts=2, r=2, **options))
    move(model)
    return model


def move(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def flip(path: Path) -> None:
    """One bit of the last number."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DOORS = {
    "sc.load": lambda folder, base: sc.load(folder, base=base),
    "PeftModel": lambda folder, base: PeftModel.from_pretrained(dense(base), folder),
    "PeftModel by keyword": lambda folder, base: PeftModel.from_pretrained(
        model=dense(base), model_id=str(folder)
    ),
    "another adapter": lambda folder, base: trained(base).load_adapter(folder, "other"),
    "its own again": lambda folder, base: trained(base).load_adapter(folder, "default"),
    "AutoPeftModel": lambda folder, base: AutoPeftModelForCausalLM.from_pretrained(folder),
    "transformers": lambda folder, base: dense(base).load_adapter(str(folder)),
    "transformers by path": lambda folder, base: AutoModelForCausalLM.from_pretrained(folder),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_checks_what_peft_wrote(door, base, tmp_path):
    trained(base).save_pretrained(tmp_path / "adapter")
    DOORS[door](tmp_path / "adapter", base)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        folder = shutil.copytree(tmp_path / "adapter", tmp_path / name)
        if name.endswith(".json"):
            edit(folder / name, lambda data: data["recipe"].update(title="Another"))
        else:
            flip(folder / name)
        with pytest.raises(CheckpointError, match=f"{name} has changed"):
            DOORS[door](folder, base)


def test_a_configuration_that_is_no_json_is_one_sentence(base, tmp_path):
    trained(base).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    for door in ("PeftModel", "another adapter", "AutoPeftModel", "transformers"):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
            DOORS[door](tmp_path, base)


def test_each_save_is_signed_anew(base, tmp_path):
    """As Trainer saves into one folder after the other, and takes the best one back."""
    model = trained(base)
    model.save_pretrained(tmp_path)
    first = logits(model)
    move(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(dense(base), tmp_path)
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), first)
    assert PeftConfig.from_pretrained(tmp_path).files is None
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(sc.load(tmp_path / "again", base=base)), logits(model))
    move(again)
    again.load_adapter(tmp_path, "default")  # other tensors than its configuration was read with
    assert torch.equal(logits(again), logits(model))


def test_all_adapters_of_a_model_and_modules_that_train_whole_are_signed(base, tmp_path):
    model = trained(base, modules_to_save=["lm_head"])
    model.add_adapter("other", sc.MoloraConfig(num_experts=2, r=2))
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "other"):
        assert json.loads((folder / "adapter_config.json").read_text())["files"]
        PeftModel.from_pretrained(dense(base), folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        name = next((n for n in tensors if "lm_head" in n), next(iter(tensors)))
        tensors[name] = tensors[name] + 0.5
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors has changed"):
            PeftModel.from_pretrained(dense(base), folder)


def test_a_file_that_peft_would_prefer_is_named(base, tmp_path):
    model = trained(base)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(logits(PeftModel.from_pretrained(dense(base), tmp_path)), logits(model))
    trained(base).save_pretrained(tmp_path / "other")
    shutil.copyfile(
        tmp_path / "other" / "adapter_model.safetensors", tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is new"):
        PeftModel.from_pretrained(dense(base), tmp_path)


def test_what_transformers_saves_of_an_adapter_is_signed(base, tmp_path, monkeypatch):
    # Since 5.24 it asks for a PEFT that is not out.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    trained(base).save_pretrained(tmp_path / "adapter")
    model = dense(base)
    model.load_adapter(str(tmp_path / "adapter"))
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["files"]
    assert torch.equal(logits(sc.load(tmp_path / "again", base=base)), logits(model))
    flip(tmp_path / "again" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors has changed"):
        dense(base).load_adapter(str(tmp_path / "again"))


def test_an_adapter_from_the_hub_is_checked_where_the_cache_has_it(base, tmp_path, monkeypatch):
    trained(base).save_pretrained(tmp_path / "adapter")
    commit = tmp_path / "hub" / "models--user--moe" / "snapshots" / "0123"
    shutil.copytree(tmp_path / "adapter", commit)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("0123")
    where = {"cache_dir": str(tmp_path / "hub")}
    assert PeftModel.from_pretrained(dense(base), "user/moe", **where)
    flip(commit / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors has changed"):
        PeftModel.from_pretrained(dense(base), "user/moe", **where)


def test_adapters_of_peft_itself_are_left_alone(base, tmp_path):
    model = get_peft_model(dense(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert "files" not in json.loads((tmp_path / "adapter_config.json").read_text())
    flip(tmp_path / "adapter_model.safetensors")
    assert PeftModel.from_pretrained(dense(base), tmp_path)
