"""The families that docs/families.md speaks of: one row each, the class and what its configuration
gets. Families that the installed transformers does not have are left out by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers

from tests.cases.families import BERT_LIKE, HEADS, LAYERS, LLAMA_LIKE, POSITIONS, VOCAB, D, F

IMAGE, PATCH = 16, 8
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 90, 91, 92, 93


@dataclass(frozen=True)
class Member:
    """One family.

    Attributes:
        group: the heading under which it is listed.
        model: name of the transformers class.
        config: what the configuration gets.
        inputs: what it reads; see `tests.cases.members.INPUTS`.
    """

    group: str
    model: str
    config: Mapping[str, Any]
    inputs: str = "text"

    @property
    def exists(self) -> bool:
        return hasattr(transformers, self.model)


def like(base: Mapping[str, Any], *without: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in base.items() if key not in without} | changes


HEAD = {"head_dim": 8}
LOCAL = {"sliding_window": 8}
# GPT-2's names.
GPT = {
    "vocab_size": VOCAB,
    "n_embd": D,
    "n_inner": F,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MASKED = like(BERT_LIKE, vocab_size=VOCAB, max_position_embeddings=POSITIONS)
# RoBERTa counts positions from the padding's own onwards.
ROBERTA = like(MASKED, max_position_embeddings=POSITIONS + 6)
OPT = like(MASKED, "intermediate_size", ffn_dim=F, word_embed_proj_dim=D)
T5 = {
    "vocab_size": VOCAB,
    "d_model": D,
    "d_kv": D // HEADS,
    "d_ff": F,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": D,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": F,
    "decoder_ffn_dim": F,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
VISION = like(BERT_LIKE, image_size=IMAGE, patch_size=PATCH)
SPEECH = like(
    BERT_LIKE,
    vocab_size=VOCAB,
    conv_dim=(16, 16),
    conv_stride=(4, 4),
    conv_kernel=(8, 8),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    layerdrop=0.0,  # of two layers, chance would leave out both
)
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2}
LOCALS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": D,
    "intermediate_size": F,
    "num_heads": HEADS,
    "out_hidden_size": D,
    "patch_size": 4,
    "spatial_merge_size": 2,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
SIGLIP = like(VISION, model_type="siglip_vision_model", vision_use_head=False)
CLIP_TEXT = like(MASKED, projection_dim=D, eos_token_id=2, bos_token_id=1, pad_token_id=0)
GEMMA = like(LLAMA_LIKE, **HEAD, **LOCAL)
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": HEADS,
}


def text(model: str, **config: Any) -> Member:
    return Member("Text decoders", model, config)


def mixture(model: str, **config: Any) -> Member:
    return Member("Mixtures of experts", model, config)


def hybrid(model: str, **config: Any) -> Member:
    return Member("Hybrids and state spaces", model, config)


def encoder(model: str, **config: Any) -> Member:
    return Member("Text encoders", model, config)


def pair(model: str, **config: Any) -> Member:
    return Member("Encoder-decoders", model, config, "seq2seq")


def vision(model: str, **config: Any) -> Member:
    return Member("Vision", model, config, "image")


def speech(model: str, inputs: str = "wave", **config: Any) -> Member:
    return Member("Speech", model, config, inputs)


def several(model: str, inputs: str, **config: Any) -> Member:
    return Member("Several modalities", model, config, inputs)


ZOO = {
    "llama": text("LlamaForCausalLM", **LLAMA_LIKE, attention_bias=True, mlp_bias=True),
    "mistral": text("MistralForCausalLM", **LLAMA_LIKE, **LOCAL),
    "ministral3": text("Ministral3ForCausalLM", **LLAMA_LIKE, **HEAD),
    "qwen2": text("Qwen2ForCausalLM", **LLAMA_LIKE, tie_word_embeddings=True),
    "qwen3": text("Qwen3ForCausalLM", **LLAMA_LIKE, head_dim=16),
    "gemma": text("GemmaForCausalLM", **LLAMA_LIKE, head_dim=16),
    "gemma2": text("Gemma2ForCausalLM", **LLAMA_LIKE, **LOCAL, head_dim=16),
    "gemma3": text("Gemma3ForCausalLM", **LLAMA_LIKE, **LOCAL, head_dim=16),
    "gemma3n": text(
        "Gemma3nForCausalLM",
        **like(LLAMA_LIKE, num_hidden_layers=3, intermediate_size=[F] * 3),
        **LOCAL,
        **HEAD,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        activation_sparsity_pattern=[0.95, 0.0, 0.0],
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gemma4": text(
        "Gemma4ForCausalLM",
        **LLAMA_LIKE,
        **LOCAL,
        **HEAD,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "vaultgemma": text("VaultGemmaForCausalLM", **LLAMA_LIKE, **LOCAL, head_dim=16),
    "phi": text("PhiForCausalLM", **LLAMA_LIKE),
    "phi3": text("Phi3ForCausalLM", **LLAMA_LIKE),
    "gpt2": text("GPT2LMHeadModel", **GPT),
    "gpt_bigcode": text("GPTBigCodeForCausalLM", **GPT),
    "gpt_neo": text(
        "GPTNeoForCausalLM",
        **like(MASKED, "num_hidden_layers", "num_attention_heads", num_layers=2, num_heads=4),
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    ),
    "gpt_neox": text("GPTNeoXForCausalLM", **MASKED),
    "gptj": text("GPTJForCausalLM", **GPT, rotary_dim=4),
    "codegen": text("CodeGenForCausalLM", **GPT, rotary_dim=4),
    "openai_gpt": text("OpenAIGPTLMHeadModel", **like(GPT, "n_inner")),
    "opt": text("OPTForCausalLM", **OPT),
    "opt_350m": text(
        "OPTForCausalLM", **like(OPT, word_embed_proj_dim=16, do_layer_norm_before=False)
    ),
    "falcon": text("FalconForCausalLM", **like(MASKED, "intermediate_size", ffn_hidden_size=F)),
    "falcon_new": text(
        "FalconForCausalLM",
        **like(MASKED, "intermediate_size", ffn_hidden_size=F, new_decoder_architecture=True),
    ),
    "bloom": text("BloomForCausalLM", vocab_size=VOCAB, hidden_size=D, n_layer=2, n_head=4),
    "mpt": text(
        "MptForCausalLM",
        vocab_size=VOCAB,
        d_model=D,
        n_layers=LAYERS,
        n_heads=HEADS,
        max_seq_len=POSITIONS,
        expansion_ratio=2,
    ),
    "persimmon": text("PersimmonForCausalLM", **like(LLAMA_LIKE, "num_key_value_heads")),
    "starcoder2": text("Starcoder2ForCausalLM", **LLAMA_LIKE),
    "stablelm": text("StableLmForCausalLM", **LLAMA_LIKE),
    "stablelm_parallel": text("StableLmForCausalLM", **LLAMA_LIKE, use_parallel_residual=True),
    "olmo": text("OlmoForCausalLM", **LLAMA_LIKE),
    "olmo2": text("Olmo2ForCausalLM", **LLAMA_LIKE),
    "olmo3": text("Olmo3ForCausalLM", **LLAMA_LIKE, **LOCAL),
    "cohere": text("CohereForCausalLM", **LLAMA_LIKE),
    "cohere2": text("Cohere2ForCausalLM", **LLAMA_LIKE, **LOCAL),
    "glm": text("GlmForCausalLM", **LLAMA_LIKE, head_dim=16),
    "glm4": text("Glm4ForCausalLM", **LLAMA_LIKE, head_dim=16),
    "granite": text(
        "GraniteForCausalLM",
        **LLAMA_LIKE,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        embedding_multiplier=3.0,
    ),
    "smollm3": text("SmolLM3ForCausalLM", **LLAMA_LIKE),
    "exaone4": text("Exaone4ForCausalLM", **LLAMA_LIKE, **LOCAL),
    "ernie4_5": text("Ernie4_5ForCausalLM", **LLAMA_LIKE),
    "helium": text("HeliumForCausalLM", **LLAMA_LIKE, **HEAD),
    "nemotron": text("NemotronForCausalLM", **LLAMA_LIKE),
    "arcee": text("ArceeForCausalLM", **LLAMA_LIKE),
    "apertus": text("ApertusForCausalLM", **LLAMA_LIKE),
    "seed_oss": text("SeedOssForCausalLM", **LLAMA_LIKE, **HEAD),
    "hunyuan": text("HunYuanDenseV1ForCausalLM", **LLAMA_LIKE, **HEAD),
    "bitnet": text("BitNetForCausalLM", **LLAMA_LIKE),
    "diffllama": text("DiffLlamaForCausalLM", **LLAMA_LIKE),
    "jais2": text("Jais2ForCausalLM", **LLAMA_LIKE),
    "xglm": text(
        "XGLMForCausalLM",
        vocab_size=VOCAB,
        d_model=D,
        ffn_dim=F,
        num_layers=LAYERS,
        attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
    ),
    "biogpt": text("BioGptForCausalLM", **MASKED),
    "ctrl": text("CTRLLMHeadModel", **like(GPT, "n_inner", dff=F)),
    "xlnet": text("XLNetLMHeadModel", vocab_size=VOCAB, d_model=D, n_layer=2, n_head=4, d_inner=F),
    # ------------------------------------------------------------------------------- mixtures
    "mixtral": mixture("MixtralForCausalLM", **LLAMA_LIKE, **LOCALS),
    "qwen2_moe": mixture(
        "Qwen2MoeForCausalLM",
        **LLAMA_LIKE,
        **ROUTED,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=F,
    ),
    "qwen3_moe": mixture(
        "Qwen3MoeForCausalLM", **LLAMA_LIKE, **ROUTED, **HEAD, moe_intermediate_size=16
    ),
    "olmoe": mixture("OlmoeForCausalLM", **LLAMA_LIKE, **ROUTED),
    "flex_olmo": mixture("FlexOlmoForCausalLM", **LLAMA_LIKE, **ROUTED),
    "granitemoe": mixture("GraniteMoeForCausalLM", **LLAMA_LIKE, **LOCALS),
    "phimoe": mixture("PhimoeForCausalLM", **LLAMA_LIKE, **LOCALS),
    "gpt_oss": mixture("GptOssForCausalLM", **LLAMA_LIKE, **LOCALS, **LOCAL, **HEAD),
    "deepseek_v3": mixture(
        "DeepseekV3ForCausalLM",
        **like(LLAMA_LIKE, **MLA),
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "deepseek_v4": mixture(
        "DeepseekV4ForCausalLM",
        **like(LLAMA_LIKE, num_key_value_heads=1),
        head_dim=16,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
        mlp_layer_types=["hash_moe", "moe"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        index_n_heads=2,
        index_head_dim=16,
        index_topk=2,
        hc_mult=2,
        **LOCAL,
    ),
    "doge_moe": mixture(
        "DogeForCausalLM", **LLAMA_LIKE, is_moe=True, num_experts=16, num_experts_per_tok=2
    ),
    "llama4": mixture(
        "Llama4ForCausalLM",
        **LLAMA_LIKE,
        **HEAD,
        intermediate_size_mlp=F,
        num_local_experts=2,
        interleave_moe_layer_step=2,
        attn_temperature_tuning=False,
    ),
    "glm4_moe": mixture(
        "Glm4MoeForCausalLM",
        **LLAMA_LIKE,
        **HEAD,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "dots1": mixture(
        "Dots1ForCausalLM",
        **LLAMA_LIKE,
        **HEAD,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "ernie4_5_moe": mixture(
        "Ernie4_5_MoeForCausalLM",
        **LLAMA_LIKE,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=16,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "jetmoe": mixture(
        "JetMoeForCausalLM",
        **like(LLAMA_LIKE, "num_attention_heads", "num_key_value_heads"),
        **LOCALS,
        num_key_value_heads=2,
        kv_channels=8,
    ),
    # -------------------------------------------------------------------------------- hybrids
    "mamba": hybrid(
        "MambaForCausalLM", vocab_size=VOCAB, hidden_size=D, num_hidden_layers=2, state_size=4
    ),
    "mamba2": hybrid(
        "Mamba2ForCausalLM",
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=2,
        state_size=8,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        chunk_size=8,
    ),
    "jamba": hybrid(
        "JambaForCausalLM",
        **like(LLAMA_LIKE, "max_position_embeddings"),
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=4,
    ),
    "bamba": hybrid("BambaForCausalLM", **LLAMA_LIKE, **MAMBA2, attn_layer_indices=[1]),
    "falcon_h1": hybrid(
        "FalconH1ForCausalLM",
        **LLAMA_LIKE,
        **HEAD,
        **like(MAMBA2, "mamba_expand", mamba_d_head=8, mamba_d_ssm=D),
        mlp_multipliers=[0.5, 2.0],
    ),
    "recurrent_gemma": hybrid(
        "RecurrentGemmaForCausalLM",
        **like(MASKED, "max_position_embeddings", num_hidden_layers=3, intermediate_size=96),
        lru_width=D,
        attention_window_size=8,
    ),
    "qwen3_next": hybrid(
        "Qwen3NextForCausalLM",
        **LLAMA_LIKE,
        **HEAD,
        **ROUTED,
        **DELTA,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "qwen3_5": hybrid("Qwen3_5ForCausalLM", **LLAMA_LIKE, **HEAD, **DELTA),
    "lfm2": hybrid("Lfm2ForCausalLM", **LLAMA_LIKE, layer_types=["conv", "full_attention"]),
    "granitemoehybrid": hybrid(
        "GraniteMoeHybridForCausalLM",
        **LLAMA_LIKE,
        **LOCALS,
        **MAMBA2,
        shared_intermediate_size=16,
        layer_types=["mamba", "attention"],
    ),
    # ------------------------------------------------------------------------------- encoders
    "bert": encoder("BertForMaskedLM", **MASKED),
    "roberta": encoder("RobertaForMaskedLM", **ROBERTA),
    "xlm_roberta": encoder("XLMRobertaForMaskedLM", **ROBERTA),
    "camembert": encoder("CamembertForMaskedLM", **ROBERTA),
    "electra": encoder("ElectraForMaskedLM", **MASKED, embedding_size=D),
    "distilbert": encoder(
        "DistilBertForMaskedLM",
        vocab_size=VOCAB,
        dim=D,
        hidden_dim=F,
        n_layers=LAYERS,
        n_heads=HEADS,
        max_position_embeddings=POSITIONS,
    ),
    "deberta": encoder("DebertaForMaskedLM", **MASKED),
    "deberta_v2": encoder(
        "DebertaV2ForMaskedLM",
        **MASKED,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
    ),
    "albert": encoder("AlbertForMaskedLM", **MASKED, embedding_size=16),
    "mpnet": encoder("MPNetForMaskedLM", **ROBERTA),
    "modernbert": encoder("ModernBertForMaskedLM", **MASKED, pad_token_id=0),
    "eurobert": encoder("EuroBertForMaskedLM", **LLAMA_LIKE),
    "esm": encoder("EsmForMaskedLM", **ROBERTA, pad_token_id=1, position_embedding_type="rotary"),
    # ----------------------------------------------------------------------- encoder-decoders
    "t5": pair("T5ForConditionalGeneration", **T5),
    "t5_v1_1": pair(
        "T5ForConditionalGeneration",
        **T5,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "mt5": pair("MT5ForConditionalGeneration", **T5, tie_word_embeddings=False),
    "umt5": pair("UMT5ForConditionalGeneration", **T5, tie_word_embeddings=False),
    "longt5": pair("LongT5ForConditionalGeneration", **T5, local_radius=8),
    "t5gemma": pair(
        "T5GemmaForConditionalGeneration",
        encoder=GEMMA,
        decoder=GEMMA,
        vocab_size=VOCAB,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    "prophetnet": pair(
        "ProphetNetForConditionalGeneration",
        vocab_size=VOCAB,
        hidden_size=D,
        encoder_ffn_dim=F,
        decoder_ffn_dim=F,
        num_encoder_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_encoder_attention_heads=HEADS,
        num_decoder_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        decoder_start_token_id=1,
    ),
    "switch_transformers": pair(
        "SwitchTransformersForConditionalGeneration",
        **T5,
        num_experts=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    "bart": pair("BartForConditionalGeneration", **BART),
    "mbart": pair("MBartForConditionalGeneration", **BART),
    "pegasus": pair("PegasusForConditionalGeneration", **BART),
    "marian": pair("MarianMTModel", **BART),
    "m2m_100": pair("M2M100ForConditionalGeneration", **BART),
    "led": Member(
        "Encoder-decoders",
        "LEDForConditionalGeneration",
        like(
            BART,
            "max_position_embeddings",
            max_encoder_position_embeddings=POSITIONS,
            max_decoder_position_embeddings=POSITIONS,
            attention_window=8,
        ),
        "seq2seq, globally",
    ),
    # --------------------------------------------------------------------------------- vision
    "vit": vision("ViTForImageClassification", **VISION, num_labels=7),
    "deit": vision("DeiTForImageClassification", **VISION, num_labels=7),
    "beit": vision("BeitForImageClassification", **VISION, num_labels=7),
    "dinov2": vision("Dinov2Model", **like(VISION, "intermediate_size"), mlp_ratio=2),
    "dinov2_swiglu": vision(
        "Dinov2Model", **like(VISION, "intermediate_size"), mlp_ratio=2, use_swiglu_ffn=True
    ),
    "dinov3": vision("DINOv3ViTModel", **VISION),
    "swin": vision(
        "SwinForImageClassification",
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        num_labels=7,
    ),
    "siglip_vision": vision("SiglipVisionModel", **VISION),
    "clip_vision": vision("CLIPVisionModel", **VISION, projection_dim=D),
    # --------------------------------------------------------------------------------- speech
    "whisper": speech(
        "WhisperForConditionalGeneration",
        "spectrogram and text",
        **like(BART, "max_position_embeddings", "forced_eos_token_id"),
        max_source_positions=32,
        max_target_positions=32,
        num_mel_bins=8,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    "wav2vec2": speech("Wav2Vec2ForCTC", **SPEECH),
    "hubert": speech("HubertForCTC", **SPEECH),
    "wavlm": speech("WavLMForCTC", **SPEECH, num_buckets=8, max_bucket_distance=16),
    "wav2vec2_conformer": speech(
        "Wav2Vec2ConformerForCTC", **SPEECH, position_embeddings_type="relative"
    ),
    "wav2vec2_bert": speech(
        "Wav2Vec2BertForCTC",
        "features",
        **like(BERT_LIKE, vocab_size=VOCAB),
        feature_projection_input_dim=16,
        conv_depthwise_kernel_size=3,
    ),
    "parakeet_ctc": speech(
        "ParakeetForCTC",
        "frames",
        vocab_size=VOCAB,
        encoder_config=like(
            BERT_LIKE, num_mel_bins=8, subsampling_conv_channels=8, conv_kernel_size=3
        ),
    ),
    # --------------------------------------------------------------------- several modalities
    "clip_text": several("CLIPTextModel", "text", **CLIP_TEXT),
    "clip": several("CLIPModel", "image beside text", text_config=CLIP_TEXT, vision_config=VISION),
    "siglip": several("SiglipModel", "image beside text", text_config=MASKED, vision_config=VISION),
    "llava": several(
        "LlavaForConditionalGeneration",
        "image in text",
        vision_config=like(VISION, model_type="clip_vision_model"),
        text_config=like(LLAMA_LIKE, model_type="llama"),
        image_token_id=IMAGE_TOKEN,
    ),
    "paligemma": several(
        "PaliGemmaForConditionalGeneration",
        "image in text",
        vision_config=SIGLIP,
        text_config=like(LLAMA_LIKE, model_type="gemma", **HEAD),
        image_token_id=IMAGE_TOKEN,
        projection_dim=D,
    ),
    "gemma3_vision": several(
        "Gemma3ForConditionalGeneration",
        "image in text",
        vision_config=SIGLIP,
        text_config=like(LLAMA_LIKE, **HEAD, **LOCAL),
        image_token_id=IMAGE_TOKEN,
        boi_token_index=91,
        eoi_token_index=92,
        mm_tokens_per_image=1,
    ),
    "qwen2_5_vl": several(
        "Qwen2_5_VLForConditionalGeneration",
        "patches in text",
        text_config=like(LLAMA_LIKE, rope_parameters=MROPE),
        vision_config=like(QWEN_VISION, window_size=16, fullatt_block_indexes=[1]),
        **QWEN_TOKENS,
    ),
    "qwen3_vl": several(
        "Qwen3VLForConditionalGeneration",
        "patches in text",
        text_config=like(LLAMA_LIKE, rope_parameters=MROPE, **HEAD),
        vision_config=like(QWEN_VISION, deepstack_visual_indexes=[1], num_position_embeddings=16),
        **QWEN_TOKENS,
    ),
}
ZOO = {name: member for name, member in ZOO.items() if member.exists}
