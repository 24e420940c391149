"""What a tensor is called in the dense model and in the converted one."""

from __future__ import annotations

import re

from torch import Tensor, nn

from sparsecraft.dense.sites import FFNSpan
from sparsecraft.moe.layer import MoELayer


def pattern_of(name: str) -> str:
    """The name with every number in it as `*`, which the tensors of all layers share."""
    return re.sub(r"\[\d+\]", "[*]", re.sub(r"(?<=\.)\d+(?=\.)", "*", name))


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


def other_names(model: nn.Module) -> dict[str, str]:
    """Each further name of a parameter that several modules share -> its first one."""
    first: dict[nn.Parameter, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    found = {name: first.setdefault(parameter, name) for name, parameter in named}
    return {name: known for name, known in found.items() if name != known}


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
