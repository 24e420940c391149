"""Causal models are trained on the loss of their own logits, whatever their head is."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as T
from torch.nn import functional as F

import sparsecraft as sc
from sparsecraft.data.prepare import prepare
from sparsecraft.training.heads import head_is_plain
from tests import tiny

V = len(tiny.tokenizer())
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
DECODER = SIZES | {"is_decoder": True, "hidden_dropout_prob": 0.0,
                   "attention_probs_dropout_prob": 0.0}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
MIXTURE = GROUPED | {"num_local_experts": 4}

PLAIN = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)),
    "gpt2": lambda: T.GPT2LMHeadModel(
        T.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0,
                     embd_pdrop=0, attn_pdrop=0)
    ),
    "gemma2": lambda: T.Gemma2ForCausalLM(
        T.Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=2.0)
    ),
    "cohere": lambda: T.CohereForCausalLM(T.CohereConfig(**GROUPED)),
    "granite": lambda: T.GraniteForCausalLM(T.GraniteConfig(**GROUPED, logits_scaling=3.0)),
    "granitemoe": lambda: T.GraniteMoeForCausalLM(T.GraniteMoeConfig(**MIXTURE)),
    "granitemoeshared": lambda: T.GraniteMoeSharedForCausalLM(
        T.GraniteMoeSharedConfig(**MIXTURE, shared_intermediate_size=16)
    ),
    "phimoe": lambda: T.PhimoeForCausalLM(
        T.PhimoeConfig(**MIXTURE, router_jitter_noise=0.0, input_jitter_noise=0.0)
    ),
    "doge": lambda: T.DogeForCausalLM(T.DogeConfig(**GROUPED)),
    "bart": lambda: T.BartForCausalLM(
        T.BartConfig(vocab_size=V, d_model=32, decoder_layers=2, decoder_attention_heads=4,
                     decoder_ffn_dim=64, dropout=0.0, pad_token_id=0, bos_token_id=1,
                     eos_token_id=2)
    ),
}  # fmt: skip
OTHER = {
    "recurrent_gemma": lambda: T.RecurrentGemmaForCausalLM(
        T.RecurrentGemmaConfig(vocab_size=V, hidden_size=32, intermediate_size=64, lru_width=32,
                               num_hidden_layers=3, num_attention_heads=4, pad_token_id=0,
                               attention_window_size=64, logits_soft_cap=2.0, bos_token_id=1,
                               eos_token_id=2)
    ),
    "bert": lambda: T.BertLMHeadModel(T.BertConfig(**DECODER)),
    "roberta": lambda: T.RobertaForCausalLM(T.RobertaConfig(**DECODER)),
    "roformer": lambda: T.RoFormerForCausalLM(T.RoFormerConfig(**DECODER)),
    "megatron_bert": lambda: T.MegatronBertForCausalLM(T.MegatronBertConfig(**DECODER)),
    "modernbert_decoder": lambda: T.ModernBertDecoderForCausalLM(
        T.ModernBertDecoderConfig(**SIZES, global_attn_every_n_layers=2, local_attention=8)
    ),
    "electra": lambda: T.ElectraForCausalLM(T.ElectraConfig(**DECODER, embedding_size=16)),
    "rembert": lambda: T.RemBertForCausalLM(
        T.RemBertConfig(**DECODER, input_embedding_size=16, output_embedding_size=24)
    ),
    "llama4": lambda: T.Llama4ForCausalLM(
        T.Llama4TextConfig(**MIXTURE | {"num_local_experts": 2}, head_dim=8,
                           intermediate_size_mlp=64, attention_chunk_size=64)
    ),
}  # fmt: skip


def dense(name: str) -> torch.nn.Module:
    """With weights so large that another function has another loss."""
    torch.manual_seed(1)
    model = (PLAIN | OTHER)[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.eval()


def loss_of_logits(model: torch.nn.Module, path: str) -> float:
    total = count = 0
    rows, _ = prepare([path], tiny.tokenizer(), max_length=64, model=model)
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
        count += (labels != -100).sum().item()
    return total / count


def skip_where_the_future_is_read(model: torch.nn.Module) -> None:
    """Doge of transformers 5.17 has no causal mask in batches without padding, so that logits
    depend on the batch's padding."""
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        whole, start = (model(input_ids=i, use_cache=False).logits for i in (ids, ids[:, :4]))
    if (whole[:, :4] - start).abs().max() > 0.1 * whole.abs().max():
        pytest.skip("this version of transformers lets the model read tokens that are to come")


@pytest.mark.parametrize("name", [*PLAIN, *OTHER])
def test_a_training_begins_at_the_loss_of_the_models_logits(tmp_path, name):
    model, path = dense(name), tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows(8))
    assert head_is_plain(model) == (name in PLAIN)
    skip_where_the_future_is_read(model)
    wanted = loss_of_logits(model, path)
    sc.convert(model, sc.recipes.molora(num_experts=2, variant="tuned"), certify=False)
    options = {"steps": 1, "batch_size": 8, "learning_rate": 1e-9, "max_length": 64}
    found = sc.train(
        model, path, tmp_path / "out", tokenizer=tiny.tokenizer(), progress=False, **options
    )
    assert found.loss == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_heads_are_told_apart_in_every_dtype(dtype):
    for name in ("llama", "gemma2", "granite", "bert", "modernbert_decoder"):
        assert head_is_plain(dense(name).to(dtype)) == (name in PLAIN), name


def test_asking_leaves_the_model_alone():
    model = dense("llama").train()
    before = {**vars(model)}, torch.get_rng_state()
    assert head_is_plain(model)
    assert {**vars(model)} == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert not model.base_model._forward_hooks


def test_a_loss_of_another_kind_is_refused():
    model = dense("bert")
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs) | {"loss": torch.tensor(3.0)}
    with pytest.raises(sc.SparsecraftError, match=r"its own loss is another one \(tensor\(3"):
        head_is_plain(model)


@pytest.mark.parametrize("on", [False, True])
def test_a_mixtures_own_balance_loss_is_as_its_configuration_says(tmp_path, on):
    torch.manual_seed(0)
    config = T.MixtralConfig(**MIXTURE, output_router_logits=on, router_aux_loss_coef=2.5)
    model = T.MixtralForCausalLM(config).eval()
    sc.convert(model, sc.recipes.molora(num_experts=2, variant="tuned"))
    path = tiny.write_rows(tmp_path / "rows.jsonl", tiny.chat_rows(8))
    (held,) = sc.evaluate(model, path, tokenizer=tiny.tokenizer())["loss"].values()
    options = {"steps": 1, "batch_size": 8, "learning_rate": 1e-9, "max_length": 64}
    report = sc.train(
        model, path, tmp_path / "out", tokenizer=tiny.tokenizer(), progress=False, **options
    )
    assert report.loss - held["loss"] == pytest.approx(5.0 if on else 0.0, abs=0.1)
    assert model.config.output_router_logits == on and model.config.router_aux_loss_coef == 2.5
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["base_config"]["output_router_logits"] == on
