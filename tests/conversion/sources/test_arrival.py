"""What of a source, of a merge, of a mixture arrived is counted; of a LoRA something must."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.cli.main import main
from sparsecraft.errors import MergeError, SourceError
from sparsecraft.evaluation.report import describe
from tests import tiny
from tests.cases import RECIPES, batch, dense, logits, moved, randomize_new


@pytest.fixture
def base(tmp_path) -> str:
    return tiny.save_dense(tmp_path / "base")


def lora(base: str, out, *targets: str) -> str:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(out)
    return str(out)


@pytest.mark.parametrize("how", [[], ["--stream"]])
def test_a_lora_of_which_nothing_arrives_is_an_error(base, how, tmp_path, capsys):
    """The experts are feed-forward networks, and all else stays the base's."""
    found = [lora(base, tmp_path / name, "q_proj", "v_proj") for name in ("one", "two")]
    words = ["convert", "btx", "--model", base, "--num-experts", "2", "--sources", *found]
    words += ["--set", "others=base", "--out", str(tmp_path / "out"), *how]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "Nothing of" in said and "self_attn.q_proj.weight" in said and "4 tensors" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [[], ["--stream"]])
def test_what_of_a_lora_does_not_arrive_is_named(base, how, tmp_path, capsys):
    found = [lora(base, tmp_path / name, "q_proj", "up_proj") for name in ("one", "two")]
    words = ["convert", "btx", "--model", base, "--num-experts", "2", "--sources", *found]
    words += ["--set", "others=base", "--out", str(tmp_path / "out"), *how]
    assert main(words) == 0
    line = f"of {found[0]}: 2 of 4 tensors were used; not used: "
    line += "model.layers.*.self_attn.q_proj.weight (2)."
    assert line in capsys.readouterr().out
    assert any(line in text for text in describe(tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())["conversion"]
    assert report["arrived"][found[0]] == {
        "tensors": 4,
        "used": 2,
        "unused": {"model.layers.*.self_attn.q_proj.weight": 2},
    }


def test_a_lora_that_stays_apart_arrives_whole(base, tmp_path):
    found = [lora(base, tmp_path / name, "q_proj", "v_proj") for name in ("one", "two")]
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    recipe = sc.recipes.molora(num_experts=2, rank=2, variant="tuned")
    report = sc.convert(model, recipe, sources=found)
    assert report.arrived == {name: {"tensors": 4, "used": 4, "unused": {}} for name in found}


def test_dense_models_count_all_of_their_weights():
    model = dense("llama")
    weights = len(list(model.named_parameters()))
    report = sc.convert(model, sc.recipes.btx(2), sources=[moved("llama", 1), moved("llama", 2)])
    (counted, *_) = report.arrived.values()
    assert counted == {"tensors": weights, "used": weights, "unused": {}}  # by their mean


def test_an_added_expert_says_what_was_taken_of_it():
    model = dense("llama")
    sc.convert(model, sc.recipes.upcycling(2))
    ids = batch("llama")["input_ids"]
    found = sc.extend(model, moved("llama", 1), [ids], [ids], mix=0.0)
    assert found.arrived["used"] == 6 * 2  # gate, up and down and their biases, of two layers
    assert "self_attn" in str(found) and "tensors were used" in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_of_which_nothing_is_left_by_rounding_is_an_error(dtype):
    model = dense("llama").to(dtype)
    sc.convert(model, RECIPES["lora"].make())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-6 if dtype == torch.float32 else 1e-20)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if dtype == torch.bfloat16:
        with pytest.raises(MergeError, match=r"Nothing of the experts arrives .*float32"):
            sc.merge(model)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        return
    found = sc.merge(model)
    assert found.arrived == {"tensors": 14, "used": 14, "unused": {}}
    assert "14 of 14 tensors were used" in str(found)


def test_a_resized_model_merges_into_the_size_that_it_has():
    model = dense("llama")
    sc.convert(model, RECIPES["lora"].make())
    randomize_new(model)
    model.resize_token_embeddings(120, mean_resizing=False)
    wanted = logits(model, batch("llama"))
    sc.merge(model)
    assert torch.allclose(logits(model, batch("llama")), wanted, atol=1e-4)
    assert model.config.vocab_size == len(model.model.embed_tokens.weight) == 120


def test_a_source_with_integers_for_weights_is_named(base, tmp_path):
    other = transformers.AutoModelForCausalLM.from_pretrained(base)
    weight = other.model.layers[0].mlp.up_proj.weight
    packed = torch.nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    other.model.layers[0].mlp.up_proj.weight = packed
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(SourceError, match=r"layers\.0\.mlp\.up_proj\.weight'.* int8"):
        sc.convert(model, sc.recipes.btx(2), sources=[base, other])
    assert not hasattr(model, "sparsecraft")
