"""The models that PEFT's tests ask the hub for, tiny and random, in a hub cache of our own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

from tests import tiny
from tests.cases.families import BERT_LIKE, FAMILIES, HEADS, LLAMA_LIKE, POSITIONS, VOCAB, D, F

BERT = {**BERT_LIKE, "vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "pad_token_id": 0}
GPTJ = {"n_embd": D, "n_inner": F, "n_layer": 2, "n_head": HEADS, "rotary_dim": 4}
BART = {"d_model": D, "encoder_layers": 2, "decoder_layers": 2}
for side in ("encoder", "decoder"):
    BART |= {f"{side}_ffn_dim": F, f"{side}_attention_heads": HEADS}
START = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2}

Build = Callable[[], nn.Module]


def _of(kind: str, config: str, **settings) -> Build:
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**settings))


def _family(name: str) -> Build:
    family = FAMILIES[name]
    return lambda: getattr(transformers, family.model)(family.config())


_PEFT, _TRL, _HF = "peft-internal-testing", "trl-internal-testing", "hf-internal-testing"
MODELS: dict[str, Build] = {
    f"{_PEFT}/tiny-random-OPTForCausalLM": _family("opt"),
    f"{_PEFT}/tiny-random-GPT2LMHeadModel": _family("gpt2"),
    f"{_PEFT}/tiny-random-GPTJForCausalLM": _of(
        "GPTJForCausalLM", "GPTJConfig", **GPTJ, vocab_size=VOCAB, n_positions=POSITIONS, **START
    ),
    f"{_TRL}/tiny-random-LlamaForCausalLM": _of("LlamaForCausalLM", "LlamaConfig", **LLAMA_LIKE),
    f"{_PEFT}/tiny-dummy-qwen2": _family("qwen2"),
    f"{_HF}/tiny-random-Gemma3ForCausalLM": _of(
        "Gemma3ForCausalLM", "Gemma3TextConfig", **LLAMA_LIKE, head_dim=16
    ),
    f"{_PEFT}/tiny-random-T5ForConditionalGeneration-calibrated": _family("t5"),
    f"{_PEFT}/tiny-random-BartForConditionalGeneration": _of(
        "BartForConditionalGeneration",
        "BartConfig",
        **BART,
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
        forced_eos_token_id=None,
        **START,
    ),
    f"{_PEFT}/tiny-random-BertModel": _of("BertModel", "BertConfig", **BERT),
    f"{_PEFT}/tiny-random-RobertaModel": _of("RobertaModel", "RobertaConfig", **BERT),
    f"{_PEFT}/tiny-random-DebertaModel": _of("DebertaModel", "DebertaConfig", **BERT),
    f"{_PEFT}/tiny-random-DebertaV2Model": _of("DebertaV2Model", "DebertaV2Config", **BERT),
    f"{_PEFT}/tiny-random-BertForSequenceClassification": _of(
        "BertForSequenceClassification", "BertConfig", **BERT
    ),
    f"{_PEFT}/tiny-random-RobertaForSequenceClassification": _of(
        "RobertaForSequenceClassification", "RobertaConfig", **BERT
    ),
    f"{_TRL}/tiny-LlamaForSequenceClassification-3.2": _of(
        "LlamaForSequenceClassification", "LlamaConfig", **LLAMA_LIKE
    ),
}
ADAPTERS = {f"{_PEFT}/tiny-opt-lora-revision": ("test", {"peft_type": "LORA", "r": 8})}
"""Adapters of which PEFT's tests read the configuration alone: revision and contents."""


class Blocks(nn.Module):
    """What PEFT calls a custom model: no class and no configuration of transformers."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.dtype = torch.float32
        self.first, self.last = nn.Linear(10, width), nn.Linear(width, 2)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        x = self.first(X.to(self.dtype) / 90)
        for layer in self.layers:
            x = layer(x)
        return self.last(x).log_softmax(-1)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), TwoLinears(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class TwoLinears(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


def fill(cache: Path) -> None:
    """Write every model as huggingface_hub keeps what it has downloaded."""
    for name, build in MODELS.items():
        folder = _snapshot(cache, name, "main")
        if not (folder / "config.json").is_file():
            _moved(build).save_pretrained(folder)
            tiny.tokenizer().save_pretrained(folder)
    for name, (revision, contents) in ADAPTERS.items():
        folder = _snapshot(cache, name, revision)
        (folder / "adapter_config.json").write_text(json.dumps(contents))


def _snapshot(cache: Path, name: str, revision: str) -> Path:
    commit, repository = "0" * 40, cache / f"models--{name.replace('/', '--')}"
    reference, folder = repository / "refs" / revision, repository / "snapshots" / commit
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _moved(build: Build) -> nn.Module:
    """A model whose outputs its parts can be told by: initial biases and norms are trivial."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(parameter + 0.1 * noise if parameter.ndim == 1 else 0.15 * noise)
    return model


if __name__ == "__main__":
    fill(Path(os.environ["HF_HUB_CACHE"]))
