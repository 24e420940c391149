"""The certificate of a model that does not fit into memory: layer by layer.

The dense model runs on a probe, module by module, with its weights read when a module is called
and dropped when it returns. Each converted layer gets the same input as the dense module it stands
for, and its output is compared; the probe goes on with the dense output, so that no difference
carries over to the next layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.errors import SparsecraftError
from sparsecraft.evaluation.certificate import TOLERANCE, Certificate, random_probe
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import dense_name, unique_tensors
from sparsecraft.surgery.record import conversion_of
from sparsecraft.surgery.revert import replaced_tensors

Read = Callable[[str], Tensor]


class CannotCompareError(SparsecraftError):
    """A model whose layers cannot be compared one by one."""


def certify(model: nn.Module, dense: Read, new: Read, seed: int = 0) -> Certificate:
    """Compare every layer of a converted model without memory (on the meta device) with the dense
    module that it stands for. The model cannot be used for anything else afterwards.

    Args:
        dense: gives the tensor of a dense name.
        new: gives the tensor of a name that the dense model does not have.

    Raises:
        CannotCompareError: the recipe's layers read more than their input, or the family's modules
            other weights than their own.
    """
    if conversion_of(model).hooks:
        raise CannotCompareError("its layers act on what they know of the whole batch")
    _fill_buffers(model)
    comparison = _Comparison(model, dense, new)
    comparison.listen()
    try:
        with torch.no_grad():
            model.base_model(**random_probe(model, seed))
    except (NotImplementedError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise CannotCompareError(f"{type(model).__name__} failed on it: {why}") from error
    return comparison.certificate()


def _fill_buffers(model: nn.Module) -> None:
    """Compute the buffers that are in no file, such as rotary frequencies, as transformers does
    when it loads a model."""
    for module in model.modules():
        hidden = [n for n in module._non_persistent_buffers_set if module._buffers[n] is not None]
        for name in hidden:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if hidden:
            model._init_weights(module)


class _Comparison:
    """Listens to a model's modules while it runs."""

    def __init__(self, model: nn.Module, dense: Read, new: Read):
        self.model, self.record = model, conversion_of(model)
        self.sources: dict[int, Callable[[], Tensor]] = {}
        for name, tensor in unique_tensors(model).items():
            was = dense_name(model, name)
            self._remember(tensor, *((new, name) if was is None else (dense, was)))
        for name, tensor in replaced_tensors(self.record).items():
            self._remember(tensor, dense, name)
        self.converted = False
        self.found: list[tuple[float, float, torch.dtype]] = []

    def _remember(self, tensor: Tensor, read: Read, name: str) -> None:
        self.sources[id(tensor)] = lambda: read(name)

    def listen(self) -> None:
        """Give every module its weights while it runs, and every layer its comparison."""
        layers = dict(zip(self.record.layers, self.record.plan, strict=True))
        for module in self.model.modules():
            if module in layers:
                module.forward = self._compared(module, layers[module])
            elif self._waiting(module, below=False):
                module.forward = self._with_weights(module, module.forward)

    def _with_weights(self, module: nn.Module, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._loaded(module, below=False):
                return forward(*args, **kwargs)

        return run

    def _compared(self, layer: MoELayer, item: Any) -> Callable:
        forward = layer.forward
        paths = item.site.members if item.site.spans_siblings else (item.site.path,)
        replaced = item.edit.replaces
        base = nn.Sequential(*(self.record.dense[p] for p in paths)) if replaced else layer.base

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.converted:  # inside another layer, which is compared as a whole
                with self._loaded(layer):
                    return forward(x, *args, **kwargs)
            with self._loaded(base):
                wanted = base(x) if replaced else base(x, *args, **kwargs)
            self.converted = True
            with self._loaded(layer):
                found = forward(x, *args, **kwargs)
            self.converted = False
            difference = (found - wanted).abs().max().item()
            self.found.append((difference, wanted.abs().max().item(), wanted.dtype))
            return wanted

        return run

    def _waiting(self, module: nn.Module, below: bool) -> list[tuple[dict, str, Tensor]]:
        """Where a module, or all below it, holds tensors without memory."""
        return [
            (store, name, tensor)
            for part in (module.modules() if below else (module,))
            for store in (part._parameters, part._buffers)
            for name, tensor in store.items()
            if tensor is not None and tensor.is_meta
        ]

    @contextmanager
    def _loaded(self, module: nn.Module, below: bool = True) -> Iterator[None]:
        waiting = self._waiting(module, below)
        for store, name, tensor in waiting:
            value = self.sources[id(tensor)]().to(tensor.dtype)
            store[name] = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
        try:
            yield
        finally:
            for store, name, tensor in waiting:
                store[name] = tensor

    def certificate(self) -> Certificate:
        """Of the layer that differs most, relative to its output."""
        share = [d / s if s else (float("inf") if d else 0.0) for d, s, _ in self.found]
        # A NaN is larger than anything.
        worst = max(range(len(share)), key=lambda i: (share[i] != share[i], share[i]))
        difference, scale, dtype = self.found[worst]
        return Certificate(
            max_difference=difference,
            scale=scale,
            tolerance=TOLERANCE[dtype] * scale,
            dtype=str(dtype).removeprefix("torch."),
            probes=1,
            layers=len(self.found),
        )
