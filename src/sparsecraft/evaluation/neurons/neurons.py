"""analyze_neurons(): whether neurons belong to domains, beside chance and a model that has learned
nothing (Pochinkov, Jones and Rahman 2024, "Modularity in Transformers")."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.dense.memory import enough_memory
from sparsecraft.dense.tokens import is_encoder_decoder
from sparsecraft.errors import DataError, SparsecraftError, did_you_mean
from sparsecraft.evaluation.held_out import some_batches
from sparsecraft.evaluation.neurons.overlaps import (
    by_random_clusters,
    clusters_of,
    enriched,
    overlap,
)
from sparsecraft.evaluation.neurons.pruning import KEPT, random_like, share_to_prune, without
from sparsecraft.evaluation.neurons.scores import SCORES, beyond_chance, top
from sparsecraft.evaluation.neurons.sources import (
    Batch,
    Batches,
    has_labels,
    right_of,
    run,
    sources_of,
)
from sparsecraft.evaluation.neurons.statistics import Neurons, Statistics, neurons_of, statistics_of
from sparsecraft.moe.outputs import evaluation_mode

log = logging.getLogger("sparsecraft")

SHARE = 0.02  # of all neurons that count as a domain's
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # the paper's, of which overlaps are taken too
PARTS = ("twin", "pruning")
PRUNED_BATCHES = 4  # of each domain, about, that accuracies are taken on
CLUSTER = 32  # neurons of one, or the next size that divides the network


@dataclass(frozen=True, slots=True)
class Ranking:
    """How neurons are ranked for a domain.

    Attributes:
        score: one of `scores.SCORES`; the paper's is `abs`.
        reference: rows that every domain is compared with, as the paper compares with the Pile.
            None: each domain is compared with all others, so that what is high in two of them is
            high in none, and overlaps lie below chance.
    """

    score: str = "abs"
    reference: str | Path | None = None


@enough_memory("Analysis", "lower --max-length (max_length=...) or load the model in bfloat16")
def analyze_neurons(
    model: nn.Module,
    data: Sequence[str | Path] | Mapping[str, Iterable[Batch]],
    *,
    tokenizer: Any = None,
    ranking: Ranking | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    parts: Collection[str] = PARTS,
) -> dict[str, Any]:
    """Which neurons of the dense feed-forward networks do more for one domain than for others.

    Args:
        data: files of rows, as `evaluate` takes them; each is a domain, and there are two at least.
            Of encoders the texts of the rows. Or domain -> batches of the model's inputs, such as
            `pixel_values`, with `labels` if accuracies are wanted.
        ranking: see `Ranking`. The highest two hundredths of all neurons are called a domain's.
        limit: rows of each file at most.
        parts: `twin`, the same of a model of this configuration with random weights, and `pruning`,
            the neurons of each domain left out, as many as bring its own accuracy down to 0.8 of
            what it was, and what others keep. Ctrl-C leaves out those that are not done.

    Returns:
        `layers`, `neurons`, `domains`, `tokens`; `model` and `twin`, each with `overlap` (of two
        domains' neurons, over all layers and with as many of each layer; `chance`), `by_layer`
        (where they lie), `beyond_chance` (how many differ between documents) and `clusters`;
        `pruning`.

    Raises:
        SparsecraftError: the model has no dense networks, or there is no such score.
        DataError: fewer than two domains, or rows that are malformed.
    """
    ranking = ranking or Ranking()
    _check(model, ranking.score)
    neurons = neurons_of(model)
    reference = ranking.reference
    if len(data) + (reference is not None) < 2:
        raise DataError("data is one domain; pass two or more, to tell them apart.")
    names = [*map(str, data), *([] if reference is None else [str(reference)])]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{twice[0]} is there twice; pass each domain, and the reference, once.")
    with evaluation_mode(model), torch.no_grad():
        sources = sources_of(model, data, tokenizer, max_length, limit)
        if reference is not None:
            sources |= sources_of(model, [reference], tokenizer, max_length, limit)
        metrics = _all(model, neurons, sources, ranking, parts)
    given = {"domains": [str(name) for name in data]}
    given |= {"reference": None if reference is None else str(reference)}
    return metrics | given | {"score": ranking.score, "share": SHARE}


def _all(
    model: nn.Module, neurons: Neurons, sources: Batches, ranking: Ranking, parts: Collection[str]
) -> dict[str, Any]:
    read, score = partial(_read, sources=sources, ranking=ranking), ranking.score
    statistics = read(model, neurons)
    metrics: dict[str, Any] = {
        "layers": list(neurons.networks),
        "neurons": sum(neurons.widths),
        "tokens": statistics.tokens_D.long().tolist(),
        "model": _measures(neurons, statistics, score),
        "twin": None,
    }
    try:
        if "twin" in parts:
            metrics["twin"] = _of_twin(model, read, score)
        if "pruning" in parts and not has_labels(sources):
            log.info("There are no labels: what accuracy is left without neurons is not measured.")
        elif "pruning" in parts:
            own = dict(list(sources.items())[: len(statistics.compared)])
            part = some_batches(own, PRUNED_BATCHES)
            metrics["pruning"] = _pruned(model, neurons, statistics, score, part)
    except KeyboardInterrupt:
        log.warning("Interrupted: what was not measured by then is not among the figures.")
    return metrics


def _read(model: nn.Module, neurons: Neurons, sources: Batches, ranking: Ranking) -> Statistics:
    found = statistics_of(model, neurons, sources, run)
    return replace(found, reference=len(sources) - 1) if ranking.reference else found


def _check(model: nn.Module, score: str) -> None:
    if score not in SCORES:
        raise SparsecraftError(f"score is {score!r}.{did_you_mean(score, SCORES)}")
    if is_encoder_decoder(model):
        raise SparsecraftError(
            f"{type(model).__name__} has an encoder and a decoder, which read different tokens; "
            "neurons are looked at in models that read one sequence."
        )


def _measures(neurons: Neurons, found: Statistics, score: str) -> dict[str, Any]:
    domains, layer_N = found.compared, neurons.layer_N
    scores_DN = [SCORES[score](found, domain) for domain in domains]
    of_all = [top(score_N, SHARE) for score_N in scores_DN]
    of_each = [top(score_N, SHARE, layer_N) for score_N in scores_DN]
    surely = [beyond_chance(found, domain) for domain in domains]
    return {
        "overlap": [[overlap(a, b) for b in of_all] for a in of_all],
        "overlap_by_layer": [[overlap(a, b) for b in of_each] for a in of_each],
        "overlap_by_share": {share: _between(scores_DN, share) for share in SHARES},
        "chance": SHARE,
        "by_layer": [_shares(layer_N, chosen_N) for chosen_N in of_all],
        "beyond_chance": [None if chosen_N is None else int(chosen_N.sum()) for chosen_N in surely],
        "clusters": _clusters(neurons, of_each),
    }


def _between(scores_DN: list[Tensor], share: float) -> float:
    """The mean overlap of two domains' neurons, as many as this share."""
    chosen = [top(score_N, share) for score_N in scores_DN]
    found = [overlap(a, b) for a in chosen for b in chosen if a is not b]
    return sum(found) / len(found)


def _shares(layer_N: Tensor, chosen_N: Tensor) -> list[float]:
    """The share of the chosen neurons that lies in each layer."""
    counts = torch.bincount(layer_N[chosen_N], minlength=int(layer_N.max()) + 1)
    return (counts / counts.sum().clamp_min(1)).tolist()


def _clusters(neurons: Neurons, of_each: list[Tensor]) -> list[dict[str, Any]]:
    """For each layer and domain the clusters of weights that its neurons lie in."""
    found, parts = [], [chosen_N.split(neurons.widths) for chosen_N in of_each]
    for layer, (path, network) in enumerate(neurons.networks.items()):
        size = next(m for m in range(CLUSTER, 0, -1) if network.hidden_width % m == 0)
        labels_F = clusters_of(network, network.hidden_width // size)
        chosen = [part[layer] for part in parts]
        found.append(
            {
                "layer": path,
                "domains": [enriched(labels_F, chosen_F) for chosen_F in chosen],
                "random": [by_random_clusters(labels_F, chosen_F) for chosen_F in chosen],
            }
        )
    return found


def _of_twin(model: nn.Module, read: Callable, score: str) -> dict[str, Any]:
    """The same of a model of this configuration that has learned nothing."""
    log.info("The same of a model with random weights.")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        twin = type(model)(copy.deepcopy(model.config))
    twin = twin.to(model.device, model.dtype).eval()
    neurons = neurons_of(twin)
    statistics = read(twin, neurons)
    return _measures(neurons, statistics, score)


def _pruned(
    model: nn.Module, neurons: Neurons, found: Statistics, score: str, sources: Batches
) -> list[dict[str, Any]]:
    """For each domain: the share of neurons that brings its accuracy to 0.8 of what it was, and the
    accuracy of all domains without them, and without as many others, of what it was."""
    whole = [_accuracy(model, batches) for batches in sources.values()]
    rows = []
    for domain, batches in zip(found.compared, sources.values(), strict=False):
        if not whole[domain]:
            rows.append(None)  # there is nothing to lose
            continue
        score_N = SCORES[score](found, domain)
        log.info(f"Neurons of {list(sources)[domain]} are left out.")
        accuracy = partial(_without_share, model, neurons, score_N, batches)
        part, _ = share_to_prune(accuracy, whole[domain], KEPT)
        gone_N = top(score_N, part)
        rows.append(
            {
                "share": part,
                "accuracy": _kept(model, neurons, gone_N, sources, whole),
                "accuracy_random": _kept(model, neurons, random_like(gone_N), sources, whole),
            }
        )
    return rows


def _without_share(
    model: nn.Module, neurons: Neurons, score_N: Tensor, batches: Sequence[Batch], share: float
) -> float:
    with without(neurons, top(score_N, share)):
        return _accuracy(model, batches)


def _kept(
    model: nn.Module, neurons: Neurons, gone_N: Tensor, sources: Batches, whole: list[float]
) -> list[float | None]:
    with without(neurons, gone_N):
        found = [_accuracy(model, batches) for batches in sources.values()]
    return [now / before if before else None for now, before in zip(found, whole, strict=True)]


def _accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Share of labels that are the model's first choice."""
    right_N = torch.cat([right_of(model, batch).cpu() for batch in batches])
    return right_N.float().mean().item() if len(right_N) else 0.0
