"""Every door that hands a converted model to its user lets save_pretrained write our checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import sparsecraft as sc
from sparsecraft.checkpoint import resumable
from sparsecraft.checkpoint.load import load_any
from sparsecraft.errors import SparsecraftError
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


def test_an_adapter_takes_a_type_and_a_tokenizer_of_its_own_or_its_bases(tmp_path):
    loaded_adapter(tmp_path)
    cast = sc.load(tmp_path / "adapter", dtype="bfloat16")
    assert {parameter.dtype for parameter in cast.parameters()} == {torch.bfloat16}
    own = tiny.tokenizer()
    for path in (tmp_path / "adapter").glob("tokenizer*"):
        path.unlink()
    (tmp_path / "adapter" / "sparsecraft_export.json").unlink()  # as PEFT writes it
    own.save_pretrained(tmp_path / "dense")
    assert len(load_any(str(tmp_path / "adapter"))[1]) == len(own)
    own.add_tokens(["<more>"])
    own.save_pretrained(tmp_path / "adapter")
    assert len(load_any(str(tmp_path / "adapter"))[1]) == len(own)


def test_an_adapter_on_a_base_without_weights_is_refused(tmp_path):
    loaded_adapter(tmp_path)
    (tmp_path / "adapter" / "sparsecraft_export.json").unlink()  # as PEFT writes it
    for path in (tmp_path / "dense").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(SparsecraftError, match="holds no weights"):
        sc.load(tmp_path / "adapter")


def test_the_arguments_of_save_pretrained_are_meant_or_refused(tmp_path):
    model, out = converted(), tmp_path / "out"
    with pytest.raises(SparsecraftError, match="does not take push_to_hub, variant;"):
        model.save_pretrained(out, variant="fp16", push_to_hub=True, token="t")
    model.save_pretrained(out, is_main_process=False)
    assert not out.exists()
    asked = {"push_to_hub": False, "variant": None, "token": "t", "safe_serialization": True}
    model.save_pretrained(out, max_shard_size="16KB", **asked, standalone=True)
    data = json.loads((out / resumable.INDEX).read_text())
    files = set(data["weight_map"].values())
    found = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
    assert len(files) > 1 and found.keys() == data["weight_map"].keys()
    assert data["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert all(name in load_file(out / file) for name, file in data["weight_map"].items())


def test_what_the_user_put_beside_stays_unless_it_is_given(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("mine")
    (tmp_path / "out" / "generation_config.json").write_text("{}")
    converted().save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "mine"
    assert (tmp_path / "out" / "generation_config.json").read_text() != "{}"
    converted().save_pretrained(tmp_path / "out", tokenizer=tiny.tokenizer())
    assert (tmp_path / "out" / "tokenizer.json").read_text() != "mine"
