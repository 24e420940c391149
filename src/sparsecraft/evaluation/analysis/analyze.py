"""analyze(): what the experts of a model do, on what, beside what chance gives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsecraft.dense.memory import enough_memory
from sparsecraft.errors import SparsecraftError
from sparsecraft.evaluation.analysis.choices import Choices, collect
from sparsecraft.evaluation.analysis.dropping import losses_without
from sparsecraft.evaluation.analysis.kinds import experts_by_kind
from sparsecraft.evaluation.analysis.measures import following, layer_measures, paths
from sparsecraft.evaluation.analysis.reading import read, word_of
from sparsecraft.evaluation.analysis.twin import random_routers
from sparsecraft.evaluation.analysis.watching import Watched, routed_layers
from sparsecraft.evaluation.analysis.weights import similarities
from sparsecraft.evaluation.held_out import listed_batches, some_batches
from sparsecraft.evaluation.progress import Progress
from sparsecraft.moe import cost
from sparsecraft.moe.outputs import evaluation_mode
from sparsecraft.surgery.record import conversion_of, is_converted, tokenizer_of

log = logging.getLogger("sparsecraft")

MOST_DROPPED = 16  # experts of a layer, each of which is a pass of its own
DROPPED_BATCHES = 4  # of each domain


@enough_memory("Analysis", "lower --max-length (max_length=...) or load the model in bfloat16")
def analyze(
    model: nn.Module,
    data: str | Path | Sequence[str | Path],
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    limit: int | None = None,
    twin: bool = True,
    drop: bool = True,
    text: str | None = None,
) -> dict[str, Any]:
    """Count what routers choose, and say what that amounts to.

    Args:
        model: converted, or a mixture of transformers (Mixtral, Qwen-MoE, OLMoE, Granite, gpt-oss
            and their kin).
        data: files of rows, as `evaluate` takes them; each is a domain.
        tokenizer: None: the model's own.
        max_length: longer rows are dropped, and counted.
        limit: rows of each file at most.
        twin: run the data once more with routers that know nothing.
        drop: see what the loss gains without each expert, on a part of the data; not of layers with
            more than 16 experts.
        text: shown token by token, with first experts.

    Returns:
        `domains`, `tokens`, `documents`, `loss` by domain; `layers`: name -> `layer_measures`;
        `kinds`: `experts_by_kind`; `following`, `paths`, `dropped`, `text`; `notes`: what could not
        be said, and why.

    Raises:
        SparsecraftError: the model has no router.
        DataError: rows that are malformed, or none.
    """
    layers = routed_layers(model)
    if not layers:
        raise SparsecraftError(
            f"{type(model).__name__} has no router whose decisions could be counted: it is dense, "
            "or all its experts always run. Pass a model with routers, or look at neurons "
            "(sparsecraft analyze --neurons)."
        )
    tokenizer = tokenizer or tokenizer_of(model)
    with evaluation_mode(model), torch.no_grad():
        sources = listed_batches(model, data, tokenizer, max_length, limit)
        choices = collect(model, sources, Progress("tokens"))
        of_twin = _of_twin(model, sources) if twin and not choices.interrupted else None
        dropped = _dropped(model, choices, of_twin, sources) if drop else None
        reading = None if text is None else read(model, tokenizer, text, max_length)
    metrics = summary(choices, model) | {"dropped": dropped, "text": reading}
    metrics["layers"] = _of_layers(layers, choices, of_twin, tokenizer)
    metrics |= {"kinds": experts_by_kind(choices, tokenizer), "paths": paths(choices)}
    metrics |= {"following": following(choices)}
    untrained = is_converted(model) and not conversion_of(model).report.get("training")
    return metrics | {"notes": notes(metrics, choices, of_twin, layers, untrained)}


def _of_layers(
    layers: dict[str, Watched], choices: Choices, of_twin: Choices | None, tokenizer: Any
) -> dict[str, dict[str, Any]]:
    found = {name: layer_measures(choices, name, of_twin) for name in choices.layers}
    for name, measures in found.items():
        like_EE = similarities(layers[name], measures["experts"])
        measures["similarity"] = None if like_EE is None else like_EE.tolist()
        for kind in (kind for kinds in measures.get("vocabulary", ()) for kind in kinds):
            kind["word"] = word_of(tokenizer, kind["token"])
    return found


def summary(choices: Choices, model: nn.Module) -> dict[str, Any]:
    domains = zip(choices.domains, choices.nats_D, choices.labels_D, strict=True)
    return {
        "model": type(model).__name__,
        "parameters": cost.count(model).to_dict(),
        "domains": choices.domains,
        "tokens": len(choices.tokens_N),
        "documents": choices.documents,
        "interrupted": choices.interrupted,
        "loss": {name: nats / labels if labels else None for name, nats, labels in domains},
    }


def notes(
    metrics: dict, choices: Choices, of_twin: Choices | None, layers: dict, untrained: bool
) -> list[str]:
    """What the measures do not say, in sentences."""
    found = []
    if untrained:
        found.append(
            "The model has not been trained since it was converted: what its routers tell of "
            "domains is what routers tell by chance, or what they were built from."
        )
    if choices.interrupted:
        found.append(f"Interrupted: all figures are of the first {metrics['tokens']:,} tokens.")
    if len(choices.domains) < 2:
        found.append("One file is one domain: what experts know of domains needs two or more.")
    if choices.documents < 20 * len(choices.domains):
        found.append(
            f"{choices.documents} documents are few: chance reaches far, and tests show little."
        )
    if missing := [name for name in layers if name not in choices.layers]:
        found.append(f"No token passed the routers of {', '.join(missing)}.")
    apart = {layer.apart for layer in choices.layers.values() if layer.apart}
    found += [f"Some layers have no line for each token: {reason}." for reason in apart]
    if of_twin is None:
        found.append("There is no twin with random routers beside these figures.")
    elif of_twin.interrupted:
        found.append(
            f"Interrupted: the twin with random routers saw {len(of_twin.tokens_N):,} tokens alone."
        )
    if metrics["dropped"] is None:
        found.append("What the loss gains without each expert is not among these figures.")
    never = {
        name: measures["dead"] for name, measures in metrics["layers"].items() if measures["dead"]
    }
    if never:
        count = sum(map(len, never.values()))
        found.append(
            f"{count} experts in {len(never)} layers get less than a hundredth of an equal share: "
            "train with a balance loss or bias, or take them out (sc.remove)."
        )
    return found


def _of_twin(model: nn.Module, sources: dict) -> Choices | None:
    with random_routers(model) as drawn:
        return collect(model, sources, Progress("tokens of the twin")) if drawn else None


def _dropped(
    model: nn.Module, choices: Choices, of_twin: Choices | None, sources: dict
) -> list | None:
    """None where there are too many experts, or where this or a pass before was interrupted."""
    most = max(layer.experts for layer in choices.layers.values())
    interrupted = choices.interrupted or (of_twin is not None and of_twin.interrupted)
    if most > MOST_DROPPED or interrupted:
        return None
    log.info(f"Losses without each of {most} experts, on a part of the data.")
    part = some_batches(sources, DROPPED_BATCHES)
    try:
        return losses_without(model, part, most, Progress("batches"))
    except KeyboardInterrupt:
        return None
