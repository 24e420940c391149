"""Mixtures of experts that a model has of its own, before any conversion.

Their experts are one module with stacked tensors, a list of networks, or tables and stacked tensors
of the network itself (Doge: a row is an expert); a router beside them chooses some for each token.
Nothing of ours enters them: an expert sees only the tokens that it gets.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """The experts of one mixture, or one of their tensors.

    Attributes:
        path: of the module, or the parameter, that holds all of them.
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
    for owner, module in modules.items():
        for name, count in _experts(module):
            path = join(owner, name)
            if inside(path, [m.path for m in found]):
                continue
            known = _top_k(model, getattr(module, name), module) or count
            is_network = _is_network(owner, modules)
            found.append(Mixture(path, owner, count, min(count, known), is_network))
    return found


def tensors(model: nn.Module, mixture: Mixture) -> list[nn.Parameter]:
    """Those that the experts are."""
    part = getattr(model.get_submodule(mixture.owner), mixture.path.rpartition(".")[2])
    return [part] if isinstance(part, nn.Parameter) else [*part.parameters()]


def inside(path: str, owners: list[str] | tuple[str, ...]) -> bool:
    """Whether a module is one of `owners` or below one."""
    return f"{path}.".startswith(tuple(f"{owner}." for owner in owners))


def routers(model: nn.Module, found: list[Mixture]) -> set[str]:
    """Paths of all that chooses between experts, or weighs a shared one."""
    paths = set()
    for mixture in found:
        for name, module in model.get_submodule(mixture.owner).named_children():
            if _chooses(name, module) and join(mixture.owner, name) != mixture.path:
                paths.add(join(mixture.owner, name))
    return paths


def _chooses(name: str, module: nn.Module) -> bool:
    return name.endswith(("gate", "router")) or "Router" in type(module).__name__


def _experts(owner: nn.Module) -> Iterator[tuple[str, int]]:
    """Names in a module of what holds experts, and how many."""
    children = dict(owner.named_children())
    held = {name: _num_experts(part) for name, part in children.items() if _holds(name, part)}
    if not held and any(_chooses(*child) for child in children.items()):
        held = {n: c.num_embeddings for n, c in children.items() if isinstance(c, nn.Embedding)}
        held |= {n: len(p) for n, p in owner.named_parameters(recurse=False) if p.ndim == 3}
        if len({*held.values()}) != 1 or 1 in held.values():  # they are no experts
            return
    yield from ((name, count) for name, count in held.items() if count is not None)


def _holds(name: str, module: nn.Module) -> bool:
    cls = type(module).__name__
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
