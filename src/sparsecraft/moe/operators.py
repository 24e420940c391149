"""Layers that stand in a compiled decoding step as one operator each, and run in it as they do
outside of a compiler, which knows no kernel that decides on the device what it reads, and none of
ours.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsecraft.kernels.device import in_compiled_step

if TYPE_CHECKING:
    from sparsecraft.moe.layer import MoELayer

NUMBERS = itertools.count(1)
LAYERS: weakref.WeakValueDictionary[int, MoELayer] = weakref.WeakValueDictionary()


def number(model: nn.Module) -> None:
    """Give each layer of the model a number that none other has; copies begin with another's."""
    for module in model.modules():
        if "operator" in vars(module) and LAYERS.get(module.operator) is not module:
            module.operator = next(NUMBERS)
            LAYERS[module.operator] = module


def stands_alone(layer: MoELayer) -> bool:
    """Whether the layer is to be one operator here."""
    return layer.operator > 0 and in_compiled_step()


def run(layer: MoELayer, x: Tensor, *args, **kwargs) -> Tensor:
    """The layer's output, of the width of its input, by the operator."""
    read = [*layer.parameters(), *layer.buffers()]
    return _layer(x, layer.operator, read)


@torch.library.custom_op("sparsecraft::layer", mutates_args=())
def _layer(x: Tensor, number: int, read: list[Tensor]) -> Tensor:
    y = LAYERS[number](x)
    return y.clone() if y is x else y


@_layer.register_fake
def _(x, number, read):
    return torch.empty_like(x)
