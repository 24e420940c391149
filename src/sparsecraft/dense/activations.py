"""Activations that have tensors: parameters (xIELU, PReLU, learnable Swish) and buffers."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn


def tensors_of(activation: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers by their names in it."""
    return dict(activation.named_parameters()) | dict(activation.named_buffers())


def saved_tensors(activation: nn.Module) -> dict[str, Tensor]:
    """Those of them that a file holds: without them, a module is the same wherever it stands."""
    return activation.state_dict(keep_vars=True)


def placed(activation: nn.Module, tensors: Mapping[str, Tensor | None]) -> nn.Module:
    """A copy of an activation that holds these tensors under their names in it."""
    copied = copy.deepcopy(activation)
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = copied.get_submodule(path)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            owner._parameters[leaf] = None if tensor is None else nn.Parameter(tensor, False)
    return copied
