"""LoRAs as experts: what PEFT merges, tensor by tensor."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.conversion.sources.source import open_source
from sparsecraft.errors import SourceError
from sparsecraft.moe.names import unique_tensors
from tests import cases, tiny

FFN = ["gate_proj", "up_proj", "down_proj"]
LORAS = {
    "plain": {"target_modules": FFN},
    "all": {"target_modules": "all-linear"},
    "rslora": {"target_modules": FFN, "use_rslora": True},
    "patterns": {
        "target_modules": FFN,
        "alpha_pattern": {r"layers\.0\.mlp\.up_proj": 3},
        "rank_pattern": {"down_proj": 2},
    },
    "saved": {"target_modules": FFN, "modules_to_save": ["norm"]},
}


def adapter(base: str, folder, seed: int = 0, kind=peft.LoraConfig, **options) -> str:
    """A random adapter on a saved base, as PEFT writes it."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, kind(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
            assert "lora_A" not in name or parameter.requires_grad
    model.save_pretrained(folder)
    return str(folder)


def merged(base: str, folder: str) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, folder).merge_and_unload().eval()


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_is_the_dense_model_that_peft_merges(name, tmp_path):
    base = tiny.save_dense(tmp_path / "base")
    folder = adapter(base, tmp_path / "lora", r=4, lora_alpha=8, **LORAS[name])
    model = sc.hub.load_dense(base)
    source, wanted = open_source(model, folder), merged(base, folder)
    changed = 0
    for key, tensor in unique_tensors(wanted).items():
        torch.testing.assert_close(source.tensor(key), tensor, rtol=1e-6, atol=1e-6)
        changed += not torch.equal(tensor, model.get_parameter(key))
    assert changed == {"all": 14, "saved": 6 + 5}.get(name, 6)


def test_transposed_weights_are_merged_too(tmp_path):
    cases.dense("gpt2").save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    options = {"target_modules": ["c_fc", "mlp.c_proj"], "fan_in_fan_out": True}
    folder = adapter(base, tmp_path / "lora", **options)
    source, wanted = open_source(sc.hub.load_dense(base), folder), merged(base, folder)
    for key, tensor in unique_tensors(wanted).items():
        torch.testing.assert_close(source.tensor(key), tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("streamed", [False, True])
def test_experts_come_from_loras_and_dense_models_together(streamed, tmp_path):
    base = tiny.save_dense(tmp_path / "base")
    loras = [adapter(base, tmp_path / f"{i}", i, target_modules=FFN) for i in range(2)]
    for i, folder in enumerate(loras):
        merged(base, folder).save_pretrained(tmp_path / f"merged{i}")
    dense = [str(tmp_path / f"merged{i}") for i in range(2)]
    recipe = sc.recipes.btx(num_experts=3)
    states = []
    for given in ([base, *loras], [base, *dense]):
        if streamed:
            from sparsecraft.conversion.stream import convert_files

            out = tmp_path / f"out{len(states)}"
            convert_files(base, recipe, out, sources=given)
            model = sc.load(out)
        else:
            model = sc.hub.load_dense(base)
            report = sc.convert(model, recipe, sources=given)
            assert report.sources == tuple(given)
        states.append(model.state_dict())
    for key, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][key], rtol=1e-6, atol=1e-6)


def test_what_is_no_lora_of_the_base_is_refused(tmp_path):
    base = tiny.save_dense(tmp_path / "base")

    def refused(match, folder, **options):
        path = adapter(base, tmp_path / folder, **options)
        with pytest.raises(SourceError, match=match):
            open_source(sc.hub.load_dense(base), path)

    refused("lora_magnitude_vector.*no LoRA of", "dora", target_modules=FFN, use_dora=True)
    refused("'pissa', which changes", "pissa", target_modules=FFN, init_lora_weights="pissa")
    refused("embed_tokens.*no LoRA of", "embedding", target_modules=["embed_tokens"])
    refused(
        "of type 'IA3'", "ia3", kind=peft.IA3Config,
        target_modules=FFN, feedforward_modules=FFN,
    )  # fmt: skip
    wide = tiny.save_dense(tmp_path / "wide", width=64)
    other = adapter(wide, tmp_path / "other", target_modules=FFN)
    with pytest.raises(SourceError, match="head_dim=16 and the base 8"):
        sc.convert(sc.hub.load_dense(base), sc.recipes.btx(2), sources=[base, other])
