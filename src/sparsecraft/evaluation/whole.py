"""The certificate of a model that was written, read or merged: what it gives for a probe beside
what ours gives.

Both compute in float32, whatever their type is: in half precision layers that are ten percent off
pass for rounding. Where memory does not hold a float32 copy of one of them, or weights are
quantized, they compute as they are, and a warning and the certificate's power say what that hides.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.checkpoint.space import free_memory, gigabytes
from sparsecraft.dense.probes import random_probe
from sparsecraft.dense.windows import long_probe, unprobed
from sparsecraft.evaluation.certificate import TOLERANCE, Certificate, compare
from sparsecraft.evaluation.lending import FLOATS, Lender
from sparsecraft.moe.buffers import near, unsaved
from sparsecraft.moe.names import unique_tensors
from sparsecraft.moe.outputs import outputs

log = logging.getLogger("sparsecraft")

# Largest difference of outputs in float32, relative to the largest of them: of sums in another
# order, through all layers of a model.
EQUAL = 1e-4


def certify(
    model: nn.Module,
    other: nn.Module,
    made: Mapping[str, Tensor] | None = None,
) -> Certificate:
    """Compare the outputs of two models that should compute the same function, beyond every window
    that can be probed.

    What a cast of `model` has rounded that is in no file, such as rotary frequencies, `other`
    computes with as well.

    Args:
        made: name of a tensor of `other` -> its value before it was rounded, if it was.
    """
    probes = [random_probe(model), *filter(None, [long_probe(model)])]
    dtype = wide_type(model, other)
    wanted, own = wide_outputs(model, probes, dtype), unsaved(model)
    rounded = {
        theirs: own[name].to(theirs.device)
        for name, theirs in unsaved(other).items()
        if name in own and near(own[name], theirs)
    }
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


def wide_outputs(
    model: nn.Module,
    probes: Sequence[dict[str, Any]],
    dtype: torch.dtype | None,
    values: Mapping[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """What a model gives for the probes, computed in `dtype`, or in its own type for None.

    Args:
        values: tensor of the model -> what to compute with in its place.
    """
    sources = {id(tensor): lambda v=value: v for tensor, value in (values or {}).items()}
    with Lender(sources).lent(model, dtype):
        return outputs(model, probes)


def wide_type(*models: nn.Module) -> torch.dtype | None:
    """The type of at least 32 bits in which models can be compared, one after the other; None, and
    a warning, if they cannot."""
    dtype = Lender().wide_type(*models)
    sizes = {model: _copied(model, dtype) for model in models if dtype}
    largest = max(sizes, key=sizes.get, default=None)
    if largest is None:
        why = "weights are quantized or offloaded"
    elif sizes[largest] <= free_memory(largest.device):
        return dtype
    else:
        why = f"a copy in float32 takes {gigabytes(sizes[largest])} of memory"
    own = min((model.dtype for model in models), key=lambda d: torch.finfo(d).bits)
    if TOLERANCE[own] > EQUAL:
        log.warning(
            "Compared in %s, because %s: an error below %.0e of the outputs would not be seen.",
            str(own).removeprefix("torch."),
            why,
            TOLERANCE[own],
        )
    return None


def _copied(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a model's floats in `dtype`, of those that are of another type."""
    tensors = (t for t in unique_tensors(model).values() if t.dtype in FLOATS)
    return sum(t.numel() * dtype.itemsize for t in tensors if t.dtype != dtype)
