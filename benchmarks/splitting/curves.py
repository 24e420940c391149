"""Splits of trained weights, and the curves of loss against the share of neurons that run.

Shapes: T tokens, E experts, m neurons of each.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import sparsecraft as sc
from benchmarks.lab.text import held_out, inputs_of
from benchmarks.splitting.arms import ARMS, NATURAL, Arm, Variant
from benchmarks.splitting.run import DOMAINS, SplitTexts, every, fit_batches, pass_stages
from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.cost import split_flops
from sparsecraft.moe.init.partition import random_partition
from sparsecraft.moe.routers.gate import Gate
from sparsecraft.moe.routers.part_scorers import targets
from sparsecraft.surgery.budget import set_budget, split_layers
from sparsecraft.training.fit.capture import capture
from sparsecraft.training.fit.fit import captured_masses

LEAST = 1e-4  # thresholds below it are all the same to a curve


def split(
    name: str, training: str, weights, texts: SplitTexts, seed: int
) -> tuple[nn.Module, dict]:
    """The model of an arm: converted and its routers fitted; and the fit's report."""
    arm: Arm = ARMS[name]
    if arm.in_place:
        return weights, {}
    model = copy.deepcopy(weights)
    recipe = arm.recipe()
    texts.partitions.convert(model, recipe, training, seed)
    return model.eval(), pass_stages(model, texts, recipe.stages, seed)


# ------------------------------------------------------------------------------------- curves


class Meter:
    """Shares of the experts that run, by layer, over all real tokens that it has seen."""

    def __init__(self, model):
        self.layers = split_layers(model)
        self.sums = dict.fromkeys(self.layers, 0.0)
        self.tokens = 0

    def add(self, routings, real_T=None) -> None:
        for name in self.layers:
            routing = routings[name]
            share_T = (routing.indices_TK < routing.num_experts).float().mean(-1)
            self.sums[name] += (share_T if real_T is None else share_T[real_T]).sum()
        self.tokens += len(share_T) if real_T is None else int(real_T.sum())

    def shares(self) -> dict[str, float]:
        return {name: float(total) / self.tokens for name, total in self.sums.items()}

    def facts(self) -> dict[str, float]:
        """Means over layers of the share and of what it costs, and the extremes."""
        shares = self.shares()
        costs = [split_flops(layer, shares[name]) / split_flops(layer, 1)
                 for name, layer in self.layers.items()]  # fmt: skip
        return {"share": sum(shares.values()) / len(shares), "flops": sum(costs) / len(costs),
                "least": min(shares.values()), "most": max(shares.values())}  # fmt: skip


@torch.no_grad()
def shares_of(model, texts: SplitTexts) -> float:
    """Mean share of the experts that run on the texts for thresholds; no logits."""
    meter = Meter(model)
    with sc.trace(model) as routings:
        for batch in texts.batches("calibrate", texts.sizes.other_packs):
            model.model(**inputs_of(batch), use_cache=False)
            meter.add(routings)
    return meter.facts()["share"]


@torch.no_grad()
def evaluate(model, texts: SplitTexts, routed: bool = True) -> dict:
    """Loss of every domain and of all, over tokens; where routed, what share ran at what cost."""
    meter = Meter(model) if routed else None
    sums, counts = {}, {}
    for name in DOMAINS:
        batches = texts.batches(name, texts.sizes.evaluation)
        sums[name], counts[name] = held_out(model, batches, meter and meter.add)
    found = {"loss": sum(sums.values()) / sum(counts.values())}
    found |= {name: sums[name] / counts[name] for name in DOMAINS}
    if meter:
        found |= meter.facts()
    return {key: round(value, 5) for key, value in found.items()}


def vary(model, variant: Variant, seed: int) -> None:
    """Put another router, rule or partition into a copy of an arm's model, in place."""
    for number, layer in enumerate(split_layers(model).values()):
        bank, before = layer.experts, layer.router
        if variant.random:
            neurons_EM = random_partition(bank.neurons.numel(), bank.num_experts, seed + number)
            bank.arrange(neurons_EM)
        if variant.spec:
            layer.router = Gate(dataclasses.replace(before.spec, **variant.spec), bank)
            if "scorer" not in variant.spec:
                layer.router.scorer.load_state_dict(before.scorer.state_dict())


def thresholds(select: str) -> list[float]:
    """From many experts to few. Sigmoids lie anywhere between 0 and 1, so by their logits."""
    if select == "threshold":
        return [1 / (1 + math.exp(-x)) for x in np.linspace(-9, 9, 37)]
    found = [LEAST, *np.geomspace(0.003, 0.1, 8), *np.linspace(0.14, 1, 14)]
    return found if select == "relative" else [1 - t for t in found[:-1]] + [LEAST]


def calibrate(model, share_now: Callable[[], float]) -> list[tuple[float, float]]:
    """(share, threshold) by ascending share, as measured on text apart."""
    gates = [layer.router for layer in split_layers(model).values()]
    found: dict[float, float] = {}
    for threshold in thresholds(gates[0].spec.select.kind):
        for gate in gates:
            gate.runs, gate.threshold = "sparse", threshold
        found[share_now()] = float(threshold)
    return sorted(found.items())


def curve(
    model, shares: tuple[float, ...], share_now: Callable[[], float], score: Callable[[], dict]
) -> list[dict]:
    """Points of one curve, `score()` at every budget, the recipe's own rule first where it has a
    threshold; what a rule cannot reach is left out, and `missing` says why."""
    gate = next(iter(split_layers(model).values())).router
    by_count = gate.spec.k is not None
    set_budget(model, None)
    points = [] if by_count else [{"budget": NATURAL} | score()]
    running = model.sparsecraft.running
    running.calibration[:] = [] if by_count else calibrate(model, share_now)
    for share in shares:
        try:
            set_budget(model, share)
        except SparsecraftError as error:
            points.append({"budget": share, "missing": str(error)})
            continue
        points.append({"budget": share} | score())
    return points


@torch.no_grad()
def masses(model, batches, masks, tokens: int) -> dict[str, dict]:
    """Captured mass at 20 % and 50 %, on text that no router was fitted to: means over layers, and
    in how many of them oracle >= router >= similarity >= chance."""
    layers = split_layers(model)
    with tempfile.TemporaryDirectory() as folder:
        inputs = capture(model, layers, batches, tokens, masks, Path(folder))
    names, found = ("oracle", "router", "similarity", "chance"), {}
    wanted = {n: targets(layer.experts, inputs[n], layer.router.spec.target)
              for n, layer in layers.items()}  # fmt: skip
    for share in (0.2, 0.5):
        each = [captured_masses(layer, inputs[n], wanted[n], share)
                for n, layer in layers.items()]  # fmt: skip
        values = [[layer[f"mass_{name}"] for name in names] for layer in each]
        ordered = sum(all(a >= b for a, b in itertools.pairwise(v)) for v in values)
        means = dict(zip(names, np.mean(values, axis=0).round(4).tolist(), strict=True))
        found[str(share)] = means | {"ordered": ordered, "layers": len(layers)}
    return found


def measure_arm(name: str, training: str, weights, texts: SplitTexts, seed: int) -> dict:
    """Everything about one arm: the whole function, captured masses, and its curves."""
    start = time.perf_counter()
    model, report = split(name, training, weights, texts, seed)
    row = {"split_s": round(time.perf_counter() - start, 1), "fit_s": report.get("seconds")}
    set_budget(model, 1.0)
    layer = next(iter(split_layers(model).values()))
    row |= {
        "whole": evaluate(model, texts, routed=False),
        "experts": layer.experts.num_experts,
        "masses": masses(model, fit_batches(texts, "mass"), every, 1 << 14),
        "curves": {},
        "curve_s": {},
    }
    for label, variant in ARMS[name].variants.items():
        begun = time.perf_counter()
        other = copy.deepcopy(model) if variant.random or variant.spec else model
        vary(other, variant, seed)
        other.eval()
        row["curves"][label] = curve(
            other,
            variant.shares,
            lambda m=other: shares_of(m, texts),
            lambda m=other: evaluate(m, texts),
        )
        row["curve_s"][label] = round(time.perf_counter() - begun, 1)
        if other is not model:
            del other
    return row | {"wall_s": round(time.perf_counter() - start, 1), "_model": model}
