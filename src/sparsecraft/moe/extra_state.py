"""Settings of a module that change what it computes, as a tensor in its `state_dict`.

They are JSON in bytes, so that safetensors and other libraries' state dicts take them, and of few
sizes, so that a checkpoint that is read into existing tensors finds them as long as they were.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsecraft.dense.jsonfile import parse
from sparsecraft.errors import SparsecraftError

# Bytes of which the tensor's size is a multiple; the rest is spaces.
BLOCK = 1024

Check = Callable[[Any], bool]


def pack(settings: dict[str, Any]) -> Tensor:
    """The settings as uint8, on the CPU."""
    text = json.dumps(settings).encode()
    padded = text + b" " * (-len(text) % BLOCK)
    return torch.tensor(list(padded), dtype=torch.uint8, device="cpu")


def unpack(state: Any, owner: str, checks: Mapping[str, Check]) -> dict[str, Any]:
    """The settings in a tensor that `pack` gave.

    Args:
        owner: what has them, for sentences.
        checks: name of each setting -> whether a value of it makes sense.

    Raises:
        SparsecraftError: it holds something else.
    """
    advice = "load the state_dict() of a model that the same recipe has converted."
    try:
        if state.dtype != torch.uint8 or state.ndim != 1:
            raise ValueError(f"it is {state.dtype} of shape {list(state.shape)}")
        if state.is_meta:
            raise ValueError("it has no memory, on the meta device")
        found = parse(bytes(state.tolist()), SparsecraftError)
        if not (isinstance(found, dict) and found.keys() == checks.keys()):
            raise ValueError(f"it should hold {', '.join(checks)}")
    except (AttributeError, ValueError, RecursionError, SparsecraftError) as error:
        raise SparsecraftError(
            f"The state dict's _extra_state of a {owner} cannot be read ({error}); {advice}"
        ) from None
    for name, check in checks.items():
        if not check(found[name]):
            raise SparsecraftError(
                f"The state dict's _extra_state of a {owner} has {name}={found[name]!r:.80}, "
                f"which this one cannot have; {advice}"
            )
    return found


def is_left_out(state: Any) -> bool:
    """Whether torch's `set_model_state_dict` stands it where a part of a state dict, one file of
    several, holds none: as it fills in tensors, by what the module has."""
    return type(state).__name__ == "_EXTRA_STATE"


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a number that a float32 holds: not infinite, and not NaN."""
    is_any = isinstance(value, (int, float)) and not is_bool(value)
    return is_any and abs(value) <= torch.finfo(torch.float32).max
