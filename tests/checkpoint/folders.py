"""Folders of every kind that we write, on one tiny base, for tests that damage or edit a copy."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch

import sparsecraft as sc
from sparsecraft.dense.loading import load_tokenizer
from tests import tiny

RECIPES = sc.recipes
SETTINGS = {"eos_token_id": 2, "do_sample": True, "temperature": 0.9}
IDS = torch.arange(3, 23)[None]
# Free to edit: they change neither the model nor what is said of it.
FREE = ("README.md", "LICENSE")


def base(root: Path) -> str:
    folder = root / "base"
    if not folder.exists():
        tiny.save_dense(folder)
        (folder / "LICENSE").write_text("Apache License")
        (folder / "generation_config.json").write_text(json.dumps(SETTINGS, indent=2) + "\n")
    return str(folder)


def converted(root: Path, recipe) -> torch.nn.Module:
    """A converted model whose new parameters are not where they start."""
    model = sc.hub.load_dense(base(root))
    sc.convert(model, recipe)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or ".router." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def adapters():
    return RECIPES.camelidae(num_experts=2, adapter_dim=4, lora_rank=2)


def checkpoint(root: Path) -> Path:
    return sc.save(converted(root, adapters()), root / "checkpoint")


def sharded(root: Path) -> Path:
    model = converted(root, RECIPES.upcycling(num_experts=2))
    return sc.save(model, root / "sharded", shard_size=20_000)


def self_contained(root: Path) -> Path:
    model = converted(root, RECIPES.moefication(num_experts=4))
    return sc.save(model, root / "alone", standalone=True)


def pretrained(root: Path) -> Path:
    """As Trainer writes one, whose tokenizer comes after the model."""
    model = converted(root, RECIPES.moefication(num_experts=4))
    model.save_pretrained(root / "pretrained", max_shard_size="16KB")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(root / "pretrained")
    return root / "pretrained"


CHECKPOINTS = {
    "checkpoint": checkpoint,
    "sharded": sharded,
    "self-contained": self_contained,
    "save_pretrained": pretrained,
}
PEFT = {
    "SPARSECRAFT": lambda: RECIPES.lora(rank=2),
    "PESC": adapters,
    "MOV": lambda: RECIPES.mov(num_experts=2),
    "MOLORA": lambda: RECIPES.molora(num_experts=2, rank=2),
}


def adapter(root: Path, kind: str) -> Path:
    sc.export(converted(root, PEFT[kind]()), "peft", root / kind)
    assert json.loads((root / kind / "adapter_config.json").read_text())["peft_type"] == kind
    return root / kind


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def read(folder: Path) -> tuple:
    """What a folder's model computes, how it generates, and what its text becomes."""
    model, tokenizer = sc.load(folder), load_tokenizer(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "say red"}], tokenize=False)
    return logits(model), model.generation_config.to_dict(), tokenizer(chat).input_ids


def same(one: tuple, other: tuple) -> bool:
    return torch.equal(one[0], other[0]) and one[1:] == other[1:]


def flips(folder: Path, count: int) -> Iterator[Path]:
    """Flip one bit after the other, each undone before the next: of every file about as many."""
    draw, files = random.Random(0), sorted(p for p in folder.rglob("*") if p.is_file())
    for number in range(count):
        path = files[number % len(files)]
        data = path.read_bytes()
        bit = draw.randrange(8 * len(data))
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        yield path
        path.write_bytes(data)


def edit(path: Path, change) -> None:
    """Change a JSON file by hand."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2))
