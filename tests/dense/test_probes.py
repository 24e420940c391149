"""Random inputs reach every part of every kind of model."""

from __future__ import annotations

import pytest
import torch
import transformers as t

from sparsecraft.dense.probes import candidates, random_probe
from sparsecraft.dense.windows import long_probe, unprobed, windows_of
from tests.cases.families import FAMILIES, dense

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 96, "num_hidden_layers": 1, "max_position_embeddings": 64}
VISION = {**SIZES, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92}
CONVOLUTIONS = {
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
SPEECH = {**SIZES, "vocab_size": 96, "num_hidden_layers": 1}


def llava():
    text, vision = t.LlamaConfig(**TEXT), t.CLIPVisionConfig(**VISION)
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(vision_config=vision, text_config=text, image_token_id=90)
    )


def qwen():
    vision = {**SIZES, "depth": 1, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4}
    del vision["num_attention_heads"]
    text = {**TEXT, "num_key_value_heads": 2, "rope_parameters": SECTIONS}
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN)
    return t.Qwen2_5_VLForConditionalGeneration(config)


def paligemma():
    vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    text = {**TEXT, **HEADS, "model_type": "gemma"}
    config = t.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_id=90, projection_dim=32
    )
    return t.PaliGemmaForConditionalGeneration(config)


def gemma():
    vision = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    text = {**TEXT, **HEADS, "sliding_window": 8}
    config = t.Gemma3Config(
        vision_config=vision, text_config=text, image_token_id=90, mm_tokens_per_image=1
    )
    return t.Gemma3ForConditionalGeneration(config)


def clip():
    text = {**TEXT, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=VISION))


def siglip():
    return t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=VISION))


def whisper():
    return t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, num_mel_bins=8,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_source_positions=32, max_target_positions=32, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip


def wav2vec2():
    return t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**SPEECH, **CONVOLUTIONS))


def wav2vec2_bert():
    more = {"feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3}
    return t.Wav2Vec2BertForCTC(t.Wav2Vec2BertConfig(**SPEECH, **more))


def spectrogram():
    config = t.ASTConfig(**SIZES, num_hidden_layers=1, patch_size=8, max_length=32, num_mel_bins=16)
    return t.ASTForAudioClassification(config)


# Modules with weights of their own that a model does not call, but reads, or not at all.
SILENT = ("shared", "out_proj", "pos_conv_embed", "masked_spec_embed")
KINDS = (
    llava, qwen, paligemma, gemma, clip, siglip, whisper, wav2vec2, wav2vec2_bert, spectrogram,
)  # fmt: skip


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_probe_reaches_every_part(make):
    torch.manual_seed(0)
    model = make().train()
    probe, ran = random_probe(model), set()
    assert all(module.training for module in model.modules())
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: ran.add(name))
    with torch.no_grad():
        model.eval()(**probe)
    idle = [
        name
        for name, module in model.named_modules()
        if module._parameters and name not in ran and not name.endswith(SILENT)
    ]
    assert not idle
    again = random_probe(model)
    assert probe.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in probe.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_kind_of_inputs_needs_no_trial(family):
    model = dense(family)
    assert len(candidates(model)) == 1
    with torch.no_grad():
        model(**random_probe(model))


def test_text_avoids_the_ids_of_images():
    for inputs in candidates(llava(), shape=(8, 60)):
        if "pixel_values" not in inputs:
            assert not (inputs["input_ids"] == 90).any()


# ---------------------------------------------------------------------------------------- windows


def llama(**fields):
    config = t.LlamaConfig(**{**TEXT, "max_position_embeddings": 512, **fields})
    return t.LlamaForCausalLM(config)


def test_a_long_probe_goes_beyond_every_window():
    assert windows_of(llama()) == [] and long_probe(llama()) is None
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    model = llama(sliding_window=80, rope_parameters={**rope, "rope_theta": 1e4})
    assert windows_of(model) == [80, 256] and unprobed(model) == []
    assert long_probe(model)["input_ids"].shape[1] > 256
    model.config.attention_chunk_size = 100
    assert windows_of(model) == [80, 100, 256]


def test_a_window_that_no_sequence_reaches_needs_no_probe():
    assert long_probe(llama(sliding_window=512)) is None
    assert long_probe(llama(sliding_window=510))["input_ids"].shape[1] == 512


def test_a_window_beyond_the_memory_is_named():
    model = llama(sliding_window=80)
    model.config.attention_chunk_size = 100_000
    model.config.max_position_embeddings = 200_000
    assert unprobed(model) == [100_000]
    assert long_probe(model)["input_ids"].shape == (1, 96)


REAL = {
    "mistral": t.MistralConfig,
    "gemma2": t.Gemma2Config,
    "gemma3": t.Gemma3TextConfig,
    "llama": lambda: t.LlamaConfig(
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "qwen2": lambda: t.Qwen2Config(
        vocab_size=151936,
        use_sliding_window=True,
        sliding_window=32768,
        max_position_embeddings=131072,
    ),
}


@pytest.mark.parametrize("family", REAL)
def test_the_windows_of_real_models_are_no_question_of_memory(family):
    """The last tokens' logits are enough, and only eager attention holds scores."""
    config = REAL[family]()
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        model = t.AutoModelForCausalLM.from_config(config)
    assert windows_of(model)[-1] >= 4096 and unprobed(model) == []
    model.config._attn_implementation = "eager"
    assert bool(unprobed(model)) == (config.num_attention_heads == 32)


def test_what_would_take_a_cpu_too_long_is_named(monkeypatch):
    model = llama(sliding_window=80)
    monkeypatch.setattr("sparsecraft.dense.windows.MOST_WORK", 1e6)
    assert unprobed(model) == [80] and long_probe(model) is None
    model.to("meta")
    assert unprobed(model) == []


def test_a_long_probe_asks_for_the_last_logits_alone():
    model = llama(sliding_window=200)
    probe = long_probe(model)
    assert probe["input_ids"].shape == (1, 225)
    assert model(**probe).logits.shape[1] == 16
    with torch.no_grad():
        whole = model(probe["input_ids"]).logits
        assert torch.allclose(model(**probe).logits, whole[:, -16:], atol=1e-6)
