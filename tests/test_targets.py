"""Export: plain transformers reads it and gives our logits; what has no exact form is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

import cases
import sparsecraft as sc
import tiny
from sparsecraft.errors import CheckpointError, ExportError
from sparsecraft.targets import TARGETS


def upcycled(dense, **changes):
    sc.convert(dense, sc.recipes.upcycling(**{"num_experts": 4, "top_k": 2, **changes}))
    dense.train().eval()  # copies get memory of their own
    cases.randomize_new(dense, std=0.05)
    return dense


def llama():
    config = transformers.LlamaConfig(**cases.LLAMA_LIKE, tie_word_embeddings=True)
    torch.manual_seed(2)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_mixtral_loads_without_sparsecraft_and_gives_our_logits(tmp_path, family):
    model = upcycled(llama() if family == "llama" else cases.dense("mistral"))
    record = sc.export(model, "mixtral", tmp_path / "out")
    ids = torch.arange(3, 43).view(2, 20)
    torch.save(ids, tmp_path / "ids.pt")
    script = (
        "import torch, sys, transformers\n"
        "ids = torch.load(sys.argv[2])\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert type(model).__name__ == 'MixtralForCausalLM' and 'sparsecraft' not in sys.modules\n"
        "torch.save(model(ids).logits, sys.argv[2])\n"
    )
    arguments = [str(tmp_path / "out"), str(tmp_path / "ids.pt")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, env=os.environ)
    theirs, ours = torch.load(tmp_path / "ids.pt"), model(ids).logits
    assert (theirs - ours).abs().max() <= 1e-4 * ours.abs().max()
    assert record["difference"] <= 1e-5
    # The names that vLLM and llama.cpp read.
    names = tensor_names(tmp_path / "out")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names


def tensor_names(folder) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_the_weight_map_is_reversible():
    model = upcycled(llama())
    target = TARGETS["mixtral"]
    ours = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    back = target.from_target(target.to_target(model))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_temperature_is_folded_into_the_router(tmp_path):
    model = llama()
    recipe = sc.override(sc.recipes.upcycling(num_experts=4), {"router.temperature": 0.5})
    sc.convert(model, recipe)
    model.train().eval()
    cases.randomize_new(model, std=0.1)
    record = sc.export(model, "mixtral", tmp_path / "out")
    assert record["difference"] <= 1e-5


def test_what_has_no_exact_form_is_refused_with_the_reason(tmp_path):
    def refused(model, recipe, reason):
        sc.convert(model, recipe)
        with pytest.raises(ExportError, match=reason):
            sc.export(model, "mixtral", tmp_path / "out")
        sc.revert(model)

    raw = sc.recipes.upcycling(num_experts=4, renormalize=False)
    refused(llama(), sc.recipes.camelidae(num_experts=4, adapter_dim=16), "full feed-forward")
    refused(llama(), raw, "sum to one")
    refused(llama(), sc.recipes.upcycling(num_experts=4, paths="*.0.mlp"), "1 of 2 layers")
    refused(cases.dense("qwen2"), sc.recipes.upcycling(num_experts=4), "qwen2")
    refused(cases.dense("llama"), sc.recipes.upcycling(num_experts=4), "attention_bias")
    with pytest.raises(ExportError, match="Known: mixtral"):
        sc.export(llama(), "mixtrl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_differs_is_not_kept(tmp_path, monkeypatch):
    model = upcycled(llama())
    target = TARGETS["mixtral"]
    right = target.to_target

    def wrong(model):
        tensors = right(model)
        tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.mlp.gate.weight"].flip(
            0
        )
        return tensors

    monkeypatch.setattr(type(target), "to_target", lambda self, model: wrong(model))
    with pytest.raises(ExportError, match="differs from ours"):
        sc.export(model, "mixtral", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_folders_are_kept_and_companions_travel(tmp_path):
    base = tiny.save_dense(tmp_path / "dense")
    model = upcycled(transformers.AutoModelForCausalLM.from_pretrained(base))
    sc.export(model, "mixtral", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "sparsecraft_export.json").read_text())["target"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny.CHATML
    with pytest.raises(CheckpointError, match="exists already"):
        sc.export(model, "mixtral", tmp_path / "out")
    sc.export(model, "mixtral", tmp_path / "out", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="left alone"):
        sc.export(model, "mixtral", tmp_path / "mine", overwrite=True)


def test_peft_refuses_a_base_that_a_merge_has_changed(tmp_path):
    model = cases.dense("llama")
    sc.convert(model, sc.recipes.camelidae(4, 2, 8, lora_rank=2))
    cases.randomize_new(model)
    sc.merge(model, partial=True)
    with pytest.raises(ExportError, match="a merge changed its dense weights"):
        sc.export(model, "peft", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("target", ["mixtral", "peft"])
def test_split_networks_are_merged_and_not_exported(tmp_path, target):
    for recipe in (
        sc.recipes.moefication(4, partition="random"),
        sc.recipes.d2dmoe(4, attention_experts=2),
        sc.recipes.cmoe(4, 1, shared=1, variant="finetuned"),
    ):
        model = llama()
        sc.convert(model, recipe, certify=False)
        with pytest.raises(ExportError, match=r"sc\.merge\(model\) makes it a dense model again"):
            sc.export(model, target, tmp_path / "out")
        assert not (tmp_path / "out").exists()
