"""The PEFT layer that holds a `MoELayer` for each adapter, and what its tensors are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sparsecraft.donor import FFNSpan, Site
from sparsecraft.errors import CheckpointError, SparsecraftError

PREFIX = "sparsecraft_"
HELD = "sparsecraft_moe"  # the attribute in which a layer has its adapters
Standing = tuple[tuple[str, ...], int]  # the dense modules, and the level above them
WRAPPED = "base_model.model."  # what PeftModel puts before the names of the dense model


class ExpertsTunerLayer(nn.Module, BaseTunerLayer):
    """Stands where a dense module stood and holds one `MoELayer` for each adapter.

    Active adapters stand on each other, in the order in which they were made active.

    Attributes:
        site: where it stands in the dense model.
        level: how many other layers of ours stand below it on the same dense module.
    """

    adapter_layer_names = (HELD,)

    def __init__(self, site: Site, level: int):
        super().__init__()
        self.site, self.level = site, level
        self.sparsecraft_moe = nn.ModuleDict()
        self.merged_adapters = []

    @property
    def standing(self) -> Standing:
        """Which layer this is among all those that may stand in the dense model."""
        return self.site.members, self.level

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        top = self.base_layer
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.sparsecraft_moe:
                layer = self.sparsecraft_moe[name]
                if layer.place == "inside" and top is not self.base_layer:
                    raise SparsecraftError(
                        f"Adapter {name!r} works inside the dense network at {self.site.path!r} "
                        "and cannot stand on another adapter; make it the first active one."
                    )
                # Not as a submodule: the base belongs to this layer, whatever is active.
                object.__setattr__(layer, "base", top)
                top = layer
        return top(x, *args, **kwargs)

    def put_in(self, model: nn.Module) -> None:
        """Take the dense module's place, in a model without outer layers of ours."""
        path, spans = self.site.path, self.site.spans_siblings
        self.base_layer = FFNSpan(model, self.site) if spans else model.get_submodule(path)
        for member in self.base_layer.paths.values() if spans else ():
            model.set_submodule(member, nn.Identity())
        model.set_submodule(path, self)

    def take_out(self, model: nn.Module) -> None:
        """Give the dense module its place back, in a model without outer layers of ours."""
        if not self.site.spans_siblings:
            model.set_submodule(self.site.path, self.base_layer)
            return
        for name, member in self.base_layer.paths.items():
            model.set_submodule(member, self.base_layer.get_submodule(name))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        # PEFT's own looks for the base's one weight, which a feed-forward network has not.
        if adapter_name in self.sparsecraft_moe:
            device = device or next(self.base_layer.parameters()).device
            self.sparsecraft_moe[adapter_name].to(device)


def layers_of(model: nn.Module) -> list[ExpertsTunerLayer]:
    """Our layers in a model, inner ones first."""
    return [m for m in model.modules() if isinstance(m, ExpertsTunerLayer)][::-1]


@contextmanager
def taken_out(model: nn.Module) -> Iterator[list[ExpertsTunerLayer]]:
    """The dense model; after the block, the layers in the list stand in it."""
    layers = layers_of(model)
    for layer in reversed(layers):
        layer.take_out(model)
    try:
        yield layers
    finally:
        sites = [layer.site for layer in layers]

        def inner_first(layer: ExpertsTunerLayer) -> tuple[int, int]:
            return -sum(other.contains(layer.site) for other in sites), layer.level

        for layer in sorted(layers, key=inner_first):
            layer.put_in(model)


def standings(sites: list[Site]) -> list[Standing]:
    """Which layer holds the part of an adapter at each of its sites, inner ones first."""
    levels: Counter = Counter()
    found = []
    for site in sites:
        found.append((site.members, levels[site.members]))
        levels[site.members] += 1
    return found


def standing_paths(sites: list[Site]) -> list[str]:
    """Where a layer stands for each of `sites`, inner ones first, when all of them do."""
    paths = []
    for index, site in enumerate(sites):
        path = site.path
        for outer in sites[index + 1 :]:
            if outer.contains(site) or outer.members == site.members:
                path = _below(outer, path)
        paths.append(path)
    return paths


def _below(outer: Site, path: str) -> str:
    """The new path of what is at `path` once a layer stands at `outer`."""
    parts = {member: f".{name}" for name, member in outer.chain} or {outer.path: ""}
    for member, name in parts.items():
        if path == member or path.startswith(f"{member}."):
            return f"{outer.path}.base_layer{name}{path.removeprefix(member)}"
    return path


def saved_names(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Name of each tensor of an adapter in `model` -> its name in a file.

    In a file it is called as in a model that has this adapter alone, without the adapter's name;
    what transformers holds without a `PeftModel` gets its prefix from transformers.
    """
    found = [
        (path.replace("_fsdp_wrapped_module.", ""), module)
        for path, module in model.named_modules()
        if isinstance(module, ExpertsTunerLayer) and adapter_name in module.sparsecraft_moe
    ][::-1]
    alone = standing_paths([layer.site for _, layer in found])
    return {
        f"{path}.{HELD}.{adapter_name}.{name}": f"{prefix}{saved}.{HELD}.{name}"
        for (path, layer), saved in zip(found, alone, strict=True)
        for prefix in (WRAPPED if path.startswith(WRAPPED) else "",)
        for name in layer.sparsecraft_moe[adapter_name].state_dict()
    }


def check_complete(found: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """Raise CheckpointError unless the names in a file are those that the recipe has."""
    found, wanted = {name for name in found if f".{HELD}." in name}, set(wanted)
    for names, verb in ((wanted - found, "lacks"), (found - wanted, "holds besides")):
        if names:
            raise CheckpointError(
                f"{where} does not fit its recipe and this model: it {verb} {len(names)} tensors, "
                f"{min(names)!r} among them. Load it into the model that it was made for."
            )
