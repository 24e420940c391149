"""What the choices of a layer, and of all layers together, amount to.

Shapes: N tokens, D domains, E experts, L layers.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import torch

from sparsecraft.evaluation.analysis.chance import (
    information,
    information_bits,
    lifts,
    over_represented,
)
from sparsecraft.evaluation.analysis.choices import Choices, LayerChoices
from sparsecraft.evaluation.routing import DEAD, OVERLOADED, load_entropy

PATHS = 10  # that are listed
PAIRS = 10
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DRAWS = 50  # of a batch of each size


def layer_measures(choices: Choices, name: str, twin: Choices | None) -> dict[str, Any]:
    """Of one layer.

    Args:
        twin: what routers that know nothing chose.
    """
    layer = choices.layers[name]
    E, load_DE = layer.experts, layer.load_DE
    shares_E = load_DE.sum(0) / max(load_DE.sum(), 1e-30)
    found: dict[str, Any] = {
        "experts": E,
        "load": shares_E.tolist(),
        "load_by_domain": _shares(load_DE).tolist(),
        "load_entropy": load_entropy(torch.from_numpy(load_DE.sum(0))),
        "dead": [e for e in range(E) if shares_E[e] * E < DEAD],
        "overloaded": [e for e in range(E) if shares_E[e] * E > OVERLOADED],
    }
    if layer.scores_DE is not None and load_DE.sum():
        found |= entropies(layer)
    if layer.apart is not None:
        return found | {"apart": layer.apart}
    first_N, second_N, D = layer.first_N, layer.second_N, len(choices.domains)
    for which, chosen_N in (("first", first_N), ("second", second_N)):
        counts_DE = _counted(choices.domains_N, chosen_N, D, E)
        found[f"{which}_by_domain"] = _shares(counts_DE).tolist()
    known = information(first_N, choices.domains_N, choices.documents_N, E)
    found["domain_information"] = known and known.to_dict()
    if twin is not None and name in twin.layers:
        given = twin.layers[name].first_N, twin.domains_N, twin.documents_N, E
        found["domain_information_of_twin"] = information_bits(*given)
    found["experts_per_token"] = np.bincount(layer.sizes_N, minlength=E + 1).tolist()
    found["vocabulary"] = over_represented(first_N, choices.tokens_N, E)
    if not layer.soft:
        found["together"] = together(layer)
        found["union"] = union(layer)
    return found


def entropies(layer: LayerChoices) -> dict[str, Any]:
    """H_s and H_u in bits of all tokens, and of those of each domain; at most log2 E."""
    tokens_D = layer.scores_DE.sum(1)  # probabilities of a token sum to one
    mean_DE = layer.scores_DE / np.maximum(tokens_D, 1)[:, None]
    mean_E = layer.scores_DE.sum(0) / tokens_D.sum()
    of_all = {"H_s": layer.entropies_D.sum() / tokens_D.sum(), "H_u": _bits(mean_E)}
    by_domain = [
        {"H_s": entropy / tokens, "H_u": _bits(row)} if tokens else None
        for entropy, tokens, row in zip(layer.entropies_D, tokens_D, mean_DE, strict=True)
    ]
    return {"entropy": of_all | {"most": math.log2(layer.experts)}, "entropy_by_domain": by_domain}


def together(layer: LayerChoices) -> list[dict[str, float]]:
    """The pairs of experts that most outrun chance in having tokens together."""
    lift_EE = lifts(layer.pairs_EE)
    pairs = [
        {"experts": [i, j], "tokens": int(layer.pairs_EE[i, j]), "times": float(lift_EE[i, j])}
        for i in range(layer.experts)
        for j in range(i + 1, layer.experts)
        if lift_EE[i, j] > 1
    ]
    return sorted(pairs, key=lambda pair: -pair["times"])[:PAIRS]


def union(layer: LayerChoices, seed: int = 0) -> list[dict[str, float]]:
    """How many experts a batch of tokens needs, each of its first two, beside what it would need if
    tokens were independent of each other and as the load is: batches are runs of the text."""
    first_N, second_N, E = layer.first_N, layer.second_N, layer.experts
    chosen_N2 = np.stack([first_N, second_N], 1).astype(np.int64)
    draw, found = np.random.default_rng(seed), []
    for size in (size for size in BATCHES if size <= len(first_N)):
        run, apart = [], []
        for _ in range(DRAWS):
            start = draw.integers(0, len(first_N) - size + 1)
            run.append(_distinct(chosen_N2[start : start + size], E))
            apart.append(_distinct(chosen_N2[draw.integers(0, len(first_N), size)], E))
        found.append(
            {"tokens": size, "experts": float(np.mean(run)), "independent": float(np.mean(apart))}
        )
    return found


def _distinct(chosen: np.ndarray, experts: int) -> int:
    return len(np.unique(chosen[chosen < experts]))


def paths(choices: Choices) -> dict[str, Any] | None:
    """The commonest ways of a token through the first experts of all layers, beside how common each
    would be if layers chose independently of each other; None of one layer."""
    names = [name for name, layer in choices.layers.items() if layer.apart is None]
    if len(names) < 2:
        return None
    chosen_NL = np.stack([choices.layers[name].first_N for name in names], 1)
    N = len(chosen_NL)
    shares = [np.bincount(chosen_NL[:, at]) / N for at in range(len(names))]
    kept = Counter(map(bytes, np.ascontiguousarray(chosen_NL)))
    listed = []
    for raw, count in kept.most_common(PATHS):
        path = np.frombuffer(raw, chosen_NL.dtype).tolist()
        chance = math.prod(share[e] for share, e in zip(shares, path, strict=True))
        listed.append({"experts": path, "share": count / N, "by_chance": chance})
    return {"layers": names, "different": len(kept), "tokens": N, "common": listed}


def following(choices: Choices) -> list[dict[str, Any]]:
    """For each layer and the next: I(first expert there; first expert here), in bits, beside the
    mean that chance gives tables of such sizes, (A-1)(B-1) / (2 N ln 2) of A and B experts in use
    (Miller 1955)."""
    names = [name for name, layer in choices.layers.items() if layer.apart is None]
    found = []
    for before, after in itertools.pairwise(names):
        here, there = choices.layers[before], choices.layers[after]
        live_N = (here.first_N < here.experts) & (there.first_N < there.experts)
        if not live_N.any():
            continue
        counts = _counted(here.first_N[live_N], there.first_N[live_N], here.experts, there.experts)
        joint = counts / counts.sum()
        bits = _bits(joint.sum(0)) + _bits(joint.sum(1)) - _bits(joint.ravel())
        used = (joint.sum(1) > 0).sum(), (joint.sum(0) > 0).sum()
        chance = (used[0] - 1) * (used[1] - 1) / (2 * live_N.sum() * math.log(2))
        found.append({"layers": [before, after], "bits": max(0.0, bits), "chance": float(chance)})
    return found


def _counted(rows_N: np.ndarray, columns_N: np.ndarray, rows: int, columns: int) -> np.ndarray:
    live_N = (columns_N < columns) & (rows_N < rows)
    at_N = rows_N[live_N].astype(np.int64) * columns + columns_N[live_N]
    return np.bincount(at_N, minlength=rows * columns).reshape(rows, columns).astype(np.float64)


def _shares(counts_DE: np.ndarray) -> np.ndarray:
    return counts_DE / np.maximum(counts_DE.sum(1, keepdims=True), 1e-30)


def _bits(shares: np.ndarray) -> float:
    live = shares[shares > 0]
    return float(-(live * np.log2(live)).sum())
