"""Converted models in float64, and copies of their new parameters for a reference to train."""

from __future__ import annotations

import torch
from torch import nn

import sparsecraft as sc
from sparsecraft.moe.experts.base import set_dispatch
from sparsecraft.moe.layer import MoELayer
from tests.cases import batch, dense, randomize_new

# Roles of `reference/installed.py`.
ALL = ("query", "key", "value", "output", "gate", "up", "down")
FFN = ("gate", "up", "down")


def exact(family: str) -> nn.Module:
    """The dense model in float64: what differs by more than rounding differs in its equation."""
    return dense(family).double()


def converted(family: str, recipe: sc.Recipe, path: str = "auto") -> nn.Module:
    model = exact(family)
    sc.convert(model, recipe)
    randomize_new(model, std=0.2)
    set_dispatch(model, path)
    return model


def small(family: str) -> dict[str, torch.Tensor]:
    return {name: value[:2, :3] for name, value in batch(family).items()}


def near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-9) -> bool:
    return (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


def objective(values: torch.Tensor) -> torch.Tensor:
    """A loss that depends on every logit."""
    return (values * torch.linspace(-1, 1, values.numel()).view_as(values).sin()).sum()


class Leaves:
    """Copies of the converted model's new parameters, by name, for the transcription to train."""

    def __init__(self, model: nn.Module):
        self.model, self.of = model, {}

    def leaf(self, name: str) -> torch.Tensor:
        assert name not in self.of
        self.of[name] = self.model.get_parameter(name).detach().clone().requires_grad_()
        return self.of[name]

    def layers(self, path: str, rows=None) -> list[str]:
        """Paths of the layers at a module that act on these rows, the outermost first."""
        found, layer = [], self.model.get_submodule(path)
        while isinstance(layer, MoELayer):
            if layer.rows == rows:
                found.append(path)
            path, layer = f"{path}.base", layer.base
        return found

    def at(self, path: str, rows=None) -> list[torch.Tensor]:
        """Router (None without one) and the experts' tensors of the one layer there."""
        (path,) = self.layers(path, rows)
        names = dict(self.model.get_submodule(path).named_parameters())
        router = (
            self.leaf(f"{path}.router.scorer.weight") if "router.scorer.weight" in names else None
        )
        kinds = ("vectors", "lora_A", "lora_B")
        return [
            router,
            *(self.leaf(f"{path}.experts.{k}") for k in kinds if f"experts.{k}" in names),
        ]
