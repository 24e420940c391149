"""What is reported of a run beside its losses: routing, and accuracy on choices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sparsecraft.evaluation.routing import load_entropy, mutual_information
from sparsecraft.moe.routing import Routing


def select(routing: Routing, index: Tensor) -> Routing:
    fields = (routing.weights_TK, routing.indices_TK, routing.logits_TE)
    return Routing(*(f.index_select(0, index) for f in fields))


def add_counts(routing: Mapping[str, Routing], real_T: Tensor, part: str, top: dict, load: dict):
    """Add one batch's top-1 counts by domain, and its load, per layer."""
    for name, r in routing.items():
        ones = torch.zeros(r.num_experts, dtype=torch.float64, device=real_T.device)
        counts_E = ones.index_add(0, r.indices_TK[:, 0], real_T.double())
        key = name, part
        top[key] = top.get(key, 0) + counts_E
        load[name] = load.get(name, 0) + r.load_E(real_T).double() * real_T.sum()


def routing_facts(top: dict, load: dict, domains: tuple[str, ...]) -> dict[str, float]:
    """Load entropy over log E, and I(top-1 expert; domain) in bits with equal domains."""
    entropies = [load_entropy(load_E) for load_E in load.values()]
    information = [
        mutual_information(torch.stack([top[name, domain] for domain in domains])) for name in load
    ]
    return {
        "entropy_mean": sum(entropies) / len(entropies),
        "entropy_min": min(entropies),
        "mi_bits": sum(information) / len(information),
    }


def accuracies(questions: list[dict], scores: list[float]) -> dict[str, float]:
    by_template: dict[tuple[str, str], list[bool]] = {}
    for q in questions:
        first, last = q["documents"]
        best = max(range(first, last), key=scores.__getitem__) - first
        by_template.setdefault((q["task"], q["template"]), []).append(best == q["answer"])
    tasks: dict[str, list[float]] = {}
    for (task, _), right in by_template.items():
        tasks.setdefault(task, []).append(sum(right) / len(right))
    return {task: float(np.median(found)) for task, found in tasks.items()}
