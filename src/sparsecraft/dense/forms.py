"""Where families keep the parts of their feed-forward networks and attentions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNForm:
    """Where a family keeps the parts of its feed-forward network, as paths below one module."""

    up: str
    down: str
    activation: str
    gate: str | None = None
    fused: bool = False
    """`up` holds gate and up in one matrix, gate rows first."""
    hidden_dropout: str | None = None
    output_dropout: str | None = None
    spans: tuple[str, ...] = ()
    """Classes in which the parts are siblings of other modules, applied one after the other."""

    def parts(self) -> list[str]:
        names = (self.gate, self.up, self.activation, self.down)
        return [name for name in (*names, self.hidden_dropout, self.output_dropout) if name]


FORMS = (
    # Llama, Mistral, Qwen2, Qwen3, Gemma
    FFNForm(gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn"),
    # Phi-3
    FFNForm(up="gate_up_proj", down="down_proj", activation="activation_fn", fused=True),
    # GPT-2
    FFNForm(up="c_fc", down="c_proj", activation="act", output_dropout="dropout"),
    # T5 v1.1 and Flan-T5
    FFNForm(gate="wi_0", up="wi_1", down="wo", activation="act", hidden_dropout="dropout"),
    # T5
    FFNForm(up="wi", down="wo", activation="act", hidden_dropout="dropout"),
    # ViT (a module) and OPT (siblings in the decoder layer)
    FFNForm(up="fc1", down="fc2", activation="activation_fn", spans=("OPTDecoderLayer",)),
    # BERT, MiniLM and their close relatives
    FFNForm(
        up="intermediate.dense",
        down="output.dense",
        activation="intermediate.intermediate_act_fn",
        spans=("BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer"),
    ),
)


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


ATTENTION_FORMS = (
    # Llama, Mistral, Qwen, Gemma, ViT
    AttentionForm(query="q_proj", key="k_proj", value="v_proj", output="o_proj"),
    # OPT
    AttentionForm(query="q_proj", key="k_proj", value="v_proj", output="out_proj"),
    # T5
    AttentionForm(query="q", key="k", value="v", output="o"),
    # BERT, MiniLM
    AttentionForm(query="self.query", key="self.key", value="self.value", output="output.dense"),
    # ViT before transformers 5.20
    AttentionForm(
        query="attention.query", key="attention.key", value="attention.value", output="output.dense"
    ),
    # Phi-3
    AttentionForm(query="qkv_proj", key="qkv_proj", value="qkv_proj", output="o_proj"),
    # GPT-2
    AttentionForm(query="c_attn", key="c_attn", value="c_attn", output="c_proj"),
)

HEAD_DIM_NAMES = ("head_dim", "key_value_proj_dim", "attention_head_size")


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
