"""The one layer that every recipe installs: a router, a bank of experts, and the dense base.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

import fnmatch

import torch
from torch import Tensor, nn

from sparsecraft.donor import FFNSpan
from sparsecraft.errors import SparsecraftError
from sparsecraft.experts.base import Experts
from sparsecraft.recipe import Place
from sparsecraft.routers import Router
from sparsecraft.routing import Routing


class MoELayer(nn.Module):
    """Stands where a dense module F stood, with its call signature.

    The placements, with E the experts and w the routing weights:
        replace   y = sum_e w_e E_e(x)
        beside    y = F(x) + sum_e w_e E_e(x)
        after     y = sum_e w_e E_e(F(x))
        before    y = F(sum_e w_e E_e(x))

    The base runs once per token, whatever the number of experts. Without a router the bank's
    only expert sees every token.
    """

    def __init__(
        self,
        place: Place,
        experts: Experts,
        router: Router | None = None,
        base: nn.Module | None = None,
    ):
        super().__init__()
        self.place = place
        self.base = base
        self.router = router
        self.experts = experts
        self.tracing = False
        self.routing: Routing | None = None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        match self.place:
            case "replace":
                return self._mix(x, x)
            case "beside":
                y = self.base(x, *args, **kwargs)
                return y + self._mix(x, x, y)
            case "after":
                y = self.base(x, *args, **kwargs)
                return self._mix(y, x, y)
            case "before":
                return self.base(self._mix(x, x), *args, **kwargs)
        raise SparsecraftError(f"Unknown place {self.place!r}.")

    def _mix(self, inputs: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The experts' mixture on `inputs`; the router reads the layer's input x or output y."""
        inputs_TI = inputs.reshape(-1, inputs.shape[-1])
        if self.router is None:
            mixed_TO = self.experts(inputs_TI)
        else:
            read = y if self.router.spec.reads == "output" else x
            routing = self.router(read.reshape(-1, read.shape[-1]))
            if self.tracing:
                self.routing = routing
            mixed_TO = self.experts(inputs_TI, routing, self.router.spec.sums_to_one)
        return mixed_TO.reshape(*inputs.shape[:-1], mixed_TO.shape[-1])

    @property
    def weight(self) -> Tensor:
        """The base Linear's weight: some models read a Linear's dtype through it (T5)."""
        base = self.base
        if base is None or not isinstance(base.weight, torch.Tensor):
            raise AttributeError("this layer stands on no single weight")
        return base.weight

    def extra_repr(self) -> str:
        return f"place={self.place!r}"


def set_dispatch(model: nn.Module, path: str) -> None:
    """Make every bank of experts in `model` run by one path: auto, loop, grouped or dense."""
    from sparsecraft.kernels import PATHS

    if path not in ("auto", *PATHS):
        raise SparsecraftError(f"Unknown dispatch {path!r}; known: auto, {', '.join(PATHS)}.")
    for module in model.modules():
        if isinstance(module, Experts):
            module.dispatch = path


def dense_name(model: nn.Module, name: str) -> str | None:
    """The name that a tensor of the converted model had in the dense one; None if it is new."""
    module, path = model, ""
    *parents, leaf = name.split(".")
    for part in parents:
        if isinstance(module, MoELayer):
            if part != "base":
                return None
        elif isinstance(module, FFNSpan):
            path = module.paths[part]
        else:
            path = f"{path}.{part}" if path else part
        module = module.get_submodule(part)
    if isinstance(module, MoELayer):
        return None
    return f"{path}.{leaf}" if path else leaf


def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Dense name -> tensor for what the dense model shares with the converted one.

    Each shared storage appears once, under its first name, as in `named_parameters`.
    """
    return {
        dense: tensor
        for name, tensor in unique_tensors(model).items()
        if (dense := dense_name(model, name)) is not None
    }


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or persistent buffer, tied ones once."""
    # Not by the keys of state_dict(): bitsandbytes repacks a 4-bit weight to write it, which on
    # the CPU changes its values.
    hidden = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    buffers = {name: b for name, b in model.named_buffers() if name not in hidden}
    return dict(model.named_parameters()) | buffers


def matches(parameter_name: str, word: str) -> bool:
    """Whether a word of `Stage.trains` covers the parameter."""
    if word == "all":
        return True
    if word in ("experts", "router"):
        return f".{word}." in f".{parameter_name}"
    return fnmatch.fnmatch(parameter_name, word)
