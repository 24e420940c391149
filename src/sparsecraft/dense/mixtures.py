"""Mixtures of experts that a model has of its own, before any conversion.

Their experts are one module with stacked tensors, or a list of networks; a router beside it chooses
some for each token. Nothing of ours enters them: an expert sees only the tokens that it gets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsecraft.dense.forms import join

# What families call the number of experts that a token goes to, on a module or in the config.
TOP_K = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "num_selected_experts",
)


@dataclass(frozen=True, slots=True)
class Mixture:
    """The experts of one mixture.

    Attributes:
        path: of the module that holds all of them.
        owner: path of the module that holds them with their router.
        num_experts: how many they are.
        top_k: how many of them a token meets; all where nothing says it.
        is_network: whether `owner` is the feed-forward network of a block, and no attention and not
            the block itself.
    """

    path: str
    owner: str
    num_experts: int
    top_k: int
    is_network: bool


def mixtures(model: nn.Module) -> list[Mixture]:
    """Every mixture of a model, in its order."""
    modules, found = dict(model.named_modules()), []
    for path, module in modules.items():
        if not _holds_experts(path, module) or inside(path, [m.path for m in found]):
            continue
        count = _num_experts(module)
        if count is None:
            continue
        owner = path.rpartition(".")[0]
        found.append(
            Mixture(
                path=path,
                owner=owner,
                num_experts=count,
                top_k=min(count, _top_k(model, module, modules[owner]) or count),
                is_network=_is_network(owner, modules),
            )
        )
    return found


def inside(path: str, owners: list[str] | tuple[str, ...]) -> bool:
    """Whether a module is one of `owners` or below one."""
    return f"{path}.".startswith(tuple(f"{owner}." for owner in owners))


def routers(model: nn.Module, found: list[Mixture]) -> set[str]:
    """Paths of all that chooses between experts, or weighs a shared one."""
    paths = set()
    for mixture in found:
        around = model.get_submodule(mixture.owner)
        for name, module in around.named_children():
            asks = name.endswith(("gate", "router")) or "Router" in type(module).__name__
            if asks and join(mixture.owner, name) != mixture.path:
                paths.add(join(mixture.owner, name))
    return paths


def _holds_experts(path: str, module: nn.Module) -> bool:
    name, cls = path.rpartition(".")[2], type(module).__name__
    return not name.startswith("shared") and (name == "experts" or cls.endswith("Experts"))


def _is_network(owner: str, modules: dict[str, nn.Module]) -> bool:
    path = owner
    while path and not isinstance(modules[path], GradientCheckpointingLayer):
        if "Attention" in type(modules[path]).__name__:
            return False
        path = path.rpartition(".")[0]
    return path != owner


def _num_experts(module: nn.Module) -> int | None:
    """Of stacked experts the first dimension, else the number of networks."""
    stacked = [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3]
    for value in (getattr(module, "num_experts", None), *stacked):
        if isinstance(value, int):
            return value
    networks = list(module.children())
    is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return len(networks) if is_list and networks else None


def _top_k(model: nn.Module, experts: nn.Module, around: nn.Module) -> int | None:
    """How many experts a token meets, as the modules or the config say; of Switch and NLLB, whose
    routers say it by their class alone, one and two."""
    config: Any = model.config.get_text_config()
    for place in (experts, around, *around.children(), config):
        for value in (getattr(place, name, None) for name in TOP_K):
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    classes = "".join(type(child).__name__ for child in around.children())
    return next((k for k in (1, 2) if f"Top{k}" in classes), None)
