"""The certificate: how far the converted model is from the dense one, and what that would show."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.data.batches import as_batches
from sparsecraft.dense.probes import PROBE_SHAPE, random_probe

# Largest |difference| of a model's outputs that counts as the same function, relative to the
# largest |output| (at least 1): a reordered sum of a few thousand products, through a few dozen
# layers.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# What of the user's data enters the certificate: all logits are kept until the comparison.
MAX_DATA_PROBES, DATA_LENGTH = 4, 128
# How many names a sentence lists.
NAMED = 3


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was measured on the probe batches: of each converted layer beside the dense module that
    it stands for, on the hidden states that arrive there; or of a model's outputs.

    Attributes:
        max_difference: largest |converted - dense|, of the layer where it is largest for the size
            of the output; with `layers` 0, over the outputs of the whole model.
        scale: what it is relative to: in a layer |dense output| there plus the root mean square of
            that token's; of outputs, the largest.
        tolerance: the difference up to which the two count as equal, at this scale.
        dtype: in which the two were computed, whatever the model's is.
        probes: how many batches were compared, the random one included.
        layers: how many were converted; 0 if outputs were compared.
        ran: how many of them the probes reached. The numbers above are of these.
        unreached: paths of the others.
        alone: how many of the others gave what the dense module gives for random hidden states,
            which proves the layer and not that it stands where it should.
        experts: of the layers that ran, those that a router chooses from.
        chosen: how many of them tokens went to.
        forced: how many of the others were run all the same, as if all tokens had chosen them.
        power: the smallest relative change of a layer's whole output that would have been seen, of
            the layer where it is largest: measured, by scaling the outputs that were compared until
            they count as different. Of a model's outputs, the smallest change relative to the
            largest of them. None if all outputs were zero.
        worst: path of the layer that the numbers are of.
        lifted: how many layers were computed in a wider type than the model's; a quantized one
            cannot be.
        logit_difference, logit_scale: of the whole model's outputs, in its own dtype, before and
            after; None where it does not fit into memory. In half precision they prove little.
        claimed: whether the two should be equal: the recipe says so, and its experts are copies of
            the model and not of sources.
        rounding: of outputs, the largest difference once the weights that were made are rounded to
            the type that holds them; None if they are not.
        tokens: of the longest probe, where a model was compared with one that was written or read.
        twin: of the longest probe of a small twin with the same windows, where those are too long
            for a probe of the model.
        unprobed: windows beyond which neither was compared.
        differs: what else is not as in the dense model.
    """

    max_difference: float
    scale: float
    tolerance: float
    dtype: str
    probes: int
    layers: int = 0
    ran: int = 0
    unreached: tuple[str, ...] = ()
    alone: int = 0
    experts: int = 0
    chosen: int = 0
    forced: int = 0
    power: float | None = None
    worst: str | None = None
    lifted: int = 0
    logit_difference: float | None = None
    logit_scale: float | None = None
    claimed: bool = True
    rounding: float | None = None
    tokens: int = 0
    twin: int = 0
    unprobed: tuple[int, ...] = ()
    differs: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether all that ran is equal."""
        nothing = self.layers > 0 and self.ran + self.alone == 0
        return self.max_difference <= self.tolerance and not self.differs and not nothing

    def __str__(self) -> str:
        lines = [self._verdict(), *self._details()] if self.layers else self._of_outputs()
        return "; ".join([*lines, *self.differs[:NAMED]])

    def _of_outputs(self) -> list[str]:
        lines = [
            f"max |logit difference| {self.max_difference:.1e} on {self.probes} probe "
            f"batch(es), logit scale {self.scale:.1f}, tolerance {self.tolerance:.1e} "
            f"in {self.dtype}: {'equal' if self.exact else 'different'}"
        ]
        if self.rounding is not None:
            lines.append(f"{self.rounding:.1e} with rounded weights")
        if self.power is not None:
            length = f" in {self.tokens} tokens" if self.tokens else ""
            lines.append(f"an error of {self.power:.0e} of that scale{length} would be seen")
        if self.twin:
            lines.append(f"a small twin with the same windows was compared in {self.twin} tokens")
        if self.unprobed:
            lines.append(f"NOT compared beyond windows of {', '.join(map(str, self.unprobed))}")
        return lines

    def _verdict(self) -> str:
        word = "exact" if self.exact else "different"
        where = f"{self.ran} of {self.layers} layers" if self.unreached else f"{self.ran} layers"
        measured = (
            f"of each beside its dense module, max |output difference| {self.max_difference:.1e} "
            f"(tolerance {self.tolerance:.1e}, output scale {self.scale:.2g}) in {self.dtype} on "
            f"{self.probes} probe batch(es)"
        )
        return f"{word} in {where}: {measured}" + (
            f", at {self.worst}" if self.worst and not self.exact else ""
        )

    def _details(self) -> list[str]:
        lines = [] if self.claimed or self.exact else ["no equality was claimed"]
        if self.power is not None:
            lines.append(f"an error of {self.power:.0e} in any of them would be seen")
        if self.unreached:
            lines.append(
                f"{len(self.unreached)} did not run on the probe: {_some(self.unreached)} "
                f"({self.alone} of them equal on random hidden states)"
            )
        if self.chosen < self.experts:
            others = f"; {self.forced} of the others were run as if all had" if self.forced else ""
            lines.append(f"tokens chose {self.chosen} of {self.experts} experts{others}")
        if self.logit_difference is not None:
            logits = f"{self.logit_difference:.1e} at scale {self.logit_scale:.1f}"
            lines.append(f"max |logit difference| {logits}")
        return lines


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def probes(model: nn.Module, data: Any, tokenizer: Any, seed: int) -> list[dict[str, Tensor]]:
    """A random batch, and the first of the user's."""
    found = [random_probe(model, seed)]
    if data is not None:
        shape = {"batch_size": PROBE_SHAPE[0], "max_length": DATA_LENGTH}
        batches = as_batches(data, tokenizer, model=model, **shape)
        found += islice(batches, MAX_DATA_PROBES)
    return found


def compare(dense: list[Tensor], converted: list[Tensor], least: float = 0.0) -> Certificate:
    """The largest difference between two lists of outputs.

    Args:
        least: relative to the largest output, what counts as equal in any type.
    """
    dtype = dense[0].dtype
    pairs = zip(dense, converted, strict=True)
    # The maximum of a tensor, not of Python: it lets a NaN through.
    differences = torch.stack([(c - d).abs().max() for d, c in pairs])
    difference = differences.max().item()
    scale = max(d.abs().max().item() for d in dense)
    tolerance = max(TOLERANCE[dtype], least) * max(1.0, scale)
    return Certificate(
        max_difference=difference,
        scale=scale,
        tolerance=tolerance,
        power=tolerance / scale if scale else None,
        dtype=str(dtype).removeprefix("torch."),
        probes=len(dense),
    )
