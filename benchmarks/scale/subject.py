"""What is trained: a Llama of random weights, a small tokenizer, packed chats of random words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import sparsecraft as sc

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
WORDS = ["red", "blue", "green", "one", "two", "three", "cat", "dog", "sun", "sea"]

# TinyLlama's shape, 1.1B parameters; the others are for trials.
SIZES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
# One of each kind of experts, for `soak`, beside the two that are measured.
RECIPES: dict[str, Callable[[], sc.Recipe]] = {
    "camelidae": sc.recipes.camelidae,
    "camelidae without dropout": lambda: sc.recipes.camelidae(dropout=0.0),
    "upcycling": lambda: sc.recipes.upcycling(num_experts=4, top_k=2),
    "adapter": lambda: sc.recipes.camelidae(num_experts=4, adapter_dim=16, lora_rank=4),
    "lora": lambda: sc.recipes.molora(num_experts=4, rank=4, variant="tuned"),
    "vector": lambda: sc.recipes.mov(num_experts=4, variant="tuned"),
    "ffn": lambda: sc.recipes.upcycling(num_experts=4, top_k=2),
    "ffn_lora": lambda: sc.recipes.mixlora(num_experts=4, top_k=2, rank=4),
    "attention": lambda: sc.recipes.bam(num_experts=2),
    "split": lambda: sc.recipes.lte(num_experts=4),
}
KINDS = ("adapter", "lora", "vector", "ffn", "ffn_lora", "attention", "split")


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=alphabet,
    )
    backend.train_from_iterator([" ".join(WORDS), "user assistant"] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
    )


def write_dense(folder: Path, size: str) -> Path:
    """The dense model, drawn by one seed where there is a GPU on it; one that is there stays."""
    if (folder / "tokenizer.json").is_file():
        return folder
    config = transformers.LlamaConfig(
        **SIZES[size],
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, tokens: int, longest: int) -> Path:
    """Chats of up to `longest` words on either side, `tokens` of them and more."""
    draw, written = random.Random(0), 0
    with path.open("w") as file:
        while written < tokens:
            asked, said = (
                draw.choices(WORDS, k=draw.randint(longest // 7, longest)) for _ in range(2)
            )
            messages = [
                {"role": "user", "content": " ".join(asked)},
                {"role": "assistant", "content": " ".join(said)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
            written += len(asked) + len(said)
    return path


def converted(
    dense: Path, recipe: str, device: torch.device, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    model.to(device)
    sc.convert(model, RECIPES[recipe](), certify=False)
    return model


def draw_routers(model: torch.nn.Module) -> None:
    """Give experts that begin as copies, and their routers, values that tell them apart."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, sc.MoELayer)):
            for part in (layer.router, layer.experts):
                for parameter in part.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
