"""A base that is written over, cut short or exchanged under a live model."""

from __future__ import annotations

import os
import shutil
import struct

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft import hub
from sparsecraft.errors import CheckpointError
from tests import tiny

TOKENS = torch.tensor([[5, 17, 200, 33, 8, 2]])


def overwrite(path) -> None:
    """Other numbers in the same file, as `cp` and rsync --inplace write them."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + length)
        file.write(bytes(path.stat().st_size - 8 - length))


def weights(base) -> list[str]:
    return sorted(p.name for p in base.iterdir() if p.suffix in (".safetensors", ".bin"))


@pytest.fixture(params=["safetensors", "shards", "bin"])
def base(request, tmp_path):
    folder = tmp_path / "base"
    tiny.save_dense(folder)
    if request.param == "shards":
        tiny.llama().save_pretrained(folder, max_shard_size="40KB")
    if request.param == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(tiny.llama().state_dict(), folder / "pytorch_model.bin")
    return folder


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def converted(base):
    model = hub.load_dense(str(base))
    sc.convert(model, sc.recipes.molora(num_experts=2, rank=2), certify=False)
    return model


@pytest.mark.parametrize("spoil", ["overwrite", "truncate"])
def test_a_live_model_does_not_change_with_its_files(base, tmp_path, spoil):
    dense, moe = hub.load_dense(str(base)), converted(base)
    sc.save(moe, tmp_path / "moe")
    alone = converted(base)
    sc.save(alone, tmp_path / "alone", standalone=True)
    models = [dense, moe, sc.load(tmp_path / "moe"), sc.load(tmp_path / "alone")]
    before = [logits(model) for model in models]
    for folder in (base, tmp_path / "moe", tmp_path / "alone"):
        for name in weights(folder):
            if spoil == "truncate":
                os.truncate(folder / name, 10)
            elif name.endswith("safetensors"):
                overwrite(folder / name)
            else:
                (folder / name).write_bytes(bytes((folder / name).stat().st_size))
    assert all(torch.equal(logits(m), b) for m, b in zip(models, before, strict=True))


def test_who_asks_for_mapped_files_gets_them(tmp_path):
    base = tmp_path / "base"
    tiny.save_dense(base)
    model = hub.load_dense(str(base), disable_mmap=False)
    before = logits(model)
    overwrite(base / "model.safetensors")
    assert not torch.equal(logits(model), before)


def test_a_save_compares_the_base_again(tmp_path):
    base = tmp_path / "base"
    tiny.save_dense(base)
    shutil.copytree(base, tmp_path / "copy")
    model = converted(base)
    sc.save(model, tmp_path / "before")
    loaded = sc.load(tmp_path / "before")
    overwrite(base / "model.safetensors")
    for live in (model, loaded):
        with pytest.raises(CheckpointError, match="has changed since"):
            sc.save(live, tmp_path / "after")
    assert not (tmp_path / "after").exists()
    sc.save(model, tmp_path / "alone", standalone=True)
    assert torch.equal(logits(sc.load(tmp_path / "alone")), logits(model))
    shutil.copy(tmp_path / "copy" / "model.safetensors", base)  # the same bytes, written anew
    sc.save(model, tmp_path / "after")
    assert torch.equal(logits(sc.load(tmp_path / "after")), logits(model))


def test_a_model_that_was_edited_before_its_conversion_is_saved(tmp_path):
    base = tmp_path / "base"
    tiny.save_dense(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    sc.convert(model, sc.recipes.molora(num_experts=2, rank=2), certify=False)
    sc.save(model, tmp_path / "out")
    assert torch.equal(logits(sc.load(tmp_path / "out")), logits(model))
