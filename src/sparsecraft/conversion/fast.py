"""The form of a model for inference: what can be dense weights is, what can be stacked is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sparsecraft.checkpoint.wide import wide_outputs
from sparsecraft.conversion.merging.merge import MergeReport, merge
from sparsecraft.conversion.merging.mergeable import plan_steps
from sparsecraft.dense import memory
from sparsecraft.dense.probes import random_probe
from sparsecraft.dense.sound import check_weights
from sparsecraft.errors import CertificateError, MergeError, SurgeryError
from sparsecraft.evaluation.certificate import Certificate, compare
from sparsecraft.evaluation.whole import EQUAL, arithmetic
from sparsecraft.moe.decoding.generate import generates_fast
from sparsecraft.moe.fusions import join
from sparsecraft.moe.outputs import outputs
from sparsecraft.surgery.identity import bears
from sparsecraft.surgery.record import check_stands, conversion_of, is_converted
from sparsecraft.surgery.rollback import all_or_nothing, atomic


@dataclass(frozen=True, slots=True)
class FastReport:
    """What `fast` did.

    Attributes:
        merged: what became dense weights; None where nothing did.
        joined: layer name -> kind of the experts that were stacked.
        kept: layer name -> kind of the experts that run as before.
        why_not_merged: why layers that could be dense weights are none, if so.
        certificate: against the model before, in its own dtype.
    """

    merged: MergeReport | None
    joined: dict[str, str]
    kept: dict[str, str]
    why_not_merged: str | None
    certificate: Certificate

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        folded = 0 if self.merged is None else len(self.merged.folded)
        lines = [
            f"Form for inference: {folded} layers are dense weights, {_counted(self.joined)} "
            f"stacked, {_counted(self.kept)} run as before. {self.certificate}."
        ]
        if self.why_not_merged:
            lines.append(f"Not merged: {self.why_not_merged}")
        return "\n".join(lines)


@atomic
@memory.enough_memory("The form for inference", "load the model in bfloat16")
def fast(model: nn.Module) -> FastReport:
    """Give a converted model its form for inference, in place.

    LoRAs of one expert become part of the dense weights, as `sc.merge` makes them; MoLORA's and
    MoV's matrices are stacked, so that a token costs a few operations a layer. The model computes
    what it did, is in evaluation mode, and can neither train nor be changed or saved: the
    checkpoint is what it was, and is loaded again for that.

    Raises:
        SurgeryError: the model is dense, or has this form.
        CertificateError: the form computes something else; the model has been given back.
    """
    check_stands(model)
    check_weights(model, SurgeryError)
    probes = [random_probe(model)]
    before = outputs(model, probes)
    merged, why = _merge(model, probes, before)
    joined, kept = _join(model, probes) if is_converted(model) else ({}, {})
    certificate = _same(before, outputs(model, probes))
    model.eval().requires_grad_(False)
    if is_converted(model):
        conversion_of(model).fast = True
    else:
        generates_fast(model)
        model.save_pretrained = model.push_to_hub = _refuse_to_save
        bears(model, f"the form for inference of {model.name_or_path}, which is not saved")
    return FastReport(merged, joined, kept, why, certificate)


def _merge(
    model: nn.Module, probes: list[dict[str, Any]], before: list[Tensor]
) -> tuple[MergeReport | None, str | None]:
    """Make dense weights of what can be; the reason where that fails."""
    if not any(step.action == "fold" for step in plan_steps(model, "exact")):
        return None, None
    try:
        with all_or_nothing(model):
            report = merge(model, "exact", partial=True)
            _same(before, outputs(model, probes))  # rounded to the model's type
        return report, None
    except (MergeError, CertificateError) as error:
        return None, str(error)


def _same(before: list[Tensor], after: list[Tensor]) -> Certificate:
    certificate = compare(before, after, EQUAL)
    if not certificate.exact:
        raise CertificateError(
            f"The form for inference should compute the same function and does not: {certificate}. "
            "The model was given back."
        )
    return certificate


def _join(model: nn.Module, probes: list[dict[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Stack the tensors of the layers that have such a form; those, and the others."""
    record, joined, kept = conversion_of(model), {}, {}
    names = {module: name for name, module in model.named_modules()}
    with torch.no_grad():
        stacks = [join(layer) for layer in record.layers]
    for item, layer, stack in zip(record.plan, record.layers, stacks, strict=True):
        (kept if stack is None else joined)[names[layer]] = item.edit.experts.kind
    if joined:
        dtype = arithmetic(model)
        before = wide_outputs(model, probes, dtype)
        for layer, stack in zip(record.layers, stacks, strict=True):
            layer.joined = stack
        _same(before, wide_outputs(model, probes, dtype))
    return joined, kept


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    raise SurgeryError(
        "This model is in its form for inference (sc.fast), which is not saved: merge the "
        "checkpoint (sc.merge, sparsecraft merge) to keep dense weights."
    )


def _counted(layers: dict[str, str]) -> str:
    kinds = ", ".join(f"{count} of {kind}" for kind, count in Counter(layers.values()).items())
    return f"{len(layers)} ({kinds})" if layers else "0"
