"""The tensors of a model as the process that writes them needs them: whole, with their values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparsecraft.dense.sharing import gathered
from sparsecraft.errors import CheckpointError
from sparsecraft.moe.names import unique_tensors

# What torch.compile and DDP put before a name.
WRAPPERS = ("_orig_mod.", "module.")


def whole_tensors(model: nn.Module, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Name -> tensor, tied ones once. Of a sharded model every process has to ask (FSDP2, tensor
    parallelism); what accelerate has offloaded is read from where it lies.

    Args:
        given: the model's state dict, where it has been gathered already.

    Raises:
        CheckpointError: `given` is of another model, or tensors have no values anywhere.
    """
    known = unique_tensors(model)
    if given is not None:
        return _of_state(model, known, given)
    modules = dict(model.named_modules())
    found = {name: _whole(modules, name, tensor) for name, tensor in known.items()}
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        # Offloaded, tied tensors are two.
        if {name, source} <= found.keys() and torch.equal(found[name], found[source]):
            del found[name]
    return found


def _whole(modules: Mapping[str, nn.Module], name: str, tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return gathered(tensor)
    if not tensor.is_meta:
        return tensor
    path, _, leaf = name.rpartition(".")
    held = getattr(getattr(modules[path], "_hf_hook", None), "weights_map", None)
    if held is None:
        raise CheckpointError(
            f"{name!r} is on the meta device and has no values to save; load the model whole."
        )
    return held[leaf]


def _of_state(
    model: nn.Module, known: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    found = {unwrapped(name): tensor for name, tensor in given.items()}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)} | set(known)
    others = [n for n in found if n not in names and not n.endswith("_extra_state")]
    missing = [name for name in known if name not in found]
    if others or missing:
        what = f"holds {others[0]!r}, which" if others else f"lacks {missing[0]!r}, which"
        verb = "has no place for" if others else "has"
        raise CheckpointError(
            f"The state_dict that was given {what} this {type(model).__name__} {verb}; give "
            "accelerator.get_state_dict(model), or none."
        )
    for name, tensor in known.items():
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"The state_dict that was given has {name!r} as {list(found[name].shape)}, and the "
                f"model as {list(tensor.shape)}."
            )
    return {name: found[name] for name in known}


def unwrapped(name: str) -> str:
    """The name that a tensor or a module has in the model inside."""
    for prefix in WRAPPERS:
        name = name.removeprefix(prefix)
    return name
