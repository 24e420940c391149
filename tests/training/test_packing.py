"""Documents of a pack: kept apart where the model can, and not packed where it cannot."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers

import sparsecraft as sc
from sparsecraft.training.packing import leak
from tests import cases, tiny

FAST = {"steps": 2, "batch_size": 4, "micro_batch": 2, "max_length": 48, "progress": False}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
SMALL = SHAPE | {"intermediate_size": 48}
GROUPED = SMALL | {"num_key_value_heads": 2}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
APART = {
    "Llama": GROUPED,
    "Mistral": GROUPED | {"sliding_window": 8},
    "Mixtral": GROUPED | {"num_local_experts": 2},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}
LEAKING = {
    "OPT": SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bert": SMALL | {"is_decoder": True},
    "Roberta": SMALL | {"is_decoder": True},
    "Qwen3_5Text": GROUPED | LINEAR | {"head_dim": 8},
    "Qwen3Next": GROUPED | LINEAR | {"head_dim": 8, "mlp_only_layers": [0, 1]},
    "RecurrentGemma": SMALL | {"lru_width": 32, "attention_window_size": 16},
    "Jamba": GROUPED | {"num_experts": 1, "num_experts_per_tok": 1, "mamba_d_state": 8},
    "Bamba": GROUPED | MAMBA | {"attn_layer_indices": [1]},
    "FalconH1": GROUPED | MAMBA | {"mamba_d_ssm": 64, "head_dim": 8},
    "Lfm2": GROUPED | {"layer_types": ["conv", "full_attention"]},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "XGLM": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
}


def build(family: str, **fields) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tiny.tokenizer()), **fields)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", APART)
def test_attention_by_positions_keeps_documents_apart(family):
    assert leak(build(family, **APART[family]), tiny.tokenizer(), 48, 2) is None


@pytest.mark.parametrize("family", LEAKING)
def test_a_family_that_lets_documents_see_each_other_is_found(family):
    found = leak(build(family, **LEAKING[family]), tiny.tokenizer(), 48, 1)
    assert found == "the documents of a pack see each other"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_probe_holds_in_half_precision(dtype):
    model = build("Llama", **APART["Llama"]).to(dtype)
    sc.convert(model, sc.recipes.upcycling(num_experts=4))
    assert leak(model, tiny.tokenizer(), 48, 2) is None
    assert leak(build("OPT", **LEAKING["OPT"]).to(dtype), tiny.tokenizer(), 48, 2)


class Counting(torch.nn.Module):
    """Positions counted from the row's beginning, whatever it was told."""

    def __init__(self, rotary):
        super().__init__()
        self.rotary = rotary

    def forward(self, x, position_ids):
        return self.rotary(x, torch.arange(position_ids.shape[1]).expand_as(position_ids))


class OneRow(torch.nn.Module):
    """A network that mixes neighbors, where a batch has several rows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + x.roll(1, dims=1) * (len(x) == 2))


def test_wrong_positions_and_leaks_of_some_batches_are_found():
    model = build("Llama", **APART["Llama"])
    rotary = model.model.rotary_emb
    model.model.rotary_emb = Counting(rotary)
    assert leak(model, tiny.tokenizer(), 48, 1) is None  # RoPE is relative: nothing changes
    model = build("GPT2", **APART["GPT2"])
    table = model.transformer.wpe
    table.register_forward_hook(lambda _, args, out: table.weight[: args[0].shape[1]][None])
    assert "positions" in leak(model, tiny.tokenizer(), 48, 1)
    model = build("Llama", **APART["Llama"])
    model.model.layers[0].mlp = OneRow(model.model.layers[0].mlp)
    assert leak(model, tiny.tokenizer(), 48, 1) is None
    assert leak(model, tiny.tokenizer(), 48, 2) == "the documents of a pack see each other"


def test_a_leak_beyond_the_first_block_is_found():
    """Windows longer than one block: states that are handed on from block to block alone."""
    model = build("Llama", **APART["Llama"])

    def hand_on(_, args, out):
        ends = torch.arange(0, out.shape[1], 64)[1:]
        out[:, ends] = out[:, ends] + out[:, ends - 64]
        return out

    model.model.layers[0].mlp.register_forward_hook(hand_on)
    assert leak(model, tiny.tokenizer(), 48, 1) is None  # no row of the run has two blocks
    assert leak(model, tiny.tokenizer(), 200, 1)


def test_the_probe_leaves_the_model_and_the_generators_as_they_were():
    model = build("Jamba", **LEAKING["Jamba"]).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    leak(model, tiny.tokenizer(), 48, 2)
    assert torch.equal(torch.rand(3), expected)
    assert modes == [module.training for module in model.modules()]
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("family", ["Llama", "OPT"])
def test_train_packs_only_where_documents_stay_apart(tmp_path, caplog, family):
    model = build(family, **(APART | LEAKING)[family])
    sc.convert(model, sc.recipes.camelidae(num_experts=2, adapter_dim=4))
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows(24))
    with caplog.at_level(logging.WARNING, "sparsecraft"):
        report = sc.train(
            model, rows, tmp_path / "out", tokenizer=tiny.tokenizer(), packing=True, **FAST
        )
    leaks = family == "OPT"
    said = [r.getMessage() for r in caplog.records if "not packed" in r.getMessage()]
    assert len(said) == leaks and all("OPTForCausalLM" in message for message in said)
    assert ("packs" in report.counts) == (not leaks)
    (stage,) = json.loads((tmp_path / "out" / "report.json").read_text())["training"]
    assert stage["settings"]["packing"] == (not leaks)
    assert ("see each other" in stage.get("unpacked", "")) == leaks


def test_a_router_by_sentence_is_probed_with_one():
    model = tiny.llama()
    sc.convert(model, sc.recipes.molora(num_experts=2, rank=2, router="sentence"))
    cases.randomize_new(model, std=1.0)
    assert leak(model, tiny.tokenizer(), 48, 2) is None
