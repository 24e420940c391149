"""Every door that hands a converted model to its user lets save_pretrained write our checkpoint."""

from __future__ import annotations

import pytest
import torch

import sparsecraft as sc
from tests import tiny


def converted():
    model = tiny.llama()
    sc.convert(model, sc.recipes.upcycling(4, 2))
    return model


def loaded(folder):
    return sc.load(sc.save(converted(), folder / "saved", standalone=True))


def loaded_adapter(folder):
    base = tiny.save_dense(folder / "dense")
    model = sc.hub.load_dense(base)
    sc.convert(model, sc.recipes.mov(num_experts=3))
    sc.export(model, "peft", folder / "adapter")
    return sc.load(folder / "adapter", base=base)


def imported(folder):
    sc.export(converted(), "mixtral", folder / "mixtral", tokenizer=tiny.tokenizer())
    return sc.import_moe(folder / "mixtral")


def merged_in_part(folder):
    model = tiny.llama()
    sc.convert(model, sc.recipes.camelidae(num_experts=2, top_k=2, adapter_dim=8, lora_rank=2))
    sc.merge(model, "average")
    return model


DOORS = {
    "convert": lambda folder: converted(),
    "load": loaded,
    "load of a PEFT folder": loaded_adapter,
    "import_moe": imported,
    "merge to one adapter": merged_in_part,
}


@pytest.mark.parametrize("door", DOORS)
def test_save_pretrained_writes_our_checkpoint(door, tmp_path):
    model = DOORS[door](tmp_path)
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "recipe.json").is_file(), "a plain folder of transformers"
    again = sc.load(tmp_path / "out")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_a_reverted_model_saves_as_transformers_does(tmp_path):
    model = converted()
    sc.revert(model)
    model.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense" / "recipe.json").exists()
    assert (tmp_path / "dense" / "model.safetensors").is_file()
