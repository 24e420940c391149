"""A tiny tokenizer, tiny rows, a tiny dense model and sentence encoder, all made here."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["red", "blue", "green", "one", "two", "three", "cat", "dog", "sun", "sea"]


def chat_rows(count: int = 40) -> list[dict]:
    """Question and answer pairs that a tiny model can learn: the answer repeats the question."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {WORDS[i % 10]} {WORDS[i * 3 % 10]}"},
                {"role": "assistant", "content": f"{WORDS[i % 10]} {WORDS[i * 3 % 10]}"},
            ]
        }
        for i in range(count)
    ]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A new one for each caller: a token that one test adds is in no other's vocabulary."""
    return copy.deepcopy(_tokenizer())


@functools.cache
def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([" ".join(WORDS), "user assistant system say"] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
        model_max_length=128,
    )


def llama(width: int = 32) -> transformers.LlamaForCausalLM:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def save_dense(folder: Path, width: int = 32) -> str:
    """A dense model folder as from_pretrained reads it: weights, tokenizer, license."""
    llama(width).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return str(folder)


def save_encoder(folder: Path, width: int = 16) -> str:
    """A sentence encoder as `embed` reads it, whose embeddings tell texts apart."""
    torch.manual_seed(5)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.7,
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
