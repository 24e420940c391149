"""Fit the routers of split networks: capture what the networks read, deal the neurons out, regress.

The model is not changed but for its routers, the order of its neurons, and their means. Inputs are
captured once, in one pass over the data with every expert on, padding left out.

Shapes: T tokens, D width, E experts, m neurons of each, F = E m, R = E less the shared experts.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from sparsecraft.budget import run, split_layers
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.experts.split import SplitExperts
from sparsecraft.init.banks import partition_of_activations, partition_of_weights
from sparsecraft.kernels.selection import select
from sparsecraft.layer import MoELayer
from sparsecraft.recipe import FitSpec
from sparsecraft.regression import Report, first_held, fit_imitations, fit_routers
from sparsecraft.routers.split import SimilarityScorer, squashed, targets

log = logging.getLogger("sparsecraft")

# Tokens whose activations are in memory at a time.
CHUNK_TOKENS = 4096
# Share of experts at which the captured mass is reported: MoEfication's.
REPORTED_SHARE = 0.2

Masks = Callable[[str], Tensor | None]


def fit(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    spec: FitSpec,
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
    """
    imitating = spec.what == "imitations"
    layers = {
        name: layer
        for name, layer in split_layers(model).items()
        if not imitating or layer.place == "imitate"
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


def _make_imitations(
    layers: dict[str, MoELayer], inputs: dict[str, Tensor], spec: FitSpec, seed: int
) -> Report:
    return fit_imitations(layers, inputs, spec)


def _make_routers(
    layers: dict[str, MoELayer], inputs: dict[str, Tensor], spec: FitSpec, seed: int
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


def summary(found: dict[str, Any]) -> str:
    """What `fit` found, in one line."""
    layers = found["layers"].values()
    if not all("mass_router" in layer for layer in layers):
        loss = sum(layer["loss"] for layer in layers) / len(layers)
        return f"{found['tokens']} tokens; held-out loss {loss:.4f}"
    masses = ("router", "oracle", "similarity", "chance")
    means = {name: sum(layer[f"mass_{name}"] for layer in layers) / len(layers) for name in masses}
    shown = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
    return f"{found['tokens']} tokens; mass captured by 20% of the experts: {shown}"


def _cuda(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.is_cuda})


# ------------------------------------------------------------------------------------------ capture


def capture(
    model: nn.Module,
    layers: dict[str, MoELayer],
    batches: Iterable[dict[str, Any]],
    tokens: int,
    masks: Callable[[nn.Module, dict[str, Any]], Masks],
    folder: Path,
    teachers: bool = False,
) -> dict[str, Tensor]:
    """Layer name -> what it reads, (T, D): up to `tokens` real tokens, in the order of the data.

    Args:
        teachers: of the dense Linears, whether or not something imitates them already.
    """
    stores: dict[str, Tensor] = {}
    filled: dict[str, int] = defaultdict(int)
    mask: list[Masks] = []

    def keep(name: str, x: Tensor) -> None:
        x_TD, real_T = x.reshape(-1, x.shape[-1]), mask[0](name)
        if real_T is not None:
            x_TD = x_TD[real_T.reshape(-1).to(x_TD.device, torch.bool)]
        if name not in stores:
            count = len(layers)
            stores[name] = _store((tokens, x_TD.shape[-1]), x_TD, count, folder / f"{len(stores)}")
        start = filled[name]
        x_TD = x_TD[: tokens - start]
        stores[name][start : start + len(x_TD)] = x_TD.to(stores[name].device)
        filled[name] += len(x_TD)

    def hook(name: str) -> Callable:
        return lambda module, args: keep(name, args[0])

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with _whole(model, teachers):
            for batch in batches:
                mask[:] = [masks(model, batch)]
                model(**_inputs(model, batch))
                if all(filled[name] >= tokens for name in layers):
                    break
    finally:
        for handle in hooks:
            handle.remove()
    if missing := [name for name in layers if not filled[name]]:
        raise DataError(f"The data gave no token to {missing[0]!r}; the routers have none to fit.")
    return {name: stores[name][: filled[name]] for name in layers}


@contextmanager
def _whole(model: nn.Module, teachers: bool) -> Iterator[None]:
    """Every expert on, no dropout, no gradients; as it was afterwards.

    Args:
        teachers: Linears run instead of what imitates them.
    """
    training = model.training
    layers = split_layers(model).values()
    before = [(layer, layer.router.runs, layer.imitates) for layer in layers]
    model.eval()
    run(model, "every")
    for layer in layers:
        layer.imitates = layer.imitates and not teachers
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        for layer, runs, imitates in before:
            layer.router.runs, layer.imitates = runs, imitates


def _inputs(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    known = {key: value for key, value in batch.items() if key != "token_mask"}
    return {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in known.items()}


def _store(shape: tuple[int, int], like: Tensor, count: int, path: Path) -> Tensor:
    """Room for one layer's inputs: beside the model, in main memory, or in a file."""
    size = shape[0] * shape[1] * like.element_size() * count
    if like.is_cuda and size < torch.cuda.mem_get_info(like.device)[0] // 2:
        return like.new_empty(shape)
    if size < psutil.virtual_memory().available // 2:
        return torch.empty(shape, dtype=like.dtype)
    log.info(f"The inputs of {count} networks take {size / 1e9:.1f} GB, on disk for the while.")
    numel = shape[0] * shape[1]
    return torch.from_file(str(path), shared=True, size=numel, dtype=like.dtype).view(shape)


# -------------------------------------------------------------------- partition, means and targets


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
        bank.mean.copy_(mean_F.view_as(bank.mean))
    if representatives_R is not None and hasattr(layer.router.scorer, "rows"):
        layer.router.scorer.begin(bank, representatives_R)
    else:
        layer.router.begin(bank)


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


# ------------------------------------------------------------------------------------ captured mass


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
    similarity = SimilarityScorer(gate.spec, bank)
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
