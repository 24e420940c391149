"""What files hold of a tensor that transformers renames, turns or merges when it loads a model.

Experts of a mixture are one stacked tensor in memory, and two or three tensors for each expert in
the files of Mixtral, Qwen-MoE, DeepSeek and most others. transformers knows how to write a model as
its files were; where each value goes is read off that, by writing the values' own places.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion


def renamed(model: nn.Module, name: str) -> str | None:
    """What the files call the model's tensor `name`; None if they hold it turned, or in parts."""
    whole = torch.empty(shape_of(model, name) or 0, device="meta")
    (found, part), *others = revert_weight_conversion(model, {name: whole}).items()
    return found if part is whole and not others else None


def parts(model: nn.Module, name: str, *, places: bool = False) -> dict[str, Tensor]:
    """Name in the files -> what that tensor is like, without memory, of all that they hold the
    model's tensor `name` in.

    Args:
        places: give where its values stand in the flattened tensor instead, as integers.
    """
    shape = shape_of(model, name)
    empty = torch.empty(shape, device="meta")
    whole = torch.arange(shape.numel()).view(shape) if places else empty
    return revert_weight_conversion(model, {name: whole})


def shape_of(model: nn.Module, name: str) -> torch.Size | None:
    """The shape of a dense tensor of a model, converted or not; None where a recipe has put
    something else in its place."""
    for found, tensor in model.state_dict(keep_vars=True).items():
        if found.replace(".base.", ".") == name:
            return tensor.shape
    return None
