"""Experts that come to a converted model, and that leave it (Nexus, Gritsch et al. 2024, 3.3).

The routers' logits of the experts that are there stay what they are, bit for bit; all other tensors
move towards the added expert's. A short training on new and old data is up to `train`.

Shapes: T tokens, D width, E experts, M width of a domain's embedding.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecraft.conversion.domains.domain import Domain
from sparsecraft.conversion.extension.checks import check_domains, count_experts, share_of_source
from sparsecraft.conversion.extension.router_row import (
    BATCHES,
    FITS,
    embedding_of,
    inputs_of,
    row_of,
    share_of,
)
from sparsecraft.conversion.sources.arrival import arrival
from sparsecraft.conversion.sources.checks import check_sources
from sparsecraft.conversion.sources.gather import donor_tensors
from sparsecraft.conversion.sources.source import Source, open_source
from sparsecraft.dense.digests import combine, digest
from sparsecraft.dense.sound import check_weights
from sparsecraft.errors import SurgeryError
from sparsecraft.evaluation.history import arrived_lines, words
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import dense_tensors
from sparsecraft.moe.routers.build import build_router
from sparsecraft.recipe.edits import Edit
from sparsecraft.surgery.identity import stands_nowhere
from sparsecraft.surgery.record import (
    Conversion,
    check_stands,
    conversion_of,
    is_converted,
    rewrite,
)
from sparsecraft.surgery.rollback import atomic

log = logging.getLogger("sparsecraft")

Rows = Literal["calibrated", "ridge", "reset"]
# What every layer's router reads of the new and of the old tokens, (T, D) each; None without data.
Seen = Sequence[list[Tensor] | None]

# Between the new expert's shares of new and of old tokens; below it data are as good as the same.
LEAST_DIFFERENCE = 0.05


@dataclass(frozen=True, slots=True)
class Extension:
    """What `extend` did.

    Attributes:
        expert: name of the dense model.
        number: of the new expert, in every layer; where they have different numbers of experts,
            one for each layer.
        mixed: lambda, the dense model's share of all tensors that are no expert's.
        rows: how routers know the new expert: `projected` from its domain's embedding,
            `calibrated` on data, by `ridge` regression on data, or `reset` with all others.
        share_new: share of the new tokens that the new expert gets before any training, by
            weight, mean over layers; None without data, or where routers do not decide by token.
        share_old: of the old tokens.
        arrived: how many of its tensors were used, and which were not.
    """

    expert: str
    number: int | tuple[int, ...]
    mixed: float
    rows: str
    share_new: float | None = None
    share_old: float | None = None
    arrived: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        which = self.number if isinstance(self.number, int) else f"the last ({words(self.number)})"
        text = (
            f"{self.expert} is expert {which} of every layer, its router's row {self.rows}; "
            f"of all other tensors {self.mixed:.3f} is its own."
        )
        shares = (("new", self.share_new), ("old", self.share_old))
        found = [
            f"{share:.1%} of the {which} tokens" for which, share in shares if share is not None
        ]
        text += f" Untrained, it gets {' and '.join(found)}." if found else ""
        return "\n".join([text, *arrived_lines({self.expert: self.arrived})])


@atomic
@torch.no_grad()
def extend(
    model: nn.Module,
    expert: str | Path | PreTrainedModel,
    data: Any = None,
    old_data: Any = None,
    *,
    tokenizer: Any = None,
    embedding: Tensor | None = None,
    base: str | Path | PreTrainedModel | None = None,
    rows: Rows = "calibrated",
    mix: float | None = None,
    unrelated: bool = False,
    seed: int = 0,
) -> Extension:
    """Add a dense model as one more expert of every layer, in place, and train nothing.

    The feed-forward networks (of `bam` the attentions, too) become the last expert. Routers of
    domains project its row from the domain's embedding; linear ones find it by logistic regression,
    new tokens against old. The others' logits keep their bits for the same input of the layer. All
    other tensors become (1 - lambda) theirs + lambda the dense model's.

    Args:
        expert: folder, hub id, LoRA folder or model in memory, of one ancestor with the base.
        data: the new expert's domain: a data set, a list of texts, or batches.
        old_data: of the known domains, for linear routers. 8,192 tokens of each are read.
        tokenizer: of the model, for texts; None takes that of its base.
        embedding: (M,) of the domain, instead of one from `data`.
        base: the dense model, where it embedded the domains and its folder is not known any more.
        rows: of linear routers; `ridge` is in closed form, `reset` draws all anew (Nexus).
        mix: lambda; None is 1 / (n + 1), with n experts so far (Nexus, 3.3), the most of a layer.
        unrelated: let a model without a common ancestor pass.
        seed: of `reset`.

    Raises:
        SurgeryError, RecipeError: the model is dense, or its experts are no whole networks.
        SourceError, HubError: the dense model does not fit.
        DataError: data is missing, empty, or the domain is one of the others'.
    """
    record = conversion_of(model)
    check_stands(model)
    count = count_experts(record.recipe)
    by_domain = check_domains(record, data, old_data, embedding, rows)
    source = _opened(model, record, expert, unrelated)
    share = share_of_source(mix, max(count))
    given = [None if d is None else Domain.of(d, BATCHES) for d in (data, old_data)]
    if by_domain:
        embedding = embedding_of(model, record, given[0], embedding, base, tokenizer)
    _mix(model, record, source, share)
    seen = [inputs_of(model, record.plan, domain, tokenizer) for domain in given]
    _join(model, record, source, _new_rows(record, seen, embedding, rows), seed)
    check_weights(model, SurgeryError)
    how = "projected" if by_domain else rows
    result = Extension(source.name, _number(count), share, how, *_shares(record, seen))
    return _noted(record, replace(result, arrived=_arrived(model, record, source)))


def _number(count: tuple[int, ...]) -> int | tuple[int, ...]:
    """Of an expert that comes to as many as `count_experts` found."""
    return count if len(count) > 1 else count[0]


def _arrived(model: nn.Module, record: Conversion, source: Source) -> dict[str, Any]:
    """What of the dense model's weights was used."""
    held = dense_tensors(model) | donor_tensors(record.plan)
    return arrival(source, (name for name, t in held.items() if t.is_floating_point()))


def _new_rows(
    record: Conversion, seen: Seen, embedding: Tensor | None, rows: Rows
) -> list[Tensor | None]:
    """What each layer's router knows the new expert by; None where all of it is drawn anew."""
    return [row_of(layer, n, seen, embedding, rows) for n, layer in enumerate(record.layers)]


def _shares(record: Conversion, seen: Seen) -> list[float | None]:
    """The new expert's shares of the new and of the old tokens."""
    return [share_of(record.layers, inputs) for inputs in seen]


def _opened(model: nn.Module, record: Conversion, expert: Any, unrelated: bool) -> Source:
    """The dense model, checked against all that will be read of it."""
    if is_converted(expert):
        raise SurgeryError("The expert is a converted model; give the dense model it came from.")
    tensors = dense_tensors(model) | donor_tensors(record.plan)
    source = open_source(model, expert)
    check_sources(model, [source], tensors, unrelated=unrelated, tokenizer=record.settings)
    for item, layer in zip(record.plan, record.layers, strict=True):
        if reason := layer.experts.misfit(item.donor):
            raise SurgeryError(
                f"The experts at {item.site.path!r} {reason}; no dense model fits among them."
            )
    return source


def _mix(model: nn.Module, record: Conversion, source: Source, share: float) -> None:
    """Move all tensors that are no expert's towards the source's."""
    for name, tensor in _others(model, record) if share else ():
        theirs = source.tensor(name).view_as(tensor)
        wide = torch.promote_types(tensor.dtype, torch.float32)
        mixed = tensor.detach().to(wide).lerp(theirs.to(tensor.device, wide), share)
        tensor.data = mixed.to(tensor.dtype)


def _others(model: nn.Module, record: Conversion) -> Iterable[tuple[str, Tensor]]:
    """Dense name and tensor of all that is no expert's: not of the networks beside which experts
    stand either, which stay the seed's."""
    own = donor_tensors(record.plan)
    for name, tensor in dense_tensors(model).items():
        if name not in own and tensor.is_floating_point():
            yield name, tensor
    for item, layer in zip(record.plan, record.layers, strict=True):
        for name, parameter in layer.experts.shared_parts().items():
            yield f"{item.donor.path}.{name}", parameter


def _join(
    model: nn.Module, record: Conversion, source: Source, rows: Sequence[Tensor | None], seed: int
) -> None:
    """One more expert and row in every layer, and in the recipe."""
    recounted(record, more=1)
    cuda = {p.device for p in model.parameters() if p.is_cuda}
    for item, layer in zip(record.plan, record.layers, strict=True):
        layer.experts.append(item.donor.of(source.tensor))
    with torch.random.fork_rng(devices=list(cuda)):
        torch.manual_seed(seed)
        for layer, row in zip(record.layers, rows, strict=True):
            _take_row(layer, row)
    recount(record)
    record.own_loss.meet_routers(model)
    stands_nowhere(model)


def _take_row(layer: MoELayer, row: Tensor | None) -> None:
    router, count = layer.router, layer.experts.num_experts
    if row is not None:
        router.append(row)
        return
    old = router.scorer
    like = next(old.parameters())
    outputs = layer.experts.out_features
    where = {"outputs": outputs, "device": like.device, "dtype": like.dtype}
    new = build_router(router.spec.with_extended(0), old.width, count, **where).scorer
    router.scorer = new.train(old.training).requires_grad_(like.requires_grad)
    for state in router.moving:
        state.append()


def recounted(record: Conversion, more: int) -> list[Edit]:
    """What is planned, one for each layer, with `more` experts than the layer has.

    Raises:
        RecipeError: it would make no sense.
    """
    edits = []
    for item, layer in zip(record.plan, record.layers, strict=True):
        count = layer.experts.num_experts + more
        extended = min(layer.router.scorer.extended, count - 1)
        experts = replace(item.edit.experts, num_experts=count)
        router = item.edit.router.with_extended(extended)
        edits.append(replace(item.edit, experts=experts, router=router))
    return edits


def recount(record: Conversion) -> None:
    """Let the recipe say what the layers have."""
    edits = recounted(record, more=0)
    for edit, layer in zip(edits, record.layers, strict=True):
        layer.router.spec = replace(layer.router.spec, scorer=edit.router.scorer)
    rewrite(record, edits)


def _noted(record: Conversion, result: Extension) -> Extension:
    """The result, remembered on the model; warns where routers hardly know new tokens from old."""
    new, old = result.share_new, result.share_old
    if result.rows in FITS and new is not None and new - old < LEAST_DIFFERENCE:
        log.warning(
            f"The new expert gets {new:.0%} of the new tokens and {old:.0%} of the old ones: the "
            "routers cannot tell these data apart. Are they two domains?"
        )
    note(record, dataclasses.asdict(result) | {"digest": _digest_of_last(record.layers[0])})
    return result


def _digest_of_last(layer: MoELayer) -> str:
    """Of the last expert of a layer: whether two extensions had the same dense model."""
    parts = {n: digest(p[-1]) for n, p in layer.experts.named_parameters() if p.ndim > 1}
    return combine(parts)


def note(record: Conversion, entry: dict[str, Any]) -> None:
    """Remember what happened, and after how many trainings."""
    entry["trainings"] = len(record.report.get("training", []))
    record.report.setdefault("extensions", []).append(entry)
