"""What routers chose for every token of some documents of several domains, in one pass.

Of each token the table keeps its first two experts in every layer (four bytes) and how many it
went to (two): a million tokens of 24 layers take 150 MB. All else is summed as it comes.

Shapes: N tokens, D domains, E experts, T tokens of a batch, B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn

from sparsecraft.evaluation.analysis.watching import Watched, decisions, routed_layers, scores_of
from sparsecraft.evaluation.logprobs import label_logprobs
from sparsecraft.evaluation.routing import ordered_choices
from sparsecraft.moe.context import layer_masks
from sparsecraft.moe.routing import Routing


@dataclass
class LayerChoices:
    """One layer's.

    Attributes:
        experts: E.
        load_DE: slots that each expert got of each domain (of a soft routing, weights).
        pairs_EE: tokens that had both experts.
        scores_DE, entropies_D: sums over tokens of their probabilities of the experts, and of the
            entropy (bits) of these; None of a split network.
        first_N, second_N: a token's experts by weight; E where it has none.
        sizes_N: experts that a token went to and that compute something.
        soft: every token goes to all experts, by weights.
        apart: why a token has no line in the table; None where it has.
    """

    experts: int
    load_DE: np.ndarray
    pairs_EE: np.ndarray
    scores_DE: np.ndarray | None
    entropies_D: np.ndarray | None
    soft: bool = False
    apart: str | None = None
    firsts: list[np.ndarray] = field(default_factory=list, repr=False)
    seconds: list[np.ndarray] = field(default_factory=list, repr=False)
    sizes: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def first_N(self) -> np.ndarray:
        return _joined(self.firsts)

    @property
    def second_N(self) -> np.ndarray:
        return _joined(self.seconds)

    @property
    def sizes_N(self) -> np.ndarray:
        return _joined(self.sizes)


@dataclass
class Choices:
    """All layers', of the same tokens.

    Attributes:
        domains: their names.
        tokens_N, domains_N, documents_N: each token's number in the vocabulary, domain, document.
        nats_D, labels_D: the loss summed over labels, and their number.
        documents: how many there are.
        interrupted: whether not all of what was asked for is here.
    """

    domains: list[str]
    layers: dict[str, LayerChoices]
    nats_D: np.ndarray
    labels_D: np.ndarray
    ids: list[np.ndarray] = field(default_factory=list, repr=False)
    of_domain: list[np.ndarray] = field(default_factory=list, repr=False)
    of_document: list[np.ndarray] = field(default_factory=list, repr=False)
    documents: int = 0
    interrupted: bool = False

    @property
    def tokens_N(self) -> np.ndarray:
        return _joined(self.ids)

    @property
    def domains_N(self) -> np.ndarray:
        return _joined(self.of_domain)

    @property
    def documents_N(self) -> np.ndarray:
        return _joined(self.of_document)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """One array, which takes the place of its parts."""
    if len(parts) != 1:
        parts[:] = [np.concatenate(parts) if parts else np.zeros(0, np.uint16)]
    return parts[0]


def collect(
    model: nn.Module,
    sources: Mapping[str, Sequence[dict[str, Tensor]]],
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Choices:
    """Run batches of each domain, in turns, and note what the routers choose. What has been noted
    when it is interrupted (Ctrl-C) is returned.

    Args:
        sources: domain -> batches of model inputs with labels, and `token_mask` where some tokens
            are padding. Every sequence of a batch is a document.
        progress: is called with how many tokens are done, and of how many.
    """
    layers, names = routed_layers(model), list(sources)
    choices = Choices(names, {}, np.zeros(len(names)), np.zeros(len(names), np.int64))
    turns = [
        (at, batch)
        for batches in zip_longest(*sources.values())
        for at, batch in enumerate(batches)
        if batch is not None
    ]
    done, total = 0, sum(_size(batch) for _, batch in turns)
    try:
        for domain, batch in turns:
            _note(model, layers, choices, domain, dict(batch))
            done += _size(batch)
            progress(done, total)
    except KeyboardInterrupt:
        choices.interrupted = True
    return choices


def _size(batch: dict[str, Tensor]) -> int:
    mask = batch.get("token_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


@torch.no_grad()
def _note(
    model: nn.Module,
    layers: Mapping[str, Watched],
    choices: Choices,
    domain: int,
    batch: dict[str, Tensor],
) -> None:
    mask = batch.pop("token_mask", None)
    ids_BS = batch["input_ids"]
    with decisions(model) as decided:
        logprobs_N, _ = label_logprobs(model, batch)
    choices.nats_D[domain] -= logprobs_N.sum().item()
    choices.labels_D[domain] += logprobs_N.numel()
    real_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask is None else mask.bool()
    real_T = real_BS.flatten().cpu()
    masks = layer_masks(model, batch, mask, decided)
    for name, routing in decided.items():
        counted_T = masks(name) if layers[name].ours else real_T
        layer = choices.layers.get(name)
        if layer is None:
            layer = choices.layers[name] = _empty(layers[name], routing, len(choices.domains))
        _sum(layer, layers[name], routing, counted_T, domain)
        if len(routing.logits_TE) == len(real_T) and layer.apart is None:
            _list(layer, routing, real_T)
        else:
            layer.apart = "it routes other things than the tokens of the input"
    choices.ids.append(ids_BS.cpu().flatten()[real_T].numpy().astype(np.int32))
    choices.of_domain.append(np.full(int(real_T.sum()), domain, np.uint8))
    documents_BS = torch.arange(len(ids_BS))[:, None].expand_as(ids_BS) + choices.documents
    choices.of_document.append(documents_BS.flatten()[real_T].numpy().astype(np.int32))
    choices.documents += len(ids_BS)


def _empty(watched: Watched, routing: Routing, domains: int) -> LayerChoices:
    E, scored = routing.num_experts, not watched.splits
    return LayerChoices(
        experts=E,
        load_DE=np.zeros((domains, E)),
        pairs_EE=np.zeros((E, E)),
        scores_DE=np.zeros((domains, E)) if scored else None,
        entropies_D=np.zeros(domains) if scored else None,
        soft=routing.soft,
    )


def _sum(
    layer: LayerChoices, watched: Watched, routing: Routing, mask_T: Tensor | None, domain: int
) -> None:
    """Add what is summed over the tokens that count."""
    layer.load_DE[domain] += routing.amounts_E(mask_T).double().cpu().numpy()
    counted_T = routing.counted(mask_T)
    has_TE = (routing.weights_TE() != 0).float()
    if counted_T is not None:
        has_TE = has_TE[counted_T]
    layer.pairs_EE += (has_TE.t() @ has_TE).double().cpu().numpy()
    scores_TE = scores_of(watched, routing)
    if scores_TE is not None:
        scores_TE = scores_TE if counted_T is None else scores_TE[counted_T]
        layer.scores_DE[domain] += scores_TE.sum(0).double().cpu().numpy()
        bits_T = torch.special.entr(scores_TE).sum(-1) / np.log(2)
        layer.entropies_D[domain] += bits_T.sum().item()


def _list(layer: LayerChoices, routing: Routing, real_T: Tensor) -> None:
    """Add the lines of these tokens."""
    first_T, second_T = ordered_choices(routing)
    computing = routing.num_experts - routing.free
    sizes_T = (routing.weights_TE()[:, :computing] != 0).sum(-1)
    if routing.acts_T is not None:
        first_T = first_T.masked_fill(~routing.acts_T, routing.num_experts)
        sizes_T = sizes_T * routing.acts_T
    for lines, values_T in (
        (layer.firsts, first_T), (layer.seconds, second_T), (layer.sizes, sizes_T),
    ):  # fmt: skip
        lines.append(values_T.cpu()[real_T].numpy().astype(np.uint16))
