"""Fit the routers of split networks: capture what networks read, partition neurons, regress.

The model is not changed but for its routers, the order of its neurons, and their means. Inputs are
captured once, in one pass over the data with every expert on, padding left out.

Shapes: T tokens, D width, E experts, m neurons of each, F = E m, R = E less the shared experts.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.errors import SparsecraftError
from sparsecraft.kernels.selection import select
from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.moe.init.banks import partition_of_activations, partition_of_weights
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.gate import squashed
from sparsecraft.moe.routers.part_scorers import SimilarityScorer, targets
from sparsecraft.recipe.scorers import Similarity
from sparsecraft.recipe.stages import Fit
from sparsecraft.surgery.budget import split_layers
from sparsecraft.surgery.rollback import atomic
from sparsecraft.training.fit.capture import Masks, capture
from sparsecraft.training.fit.regression import Report, first_held, fit_imitations, fit_routers
from sparsecraft.training.moved import Before

log = logging.getLogger("sparsecraft")

# Tokens whose activations are in memory at a time.
CHUNK_TOKENS = 4096
# Share of experts at which the captured mass is reported: MoEfication's.
REPORTED_SHARE = 0.2
# Why a stage that fits leaves a tensor as it was.
NOT_BETTER = "no step has made the held-out loss smaller"


@atomic
def fit(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    spec: Fit,
    *,
    masks: Callable[[nn.Module, dict[str, Any]], Masks],
    seed: int = 0,
) -> dict[str, Any]:
    """Make the routers of every split network of `model` from what the networks read, or fit the
    networks that imitate Linears.

    Partitions are made again, from the weights as they are now; then the means of those that
    compensate, the targets, and one regression for all layers of a form together.

    Args:
        batches: dicts of model inputs, of which as many are read as `spec.tokens` needs.
        masks: (model, batch) -> (layer name -> True on its real tokens, or None for all).
        seed: of partitions and of the order of the tokens.

    Returns:
        `tokens` that were captured, `steps` of the regression, and `layers`: the losses of each
        and the mass that 20 % of its experts capture, by router, oracle, similarity and chance.

    Raises:
        DataError: no token was captured.
        TrainingError: a loss is not finite. The model is then as it was.
    """
    imitating = spec.what == "imitations"
    layers = {
        name: layer
        for name, layer in split_layers(model).items()
        if layer.is_imitation or not imitating
    }
    if not layers:
        raise SparsecraftError(
            f"This {type(model).__name__} has no split networks, so that there are no "
            f"{spec.what} to fit; convert it by a recipe such as d2dmoe."
        )
    with torch.random.fork_rng(devices=_cuda(model)), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        inputs = capture(
            model, layers, batches, spec.tokens, masks, Path(folder), teachers=imitating
        )
        first_held(min(map(len, inputs.values())), spec)  # before anything is changed
        make = _make_imitations if imitating else _make_routers
        report = make(layers, inputs, spec, seed)
    tokens = max(map(len, inputs.values()))
    steps = 0
    if spec.loss != "none":
        steps = spec.epochs * math.ceil(first_held(tokens, spec) / spec.batch_tokens)
    return {"tokens": tokens, "steps": steps, "layers": report}


def before_fit(model: nn.Module, spec: Fit) -> Before:
    """What the tensors are before a fit, which may put a network's neurons in another order."""
    layers = split_layers(model)
    chosen = [p for p, layer in layers.items() if spec.what == "routers" or layer.is_imitation]
    part = "experts" if spec.what == "imitations" else "router.scorer"
    split = [n for n, _ in model.named_parameters() if n.startswith(tuple(f"{p}." for p in layers))]
    fits = tuple(f"{path}.{part}." for path in chosen) if spec.loss != "none" else ()
    return Before(model, (n for n in split if fits and n.startswith(fits)), free=split)


def _make_imitations(
    layers: dict[str, MoELayer], inputs: dict[str, Tensor], spec: Fit, seed: int
) -> Report:
    return fit_imitations(layers, inputs, spec)


def _make_routers(
    layers: dict[str, MoELayer], inputs: dict[str, Tensor], spec: Fit, seed: int
) -> Report:
    """Partitions and means from the networks as they are now, then targets, then routers."""
    wanted: dict[str, Tensor] = {}
    for number, (name, layer) in enumerate(layers.items()):
        _arrange(layer, inputs[name], seed + number)
        wanted[name] = _targets(layer, inputs[name])
    report: Report = {name: {} for name in layers}
    if spec.loss != "none":
        report |= fit_routers(layers, inputs, wanted, spec)
    for name, layer in layers.items():
        held = slice(first_held(len(inputs[name]), spec), None)
        report[name] |= captured_masses(layer, inputs[name][held], wanted[name][held])
    return report


def _cuda(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.is_cuda})


@torch.no_grad()
def _arrange(layer: MoELayer, x_TD: Tensor, seed: int) -> None:
    """Deal a layer's neurons out, take their means, and start its router from them."""
    bank: SplitExperts = layer.experts
    representatives_R = None
    if bank.spec.partition in ("contiguous", "random", "kmeans"):
        bank.arrange(partition_of_weights(bank, seed))
    else:
        shared = layer.router.spec.shared
        chunks = lambda: activations(bank, x_TD)  # noqa: E731
        neurons_EM, representatives_R = partition_of_activations(bank, chunks, shared, seed)
        bank.arrange(neurons_EM)
    if bank.mean is not None:
        total_F = sum(chunk_TF.double().sum(0) for chunk_TF in activations(bank, x_TD))
        mean_F = (total_F / len(x_TD))[bank.neurons.flatten()]
        bank.mean.data = mean_F.view_as(bank.mean).to(bank.mean)
    layer.router.begin(bank, representatives_R)


def activations(bank: SplitExperts, x_TD: Tensor) -> Iterator[Tensor]:
    """What the second matrix reads, (T, F) a chunk at a time, neurons in the dense order."""
    place_F = bank.neurons.flatten().argsort()
    for x_CD in x_TD.split(CHUNK_TOKENS):
        _, hidden_CEm = bank.hidden(x_CD.to(bank.down.device))
        yield hidden_CEm.flatten(1)[:, place_F]


def _targets(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """What the scores of the layer's router should be, (T, E) float32, beside the inputs."""
    kind, device = layer.router.spec.target, layer.experts.down.device
    chunks = [
        targets(layer.experts, x_CD.to(device), kind).to(x_TD.device)
        for x_CD in x_TD.split(CHUNK_TOKENS)
    ]
    return torch.cat(chunks)


@torch.no_grad()
def captured_masses(
    layer: MoELayer, x_TD: Tensor, wanted_TE: Tensor, share: float = REPORTED_SHARE
) -> dict[str, float]:
    """The part of what experts matter that falls on a share of them, chosen by several scores.

    MoEfication's measure of a router: sum over the chosen experts of their target, divided by the
    sum over all, mean over tokens. Shared experts are left out of it.
    """
    gate, bank = layer.router, layer.experts
    shared, device = gate.spec.shared, bank.down.device
    wanted_TR = wanted_TE[:, shared:].to(device)
    k = max(1, round(share * wanted_TR.shape[1]))
    x_TD = x_TD.to(device)
    similarity = SimilarityScorer(Similarity(), bank, gate.spec)
    found = {
        "router": squashed(gate.scorer(x_TD), gate.spec.squash),
        "oracle": wanted_TR,
        "similarity": similarity(x_TD),
        "chance": torch.rand_like(wanted_TR),
    }
    total_T = wanted_TR.sum(-1).clamp_min(1e-12)
    return {
        f"mass_{name}": ((wanted_TR * select(scores, "top_k", k)[0]).sum(-1) / total_T)
        .mean()
        .item()
        for name, scores in found.items()
    }
