"""How far a layer's output is from its dense module's, and how small a difference that would show.

Shapes: T tokens, O output features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Largest difference of a layer that counts as equal, relative to its output at the same feature
# plus the root mean square of that token's. Sums of some ten thousand products in float32 differ by
# less when they are reordered; where one does not, float64 decides. In half precision nothing finer
# can be distinguished from rounding.
EQUAL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}

SCALED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Distance:
    """Of one output to another, where it is largest relative to `scale`."""

    difference: float
    scale: float
    dtype: torch.dtype

    @property
    def relative(self) -> float:
        if not self.scale:
            return math.inf if self.difference else 0.0
        return self.difference / self.scale

    @property
    def tolerance(self) -> float:
        return EQUAL[self.dtype]

    @property
    def equal(self) -> bool:
        return self.relative <= self.tolerance  # not so for a NaN

    @property
    def rank(self) -> tuple[bool, float]:
        """Orders distances; a NaN is larger than anything."""
        share = self.relative / self.tolerance
        return share != share, share


def distance(found: Any, wanted: Any) -> Distance:
    """How far `found` is from `wanted`, two outputs of one module."""
    f_TO, w_TO = first_tensor(found), first_tensor(wanted)
    if torch.equal(f_TO, w_TO):
        return Distance(0.0, w_TO.abs().mean().item(), w_TO.dtype)
    share, difference, scale = _shares(f_TO, w_TO)
    at = share.flatten().argmax()  # of a NaN, if there is one
    return Distance(difference.flatten()[at].item(), scale.flatten()[at].item(), w_TO.dtype)


def mean_distance(found: Any, wanted: Any) -> float:
    """The root mean square over all outputs of the relative differences."""
    share, _, _ = _shares(first_tensor(found), first_tensor(wanted))
    return share.pow(2).mean().sqrt().item()


def power(found: Any, wanted: Any) -> float | None:
    """The smallest error of `found` that `distance` would not let pass, by trying: all of it is
    scaled, by more and more. None if nothing shows, as in an output of zeros."""
    wanted = first_tensor(wanted)
    # A few tokens show no more than all of them do.
    f_TO, w_TO = (t.flatten(0, -2)[:SCALED_TOKENS] for t in (first_tensor(found), wanted))
    f_TO, error = f_TO.double(), EQUAL[w_TO.dtype]
    while error < 1:
        if not distance(f_TO * (1 + error), w_TO).equal:
            return error
        error *= 1.25
    return None


def first_tensor(output: Any) -> Tensor:
    """A module's output without what else it returns, such as attention's weights."""
    return output if isinstance(output, Tensor) else first_tensor(output[0])


def _shares(f_TO: Tensor, w_TO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|f - w| relative to the scale there, that difference, and that scale."""
    dtype = torch.promote_types(torch.promote_types(f_TO.dtype, w_TO.dtype), torch.float32)
    f_TO, w_TO = f_TO.to(dtype), w_TO.to(dtype)
    difference = (f_TO - w_TO).abs()
    # Each feature by its own size, so that outliers among tokens and features hide no other; plus
    # the token's, because a sum that cancels has the error of its terms.
    scale = w_TO.abs() + w_TO.pow(2).mean(-1, keepdim=True).sqrt()
    share = torch.where(difference == 0, difference, difference / scale)
    return share, difference, scale
