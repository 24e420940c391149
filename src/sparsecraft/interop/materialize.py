"""materialize(): experts that share tensors become full networks, which others can read."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from sparsecraft.checkpoint.wide import wide_outputs
from sparsecraft.dense.memory import enough_memory
from sparsecraft.dense.probes import random_probe
from sparsecraft.errors import CertificateError, SurgeryError
from sparsecraft.evaluation.certificate import Certificate
from sparsecraft.evaluation.whole import arithmetic, compared
from sparsecraft.moe.layer import MoELayer
from sparsecraft.surgery.elsewhere import remember
from sparsecraft.surgery.identity import stands_nowhere
from sparsecraft.surgery.plan import PlannedEdit
from sparsecraft.surgery.record import check_stands, conversion_of, rewrite
from sparsecraft.surgery.rollback import atomic


@atomic
@enough_memory("Making full networks", "materialize where there is more")
def materialize(model: nn.Module) -> Certificate:
    """Make every expert of a converted model a full network, in place; routers stay.

    It then takes the memory of `upcycling`, runs as fast, and is exported, extended and served as
    that is. Weights are in the dense model's type.

    Returns:
        what the model gives for a probe, before and after.

    Raises:
        SurgeryError: the model is dense, or its experts are no such networks.
        CertificateError: the networks do not compute what the experts did; the model has been given
            back.
    """
    record = conversion_of(model)
    check_stands(model)
    specs = [edit.experts for edit in record.recipe.edits]
    if others := sorted({spec.kind for spec in specs if not spec.materializes}):
        raise SurgeryError(
            f"Recipe {record.recipe.name!r} has {', '.join(others)} experts, which share no "
            "matrices; `mpoe` has experts that become full networks."
        )
    probes = [random_probe(model)]
    dtype = arithmetic(model)
    before = wide_outputs(model, probes, dtype)
    exact: dict[Tensor, Tensor] = {}
    for item, layer in zip(record.plan, record.layers, strict=True):
        exact |= _replaced(item, layer)
    full = (layer.experts.spec for layer in record.layers)
    rewrite(record, [replace(i.edit, experts=s) for i, s in zip(record.plan, full, strict=True)])
    rounded = wide_outputs(model, probes, dtype, exact) if exact and dtype else None
    certificate = compared(before, wide_outputs(model, probes, dtype), rounded, model.dtype)
    if not certificate.exact:
        raise CertificateError(
            f"The full networks should compute what the experts did, and do not: {certificate}. "
            "The model was given back."
        )
    stands_nowhere(model)
    remember(model, "materializing")
    return certificate


def _replaced(item: PlannedEdit, layer: MoELayer) -> dict[Tensor, Tensor]:
    """Give a layer full experts. Gives each tensor that was rounded to the dense model's type, and
    what it was."""
    trains = any(parameter.requires_grad for parameter in layer.experts.parameters())
    bank, dtype = layer.experts.materialized(item.donor), item.donor.reference.dtype
    bank.dispatch, exact = layer.experts.dispatch, {}
    for parameter in bank.parameters(recurse=False):
        parameter.requires_grad_(trains)
        if parameter.dtype != dtype:
            wide = parameter.data
            parameter.data = wide.to(dtype)
            exact[parameter] = wide
    layer.experts = bank
    return exact
