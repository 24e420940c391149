"""The layers of a model by number: what a recipe's numbers by layer are for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sparsecraft.dense.linears import blocks
from sparsecraft.dense.mixtures import inside
from sparsecraft.dense.once import once


def layers_at(model: nn.Module, paths: Sequence[str]) -> tuple[list[str], list[int]]:
    """The layers of a model around some modules, and the number of the one that each is in.

    Layers are the transformer blocks of every list of blocks that holds one of the modules, in the
    model's order, so that an encoder's come before a decoder's, and a block without such a module
    counts. A module outside of every block is a layer of its own.

    Args:
        paths: of the modules.

    Returns:
        paths of the layers; for each of `paths` the number of its layer, from 0.
    """
    modules = dict(model.named_modules())
    known = once(("blocks", id(model)), lambda: blocks(modules))
    around = [next((block for block in known if inside(path, (block,))), path) for path in paths]
    lists = {layer.rpartition(".")[0] for layer in around if layer in known}
    counted = {*around, *(block for block in known if block.rpartition(".")[0] in lists)}
    layers = [path for path in modules if path in counted]
    number = {layer: n for n, layer in enumerate(layers)}
    return layers, [number[layer] for layer in around]
