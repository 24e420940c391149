"""A small dense folder, and checkpoints of four recipes on it, for other people's programs."""

from __future__ import annotations

from pathlib import Path

import torch

import sparsecraft as sc
from sparsecraft.surgery.budget import set_budget, split_layers
from tests import tiny

RECIPES = {
    "camelidae": lambda: sc.recipes.camelidae(num_experts=4, adapter_dim=8, lora_rank=4),
    "molora": lambda: sc.recipes.molora(num_experts=4, rank=2),
    "upcycling": lambda: sc.recipes.upcycling(num_experts=4),
    "moefication": lambda: sc.recipes.moefication(num_experts=4),
}
IDS = torch.arange(5, 25).reshape(2, 10)


def converted(folder: Path, name: str) -> torch.nn.Module:
    """A converted model whose new parameters are not where they start, on the base in `folder`."""
    base = folder / "base"
    model = sc.hub.load_dense(str(base) if base.exists() else tiny.save_dense(base))
    sc.convert(model, RECIPES[name]())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, sc.MoELayer)):
            for part in (layer.experts, layer.router):
                for parameter in part.parameters() if part is not None else ():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    if split_layers(model):
        set_budget(model, None)
    return model


def checkpoint(folder: Path, name: str) -> str:
    """A checkpoint that another program is given the path of."""
    return str(sc.save(converted(folder, name), folder / "moe"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        found = model(IDS).logits
    model.train(training)
    return found
