"""Where families keep the parts of their feed-forward networks and attentions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNForm:
    """Where the parts of one feed-forward network are, as paths below one module, its owner.

    It is found by structure and then proven (`sparsecraft.dense.networks`): no family is listed.
    """

    up: str
    down: str
    activation: str | None
    """The activation's module; None where the owner's code calls a function."""
    function: str | None = None
    """The activation's name in `transformers.activations`, where it is no module."""
    gate: str | None = None
    fused: bool = False
    """`up` holds gate and up in one matrix, gate rows first."""
    hidden_dropout: float = 0.0
    """Between activation and down."""
    output_dropout: float = 0.0
    """After down, within the network."""
    silenced: str | None = None
    """The owner's attribute that sets a dropout between activation and down where these are
    siblings of other modules: zero while a layer that stands there does that itself."""

    @property
    def gated(self) -> bool:
        return self.fused or self.gate is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionForm:
    """Where a family keeps the projections of its attention, as paths below one module.

    In a fused projection the rows of the queries come first, then those of keys and values.
    """

    query: str
    key: str
    value: str
    output: str

    def parts(self) -> list[str]:
        return list(dict.fromkeys((self.query, self.key, self.value, self.output)))


def _fused(name: str, output: str) -> AttentionForm:
    return AttentionForm(query=name, key=name, value=name, output=output)


# Only candidates: what they say is proven before it is used (`sparsecraft.dense.attentions`).
ATTENTION_FORMS = (
    # Llama, Mistral, Qwen, Gemma, ViT
    AttentionForm(query="q_proj", key="k_proj", value="v_proj", output="o_proj"),
    # OPT, BART, CLIP, Whisper
    AttentionForm(query="q_proj", key="k_proj", value="v_proj", output="out_proj"),
    # Phi
    AttentionForm(query="q_proj", key="k_proj", value="v_proj", output="dense"),
    # T5
    AttentionForm(query="q", key="k", value="v", output="o"),
    # DistilBERT
    AttentionForm(query="q_lin", key="k_lin", value="v_lin", output="out_lin"),
    # BERT, MiniLM
    AttentionForm(query="self.query", key="self.key", value="self.value", output="output.dense"),
    # DeBERTa-v2
    AttentionForm(
        query="self.query_proj", key="self.key_proj", value="self.value_proj", output="output.dense"
    ),
    # ALBERT
    AttentionForm(query="query", key="key", value="value", output="dense"),
    # ViT before transformers 5.20
    AttentionForm(
        query="attention.query", key="attention.key", value="attention.value", output="output.dense"
    ),
    # Phi-3
    _fused("qkv_proj", "o_proj"),
    # GPT-2, GPT-BigCode
    _fused("c_attn", "c_proj"),
    # GPT-NeoX, Falcon, Bloom, Persimmon
    _fused("query_key_value", "dense"),
    # MPT
    _fused("Wqkv", "out_proj"),
    # ModernBERT
    _fused("Wqkv", "Wo"),
)

HEAD_DIM_NAMES = ("head_dim", "key_value_proj_dim", "attention_head_size")


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a Linear or Conv1D."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features


def has(module: nn.Module, path: str) -> bool:
    """Whether there is a module at `path` below."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return isinstance(module, nn.Module)


def join(owner: str, part: str) -> str:
    return f"{owner}.{part}" if owner else part
