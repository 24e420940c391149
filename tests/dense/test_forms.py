"""Families, as transformers builds them: their networks and projections, found and proven.

What experts make of a network is compared with the family's own module, in evaluation and, with
dropout on, in training.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

import sparsecraft as sc
from sparsecraft.dense.attentions import find_attentions, fused_rows, why_not
from sparsecraft.dense.donors import view
from sparsecraft.dense.networks import find_networks
from sparsecraft.dense.sites import FFNSpan, find_sites
from sparsecraft.errors import DonorError
from sparsecraft.moe.experts.ffn import FFNExperts
from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.recipe.experts import FFNSpec, SplitSpec

LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "head_dim": 4, "pad_token_id": 0,
}  # fmt: skip
BERT = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40,
}  # fmt: skip
GPT = {"vocab_size": 64, "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}
BART = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip

# Family -> its settings, with every dropout of its feed-forward networks on.
FAMILIES = {
    "GPTNeoX": BERT | {"hidden_dropout": 0.2},
    "GPTJ": GPT | {"rotary_dim": 4, "resid_pdrop": 0.2},
    "GPTBigCode": GPT | {"resid_pdrop": 0.2},
    "CodeGen": GPT | {"rotary_dim": 4, "resid_pdrop": 0.2},
    "Falcon": {**BERT, "ffn_hidden_size": 24, "hidden_dropout": 0.2},
    "Bloom": {
        "vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.2,
    },
    "Mpt": {"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2},
    "Starcoder2": LLAMA | {"residual_dropout": 0.2},
    "Nemotron": LLAMA,
    "Arcee": LLAMA,
    "Apertus": LLAMA,
    "Persimmon": BERT,
    "Glm": LLAMA,
    "SeedOss": LLAMA | {"residual_dropout": 0.2},
    "Lfm2": LLAMA | {"layer_types": ["conv", "full_attention"]},
    "ModernBert": BERT | {"mlp_dropout": 0.2, "pad_token_id": 0},
    "Esm": BERT | {"position_embedding_type": "rotary", "pad_token_id": 1},
    "DebertaV2": BERT,
    "Camembert": BERT,
    "MPNet": BERT,
    "Albert": BERT | {"embedding_size": 8},
    "DistilBert": {"vocab_size": 64, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4},
    "Bart": BART | {"activation_dropout": 0.3},
    "Whisper": BART | {"activation_dropout": 0.3, "num_mel_bins": 8},
    "OPT": {**BERT, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.2},
    "Dinov2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2},
    "Wav2Vec2": BERT | {
        "conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (8,), "num_feat_extract_layers": 1,
        "activation_dropout": 0.3, "num_conv_pos_embedding_groups": 2,
    },
}  # fmt: skip
NO_MODULE = ("Esm", "Lfm2")  # whose code calls a function


def built(name, **settings) -> nn.Module:
    """The family's model, with random biases and norms."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**(FAMILIES.get(name, LLAMA) | settings))
    model = getattr(transformers, f"{name}Model")(config)
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn_like(parameter)
    return model.eval()


def networks(model):
    """(donor, the dense module or its span) of every network."""
    return [
        (view(model, site), FFNSpan(model, site) if site.chain else model.get_submodule(site.path))
        for site in find_sites(model, "ffn")
    ]


def seeded(run, *arguments):
    torch.manual_seed(7)
    return run(*arguments)


def near(found, wanted):
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_are_the_familys_networks_with_dropout_and_without(name):
    donors = networks(built(name))
    assert len(donors) == {"Albert": 1, "Bart": 4, "Whisper": 4}.get(name, 2)
    for donor, dense in donors:
        whole = FFNExperts(FFNSpec(num_experts=1), donor)
        parts = SplitExperts(SplitSpec(num_experts=2), donor)
        x = torch.randn(2, 5, donor.width)
        for training in (False, True):
            for module in (dense, whole, parts):
                module.train(training)
            wanted = seeded(dense, x)
            assert near(seeded(whole.expert, 0, x), wanted)
            assert near(seeded(parts, x.flatten(0, 1)), wanted.flatten(0, 1))


@pytest.mark.parametrize("name", ["Bart", "Bloom", "Esm", "Apertus", "Lfm2"])
@pytest.mark.parametrize("recipe", ["camelidae", "upcycling", "mixlora", "mov"])
def test_a_converted_model_trains_with_the_dropouts_of_the_dense_one(name, recipe):
    """One expert that has not learned yet is the dense model, in training too."""
    model = built(name)
    ids = torch.randint(3, 60, (2, 7))
    wanted = seeded(model.train(), ids)[0]
    before = {path: vars(module).copy() for path, module in model.named_modules()}
    made = {
        "camelidae": lambda: sc.recipes.camelidae(
            num_experts=2, top_k=1, adapter_dim=4, dropout=0.0
        ),
        "upcycling": lambda: sc.recipes.upcycling(num_experts=1, top_k=1),
        "mixlora": lambda: sc.recipes.mixlora(num_experts=1, top_k=1, dropout=0.0),
        "mov": lambda: sc.recipes.mov(num_experts=2),
    }[recipe]()
    if (name, recipe) == ("Bloom", "mov"):  # keys and values head by head
        with pytest.raises(DonorError, match="not one block"):
            sc.convert(model, made)
    else:
        sc.convert(model, made)
        assert near(seeded(model.train(), ids)[0], wanted)
        sc.revert(model)
    assert torch.equal(seeded(model.train(), ids)[0], wanted)
    for path, module in model.named_modules():
        rates = {k: v for k, v in vars(module).items() if "drop" in k}
        assert rates == {k: v for k, v in before[path].items() if "drop" in k}


@pytest.mark.parametrize("name", NO_MODULE)
def test_an_activation_that_is_a_function_is_no_site_of_its_own(name):
    with pytest.raises(DonorError, match="calls its activation as a function"):
        find_sites(built(name), "activation")


REFUSED = {
    "multipliers": ("FalconH1", {"mlp_multipliers": [0.5, 2.0], "mamba_d_ssm": 16,
        "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 8, "mamba_n_groups": 1}),
    "one multiplier": ("FalconH1", {"mlp_multipliers": [1.0, 1.01], "mamba_d_ssm": 16,
        "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 8, "mamba_n_groups": 1}),
    "a norm inside": ("BitNet", {}),
}  # fmt: skip


@pytest.mark.parametrize("certify", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_a_network_of_another_form_is_refused_by_name(case, certify):
    name, settings = REFUSED[case]
    model = built(name, **settings)
    with pytest.raises(DonorError, match=rf"{name}MLP.*relative error"):
        sc.convert(model, sc.recipes.upcycling(4, 1, renormalize=False), certify=certify)
    assert not hasattr(model, "sparsecraft")


def test_multipliers_of_one_are_none():
    name, settings = REFUSED["multipliers"]
    assert len(find_sites(built(name, **settings | {"mlp_multipliers": [1.0, 1.0]}), "ffn")) == 2


def test_only_the_layers_of_another_form_are_refused():
    layers = {
        "num_hidden_layers": 2, "intermediate_size": [24] * 2, "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 4, "num_kv_shared_layers": 0, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.95, 0.0], "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    config = transformers.Gemma3nTextConfig(**LLAMA | layers)
    model = transformers.Gemma3nForCausalLM(config).eval()
    with pytest.raises(DonorError, match=r"1 of the 2 .*'model\.layers\.0\.mlp'.*paths="):
        sc.convert(model, sc.recipes.upcycling(2), certify=False)
    report = sc.convert(model, sc.recipes.upcycling(2, paths="*.1.mlp"))
    assert report.certificate.exact and list(report.layers) == ["model.layers.1.mlp"]


# --------------------------------------------------------------------------------------- attention

# Family -> whether keys and values can be told apart in it, or are one block of rows.
ATTENTIONS = {
    **dict.fromkeys(
        ("Falcon", "Mpt", "GPTBigCode", "Starcoder2", "GPTJ", "DebertaV2", "Albert"), 1
    ),
    **dict.fromkeys(("MPNet", "ModernBert", "DistilBert", "Bart", "Esm", "OPT", "Phi3", "GPT2"), 1),
    **dict.fromkeys(("GPTNeoX", "Bloom", "Persimmon"), 0),
}
SMALL = {"GPT2": GPT, "Phi3": LLAMA}
KINDS = ("query", "key", "value")


@pytest.mark.parametrize("name", ATTENTIONS)
def test_rows_are_queries_keys_and_values_or_are_refused(name):
    model = built(name, **SMALL.get(name, {}))
    reasons = [
        why_not(module, form, k) for _, module, form in find_attentions(model) for k in KINDS
    ]
    assert len(reasons) >= 3 and all(
        (reason is None) == bool(ATTENTIONS[name]) for reason in reasons
    )


def test_bigcodes_heads_one_after_the_other_are_no_block():
    model = built("GPTBigCode", multi_query=False)
    for kind in KINDS:
        with pytest.raises(DonorError, match=rf"2 {kind} sites.*GPTBigCodeAttention"):
            find_sites(model, kind)
    assert len(find_sites(built("GPTBigCode"), "key")) == 2


@pytest.mark.parametrize("name", ["GPT2", "Phi3", "Falcon", "Mpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_rows_of_a_fused_projection_are_noticed(name, kind, monkeypatch):
    """One row less, one more, or the rows of another word."""
    model = built(name, **SMALL.get(name, {}))
    _, module, form = find_attentions(model)[0]
    (start, length), other = (
        fused_rows(module, form, k) for k in (kind, KINDS[KINDS.index(kind) - 1])
    )
    for wrong in ((start, length - 1), (start - 1 if start else 1, length), other):
        rows = lambda *given, wrong=wrong: wrong if given[2] == kind else fused_rows(*given)  # noqa: E731
        monkeypatch.setattr("sparsecraft.dense.attentions.fused_rows", rows)
        assert why_not(module, form, kind), wrong
        monkeypatch.undo()


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize(
    "name, settings",
    [
        ("DiffLlama", {}),  # heads in pairs
        ("Olmo2", {}),  # a norm over all heads
        ("StableLm", {}),  # a width that its code has from the configuration
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}),  # sinks, one for each head
    ],
)
def test_an_attention_whose_heads_know_of_each_other_is_no_expert(name, settings, kv):
    model = built(name, **settings)
    recipe = sc.recipes.bam(num_experts=2)
    edit = next(edit for edit in recipe.edits if edit.site == "attention")
    edit = replace(edit, experts=replace(edit.experts, kv=kv))
    recipe = replace(recipe, edits=(edit,))
    with pytest.raises(DonorError, match=rf"{name}Attention.*heads of two"):
        sc.convert(model, recipe, certify=False)


def test_every_network_of_a_vision_model_is_found_and_no_projector():
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=LLAMA | {"model_type": "llama"}, image_token_id=9
    )
    found, doubtful = find_networks(transformers.LlavaForConditionalGeneration(config))
    assert len(found) == 4 and not doubtful and all(network.whole for network in found)
