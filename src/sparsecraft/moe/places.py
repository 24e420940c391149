"""What a layer computes, by its place beside the dense module F; E are the experts, w the routing.

Each function takes the layer, its input x, and what else F is called with.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def replace(layer, x: Tensor, *args, **kwargs) -> Tensor | tuple:
    """y = sum_e w_e E_e(x)"""
    return layer.mix(x, layer.route(x), *args, **kwargs)


def beside(layer, x: Tensor, *args, **kwargs) -> Tensor:
    """y = F(x) + sum_e w_e E_e(x)"""
    y = layer.base(x, *args, **kwargs)
    if layer.router is not None and layer.router.spec.gates_base:
        y = y * layer.router.gate_base(x)

    def add(part: Tensor) -> Tensor:
        if layer.mixes_slots:
            return part + layer.mix_slots(x).reshape(part.shape)
        return part + layer.mix(x, layer.route(x, part)).reshape(part.shape)

    return layer.on_rows(y, add)


def after(layer, x: Tensor, *args, **kwargs) -> Tensor:
    """y = sum_e w_e E_e(F(x))"""
    y = layer.base(x, *args, **kwargs)
    return layer.on_rows(y, lambda part: layer.mix(part, layer.route(x, part)))


def before(layer, x: Tensor, *args, **kwargs) -> Tensor:
    """y = F(sum_e w_e E_e(x))"""
    return layer.base(layer.mix(x, layer.route(x)), *args, **kwargs)


def inside(layer, x: Tensor, *args, **kwargs) -> Tensor:
    """y = sum_e w_e F_e(x), with F_e what expert e makes of F"""
    return layer.mix(x, layer.route(x), base=layer.base)


def imitate(layer, x: Tensor, *args, **kwargs) -> Tensor:
    """y = F(x), and once the experts have been fitted to it, sum_e w_e E_e(x)"""
    if layer.imitates:
        return replace(layer, x)
    return layer.base(x, *args, **kwargs)


PLACES: dict[str, Callable] = {
    "replace": replace,
    "beside": beside,
    "after": after,
    "before": before,
    "inside": inside,
    "imitate": imitate,
}


def flat(x: Tensor) -> Tensor:
    """Tokens (..., D) -> (T, D)."""
    return x.reshape(-1, x.shape[-1])
