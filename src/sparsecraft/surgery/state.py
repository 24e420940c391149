"""load_state_dict of a converted model: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparsecraft.errors import StateError
from sparsecraft.surgery.rollback import all_or_nothing

EXTRA = "_extra_state"


def load_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> Any:
    """As torch's own, which copies what fits before it says what does not; here that comes first.

    Raises:
        StateError: a name is missing or has no place, or a tensor has another shape.
        SparsecraftError: a gate or a split network cannot run as the state says.
    """
    # bitsandbytes writes packed weights anew to show them, and reads them in its own way.
    own = {} if getattr(model, "is_quantized", False) else model.state_dict()
    if own:
        _check(own, state_dict, strict)
    with all_or_nothing(model):
        # Before any tensor is overwritten: a state that a module refuses comes from here.
        for path, module in model.named_modules():
            key = f"{path}.{EXTRA}" if path else EXTRA
            if key in state_dict and key in own:
                module.set_extra_state(state_dict[key])
    found = type(model).load_state_dict(model, state_dict, strict=strict, assign=assign)
    model.sparsecraft.own_loss.meet_routers(model)  # what was noted is of other weights
    return found


def _check(own: Mapping[str, Any], state_dict: Mapping[str, Any], strict: bool) -> None:
    for found, known, says in (
        (own, state_dict, "lacks"),
        (state_dict, own, "holds what the model has no place for:"),
    ):
        missing = [name for name in found if name not in known]
        if strict and missing:
            raise StateError(
                f"The state dict {says} {', '.join(missing[:3])} ({len(missing)} in all); nothing "
                "was loaded. Convert the model by the recipe of the state dict, or pass "
                "strict=False."
            )
    for name, tensor in own.items():
        theirs = state_dict.get(name)
        tensors = isinstance(tensor, Tensor) and isinstance(theirs, Tensor)
        if tensors and not name.endswith(EXTRA) and theirs.shape != tensor.shape:
            raise StateError(
                f"{name!r} is {list(theirs.shape)} in the state dict and {list(tensor.shape)} in "
                "the model; nothing was loaded."
            )
