"""The PEFT layer that holds a `MoELayer` for each adapter, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sparsecraft.checkpoint.adapter_names import HELD, WRAPPED, Standing, standing_paths
from sparsecraft.checkpoint.gathering import unwrapped
from sparsecraft.dense.sites import FFNSpan, Site, silence
from sparsecraft.errors import SparsecraftError


class ExpertsTunerLayer(nn.Module, BaseTunerLayer):
    """Stands where a dense module stood and holds one `MoELayer` for each adapter.

    Active adapters stand on each other, in the order in which they were made active.

    Attributes:
        site: where it stands in the dense model.
        level: how many other layers of ours stand below it on the same dense module.
        in_features: of the dense module's input, which PEFT asks of every layer.
        out_features: of its output.
        cast_input_dtype_enabled: what `peft.helpers.disable_input_dtype_casting` turns off in
            layers that cast their input; ours compute in the types that they are given.
    """

    adapter_layer_names = (HELD,)
    cast_input_dtype_enabled = False

    def __init__(self, site: Site, level: int, in_features: int, out_features: int):
        super().__init__()
        self.site, self.level = site, level
        self.in_features, self.out_features = in_features, out_features
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
                if layer.opens_base and top is not self.base_layer:
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
        silence(model, self.site)

    def take_out(self, model: nn.Module) -> None:
        """Give the dense module its place back, in a model without outer layers of ours."""
        if not self.site.spans_siblings:
            model.set_submodule(self.site.path, self.base_layer)
            return
        for name, member in self.base_layer.paths.items():
            model.set_submodule(member, self.base_layer.get_submodule(name))
        silence(model, self.site, undo=True)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        # PEFT's own looks for the base's one weight, which a feed-forward network has not.
        # An activation has none either: its adapter stays where PEFT has read it.
        if device is None:
            device = next((p.device for p in self.base_layer.parameters()), None)
        if adapter_name in self.sparsecraft_moe and device is not None:
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
        for prefix in (WRAPPED if unwrapped(path).startswith(WRAPPED) else "",)
        for name in layer.sparsecraft_moe[adapter_name].state_dict()
    }
