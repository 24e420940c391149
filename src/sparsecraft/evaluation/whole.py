"""The certificate of a model that was written, read or merged: what it gives for a probe beside
what ours gives.

Both compute in float32, whatever their type is: in half precision layers that are ten percent off
pass for rounding. Where memory does not hold a float32 copy of one of them, or weights are
quantized, they compute as they are, and a warning and the certificate's power say what that hides.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsecraft.checkpoint.wide import wide_outputs, wide_type
from sparsecraft.dense.probes import random_probe
from sparsecraft.dense.windows import long_probe, unprobed
from sparsecraft.evaluation.certificate import TOLERANCE, Certificate, compare
from sparsecraft.moe.buffers import alike
from sparsecraft.moe.names import unique_tensors

log = logging.getLogger("sparsecraft")

# Largest difference of outputs in float32, relative to the largest of them: of sums in another
# order, through all layers of a model.
EQUAL = 1e-4


def certify(
    model: nn.Module, other: nn.Module, made: Mapping[str, Tensor] | None = None
) -> Certificate:
    """Compare the outputs of two models that should compute the same function, beyond every window
    that can be probed.

    What a cast of `model` has rounded that is in no file, such as rotary frequencies, `other`
    computes with as well.

    Args:
        made: name of a tensor of `other` -> its value before it was rounded, if it was.
    """
    probes = [random_probe(model), *filter(None, [long_probe(model)])]
    dtype = arithmetic(model, other)
    wanted = wide_outputs(model, probes, dtype)
    rounded, _ = alike(model, other)
    after = wide_outputs(other, probes, dtype, rounded)
    held = unique_tensors(other)
    exact = {
        held[name]: value
        for name, value in (made or {}).items()
        if dtype and name in held and held[name].dtype != value.dtype
    }
    before = wide_outputs(other, probes, dtype, rounded | exact) if exact else None
    return replace(
        compared(wanted, after, before, other.dtype),
        tokens=max(next(iter(probe.values())).shape[1] for probe in probes),
        unprobed=tuple(unprobed(model)),
    )


def compared(
    wanted: list[Tensor],
    after: list[Tensor],
    exact: list[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Certificate:
    """The certificate of outputs.

    Args:
        exact: what is given before weights are rounded to `dtype`, if they are.
    """
    if exact is None:
        return compare(wanted, after, EQUAL)
    found = compare(wanted, exact, EQUAL)
    rounded = compare(wanted, after, max(EQUAL, TOLERANCE[dtype]))
    word = f"rounded to {str(dtype).removeprefix('torch.')}, the weights make it another model"
    differs = () if rounded.exact else (word,)
    return replace(found, rounding=rounded.max_difference, differs=differs)


def arithmetic(*models: nn.Module) -> torch.dtype | None:
    """What `wide_type` says of models; a warning, if it makes them be compared in less."""
    dtype, why = wide_type(*models)
    own = min((model.dtype for model in models), key=lambda d: torch.finfo(d).bits)
    if dtype is None and TOLERANCE[own] > EQUAL:
        log.warning(
            "Compared in %s, because %s: an error below %.0e of the outputs would not be seen.",
            str(own).removeprefix("torch."),
            why,
            TOLERANCE[own],
        )
    return dtype
