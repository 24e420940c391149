"""What a log line says beside the loss: sums over micro-batches and processes, until it is due.

E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparsecraft.evaluation.routing import DEAD
from sparsecraft.moe.routers.moving import Seen
from sparsecraft.moe.routing import Routing, shares

# What is said of each layer, and of all of them.
KINDS = ("load_entropy", "router_entropy", "dead_experts", "dropped", "computing_experts")


class Tally:
    """Weighted means, and the load of every layer, of which nothing depends on how the steps'
    batches were cut: sums are kept, and divided once all of them are there.

    They stay tensors until a log line is due, so that recording does not wait for the device.
    """

    def __init__(self):
        self._sums: dict[str, Tensor] = {}  # name -> its values times their weights, the weights
        # Layer -> what each expert received, and whether it was to receive anything, (2, E).
        self._loads: dict[str, Tensor] = {}

    def copy(self) -> Tally:
        """What is recorded until now, in one of its own."""
        other = Tally()
        other._sums, other._loads = dict(self._sums), dict(self._loads)
        return other

    def add(self, name: str, value: Tensor | float, weight: Tensor | float) -> None:
        """One value of a mean; of weight zero it does not count, whatever it is."""
        weight = torch.as_tensor(weight, dtype=torch.float32)
        value = torch.as_tensor(value, dtype=torch.float32, device=weight.device)
        sums = torch.stack([(value * weight).where(weight > 0, 0.0), weight])
        self._sums[name] = self._sums.get(name, 0) + sums

    @torch.no_grad()
    def add_routing(self, layer: str, routing: Routing, mask_T: Tensor | None) -> None:
        """One layer's decisions for a micro-batch; `mask_T` is True on real tokens."""
        if routing.free:
            computing = Seen.of(routing.of_first(routing.num_experts - routing.free), mask_T)
            mean = computing.filled / computing.rows.clamp_min(1)
            self.add(f"computing_experts/{layer}", mean, computing.rows)
        if routing.wanted_TK is not None:
            seen = Seen.of(routing, mask_T)
            wanted = seen.wanted_E.sum()
            self.add(f"dropped/{layer}", 1 - seen.filled / wanted.clamp_min(1), wanted)
        self._loads[layer] = self._loads.get(layer, 0) + _against_target(routing, mask_T).flatten()
        entropy_T = torch.special.entr(routing.logits_TE.float().softmax(-1)).sum(-1)
        counted_T = routing.counted(mask_T)
        weight_T = torch.ones_like(entropy_T) if counted_T is None else counted_T.float()
        rows = weight_T.sum()
        mean = (entropy_T * weight_T).sum() / rows.clamp_min(1)
        self.add(f"router_entropy/{layer}", mean / _log(routing.num_experts), rows)

    def pop(self, summed: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call.

        Args:
            summed: a vector -> its sum over all processes, each of which calls this.
        """
        sums, loads = sorted(self._sums.items()), sorted(self._loads.items())
        if not sums:
            return {}
        vectors = [values.to(sums[0][1].device) for _, values in (*sums, *loads)]
        parts = summed(torch.cat(vectors)).cpu().split([len(vector) for vector in vectors])
        means = {}
        for (name, _), (value, weight) in zip(sums, parts[: len(sums)], strict=True):
            means[name] = (value / weight).item() if weight > 0 else 0.0
        for (layer, _), load in zip(loads, parts[len(sums) :], strict=True):
            amounts_E, meant_E = load.unflatten(0, (2, -1))
            if not amounts_E.any():  # no token of the step was the layer's
                continue
            load_E = shares(amounts_E)
            means[f"max_load/{layer}"] = load_E.max().item() * len(load_E)
            dead_E = (load_E * len(load_E) < DEAD) & (meant_E > 0)
            means[f"dead_experts/{layer}"] = dead_E.sum().item()
            entropy = torch.special.entr(load_E).sum().item()
            means[f"load_entropy/{layer}"] = entropy / _log(len(load_E))
        for kind in KINDS:
            layers = [value for key, value in means.items() if key.startswith(f"{kind}/")]
            if layers:
                means[kind] = sum(layers) / len(layers)
        self._sums.clear()
        self._loads.clear()
        return means


def _against_target(routing: Routing, mask_T: Tensor | None) -> Tensor:
    """What each expert received, for as much as an expert is meant to have, and whether it is meant
    to have anything, (2, E)."""
    amounts_E = routing.amounts_E(mask_T)
    if routing.target_load is None:
        return torch.stack([amounts_E, torch.ones_like(amounts_E)])
    meant_E = (routing.load_to_have_E() * routing.num_experts).to(amounts_E)
    live_E = meant_E > 0
    return torch.stack([(amounts_E / meant_E).where(live_E, 0.0), live_E.to(amounts_E)])


def _log(experts: int) -> float:
    return max(math.log(experts), 1e-9)
