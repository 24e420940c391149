"""Modules in a model that its class does not build from its configuration.

A checkpoint names a class and a configuration, and a loader builds the model from these. A
LoRA that stands unmerged, a pruning mask, a parametrization, a quantizer's or a user's own module
would not be there again.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from sparsecraft.errors import SurgeryError

NAMED = 3


def check_own(model: nn.Module) -> None:
    """Refuse a model with modules that its configuration does not build, or without layers that it
    does.

    Raises:
        SurgeryError: names them, and what to do.
    """
    twin = _twin(model)
    if twin is None:
        return
    ours, theirs = dict(model.named_modules()), dict(twin.named_modules())
    quantized = getattr(model, "quantization_method", None) is not None
    foreign = [
        f"{path} ({type(module).__name__})"
        for path, module in ours.items()
        if path and not _built(module, theirs.get(path), quantized)
    ]
    if foreign:
        raise SurgeryError(
            f"{len(foreign)} modules of this {type(model).__name__} are not what its "
            f"configuration builds, so that nothing could build them again: "
            f"{', '.join(foreign[:NAMED])}. {_advice(model)}"
        )
    lists = [path for path, module in theirs.items() if isinstance(module, nn.ModuleList)]
    short = [p for p in lists if p in ours and len(ours[p]) < len(theirs[p])]
    if short:
        raise SurgeryError(
            f"{short[0]} of this {type(model).__name__} holds {len(ours[short[0]])} modules and "
            f"its configuration says {len(theirs[short[0]])}, so that a checkpoint could not be "
            "loaded again; change the configuration too (num_hidden_layers, layer_types)."
        )


def _twin(model: nn.Module) -> nn.Module | None:
    """What the model's class makes of its configuration, without memory; None if it wants more."""
    try:
        with torch.device("meta"):
            return type(model)(copy.deepcopy(model.config))
    except Exception:  # a class of the user's own may want anything
        return None


def _built(module: nn.Module, theirs: nn.Module | None, quantized: bool) -> bool:
    """Whether a module is the one that the configuration builds; of a quantized model, the Linear
    of a quantizer stands for one."""
    if theirs is None:
        return False
    if quantized:
        return _class(module) == _class(theirs) or isinstance(module, nn.Linear)
    tensors = {*module._parameters, *module._buffers} - {*theirs._parameters, *theirs._buffers}
    plain = all(
        type(p).__module__.startswith("torch.")
        for p in module._parameters.values()
        if p is not None
    )
    return _class(module) == _class(theirs) and not tensors and plain


def _class(module: nn.Module) -> tuple[str, str]:
    """By name: torch makes one anew for each module that it parametrizes."""
    return type(module).__module__, type(module).__qualname__


def _advice(model: nn.Module) -> str:
    kinds = {type(module).__module__.split(".")[0] for module in model.modules()}
    if "peft" in kinds:
        return (
            "PEFT's layers stand in it: merge the adapter first, "
            "`peft_model = peft_model.merge_and_unload()`."
        )
    return (
        "Make them permanent (torch.nn.utils.prune.remove, parametrize.remove_parametrizations), "
        "or convert the model as its class builds it."
    )
