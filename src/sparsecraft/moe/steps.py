"""When the states of routers move: behind every optimizer step of any training.

`sc.train` says when a step is. In another loop or trainer it is seen at the next forward pass in
training, by parameters that are no longer what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, distributed, nn

from sparsecraft.dense.sharing import own_part
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.moving import Seen
from sparsecraft.moe.routing import Routing

SAMPLE = 512  # of each parameter


class Step:
    """What the routers whose states move have done since they last did.

    Attributes:
        sums: layer -> the vector of a `Seen`, summed over the passes of the step.
        before: numbers of one layer's parameters when that began.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.before: Tensor | None = None

    def copy(self) -> Step:
        """What is noted until now, in one of its own."""
        other = Step()
        other.sums, other.before = dict(self.sums), self.before
        return other

    def note(
        self,
        model: nn.Module,
        routings: Mapping[str, Routing],
        masks: Callable[[str], Tensor | None],
    ) -> None:
        """One forward pass in training.

        Args:
            routings: layer -> what it decided.
            masks: layer -> True on its real tokens.
        """
        for name, routing in routings.items():
            router = model.get_submodule(name).router
            if router.moving:
                if self.before is None:
                    self.before = _numbers(model.get_submodule(name))
                self.sums[name] = self.sums.get(name, 0) + Seen.of(routing, masks(name)).vector

    def move_if_trained(self, model: nn.Module) -> None:
        """`move`, if an optimizer has changed what was noted of; all processes ask alike."""
        if self.before is None:
            return
        now = _numbers(model.get_submodule(next(iter(self.sums))))
        changed = now.new_tensor(not torch.equal(self.before, now))
        if _everywhere(changed) > 0:
            self.move(model)

    def move(self, model: nn.Module) -> None:
        """Let the states move by what all processes have noted; then nothing is."""
        names = [*self.sums]
        if not names:
            return
        lengths = [len(self.sums[name]) for name in names]
        device = self.sums[names[0]].device
        total = _everywhere(torch.cat([self.sums[name].to(device) for name in names]))
        self.sums, self.before = {}, None
        seen = dict(zip(names, map(Seen.read, total.split(lengths)), strict=True))
        for name, own in seen.items():
            for state in model.get_submodule(name).router.moving:
                state.move(own, [*seen.values()])


def has_moving(model: nn.Module) -> bool:
    """Whether the state of any router moves."""
    layers = (m for m in model.modules() if isinstance(m, MoELayer) and m.router is not None)
    return any(layer.router.moving for layer in layers)


def _everywhere(vector: Tensor) -> Tensor:
    """Its sum over all processes."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(vector)
    return vector


def _numbers(module: nn.Module) -> Tensor:
    """Some of every parameter that trains; a fused optimizer leaves torch's count of changes."""
    parts = [own_part(p.detach()).flatten() for p in module.parameters() if p.requires_grad]
    some = [part[:: max(1, len(part) // SAMPLE)].float() for part in parts]
    return torch.cat([part.to(some[0].device) for part in some]) if some else torch.empty(0)
