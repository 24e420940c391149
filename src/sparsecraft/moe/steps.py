"""When the states of routers move: behind every optimizer step of any training.

`sc.train` says when a step is. In another loop or trainer it is seen at the next forward pass in
training, by parameters that are no longer what they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, distributed, nn

from sparsecraft.dense.sharing import own_part
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.moving import Seen
from sparsecraft.moe.routing import Routing

_LOCK = threading.Lock()
WATCHED, SAMPLE = 32, 512  # parameters, and numbers of each


class Step:
    """What the routers whose states move have done since they last did.

    Args:
        model: None for one without such routers.

    Attributes:
        layers: theirs, in the model's order, which is the same in all processes.
        sums: layer -> the vector of a `Seen`, summed over the passes of the step.
        watched: some parameters that train.
        before: numbers of theirs when that began.
    """

    def __init__(self, model: nn.Module | None = None):
        modules = () if model is None else model.modules()
        layers = (m for m in modules if isinstance(m, MoELayer) and m.router is not None)
        self.layers = [layer for layer in layers if layer.router.moving]
        self.sums: dict[nn.Module, Tensor] = {}
        self.watched: list[nn.Parameter] = []
        self.before: Tensor | None = None

    def copy(self) -> Step:
        """What is noted until now, in one of its own."""
        other = Step()
        other.layers, other.sums = self.layers, dict(self.sums)
        other.watched, other.before = self.watched, self.before
        return other

    def note(
        self,
        model: nn.Module,
        routings: Mapping[str, Routing],
        masks: Callable[[str], Tensor | None],
    ) -> None:
        """One forward pass in training.

        Args:
            model: what the names are of: a whole model, or its trunk.
            routings: layer -> what it decided.
            masks: layer -> True on its real tokens.
        """
        for name, routing in routings.items() if self.layers else ():
            layer = model.get_submodule(name)
            if layer.router.moving:
                if self.before is None:
                    self._watch(model)
                seen = Seen.of(routing, masks(name)).vector
                with _LOCK:  # several threads may train one model
                    self.sums[layer] = self.sums.get(layer, 0) + seen

    def move_if_trained(self) -> None:
        """`move`, if an optimizer has changed what was noted of; all processes ask alike."""
        if self.before is None:
            return
        if _everywhere(self.before.new_tensor(self._is_trained())) > 0:
            self.move()

    def move_alone(self) -> None:
        """The same before a model is saved, in one process: of several, one may be that saves."""
        if self.before is not None and not _several() and self._is_trained():
            self.move()

    def move(self) -> None:
        """Let the states move by what all processes have noted; then nothing is."""
        if self.before is None:
            return
        device = next(iter(self.sums.values())).device
        sizes = [layer.experts.num_experts + 2 for layer in self.layers]
        parts = [self._sum(layer, size) for layer, size in zip(self.layers, sizes, strict=True)]
        total = _everywhere(torch.cat([part.to(device) for part in parts]))
        self.sums, self.before = {}, None
        every = [
            Seen.read(vector, layer.router.wanted)
            for vector, layer in zip(total.split(sizes), self.layers, strict=True)
        ]
        for layer, own in zip(self.layers, every, strict=True):
            for state in layer.router.moving:
                state.move(own, every)

    def _watch(self, model: nn.Module) -> None:
        """Note the parameters of these layers; of a model in which they are frozen, any."""
        of_layers = [p for layer in self.layers for p in layer.parameters() if p.requires_grad]
        trained = of_layers or [p for p in model.parameters() if p.requires_grad]
        self.watched = trained[:: max(1, len(trained) // WATCHED)]
        self.before = _numbers(self.watched)

    def _is_trained(self) -> bool:
        return not torch.equal(self.before, _numbers(self.watched))

    def _sum(self, layer: MoELayer, size: int) -> Tensor:
        """What is noted of a layer; zeros where it did not run, or has other experts now."""
        found = self.sums.get(layer)
        return torch.zeros(size) if found is None or len(found) != size else found


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _everywhere(vector: Tensor) -> Tensor:
    """Its sum over all processes."""
    if _several():
        distributed.all_reduce(vector)
    return vector


def _numbers(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Some numbers of each; a fused optimizer leaves torch's count of changes as it is."""
    parts = [own_part(parameter.detach()).flatten() for parameter in parameters]
    some = [part[:: max(1, len(part) // SAMPLE)].float() for part in parts]
    return torch.cat([part.to(some[0].device) for part in some]) if some else torch.empty(0)
