"""What a layer computes, by its place beside the dense module F.

    replace         x ──┬─ E_1 ─ w_1 ─┐            imitate: as F until the experts have been
                        ├─ E_2 ─ w_2 ─┼─ + ── y    fitted to it, as replace from then on
                        └─ E_3 ─ w_3 ─┘

    beside    x ──┬──── F ────┬─ + ── y            before    x ── E, w ── F ── y
                  └── E, w ───┘                    after     x ── F ── E, w ── y

    inside    F_e is F with what expert e adds to its Linears: x ── F_e, w ── y

w are the weights of the routing, (T, E), zero where a token does not go to an expert; sums are over
the experts. Each function takes the layer, its input x (..., I), and what else F is called with,
and is the specification of the ways in `sparsecraft.moe.fusions`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from sparsecraft.moe.layer import MoELayer


def replace(layer: MoELayer, x: Tensor, *args, **kwargs) -> Tensor | tuple:
    """y = sum_e w_e E_e(x)"""
    return layer.mix(x, layer.route(x), *args, **kwargs)


def beside(layer: MoELayer, x: Tensor, *args, **kwargs) -> Tensor:
    """y = g F(x) + sum_e w_e E_e(x), with g = 1 unless the router gates the base"""
    y = layer.run_base(x, *args, **kwargs)

    def add(part: Tensor) -> Tensor:
        mixed = layer.mix_slots(x) if layer.mixes_slots else layer.mix(x, layer.route(x, part))
        return part + mixed.reshape(part.shape)

    return layer.on_rows(y, add)


def after(layer: MoELayer, x: Tensor, *args, **kwargs) -> Tensor:
    """y = sum_e w_e E_e(F(x))"""
    y = layer.base(x, *args, **kwargs)
    return layer.on_rows(y, lambda part: layer.mix(part, layer.route(x, part)))


def before(layer: MoELayer, x: Tensor, *args, **kwargs) -> Tensor:
    """y = F(sum_e w_e E_e(x))"""
    return layer.base(layer.mix(x, layer.route(x)), *args, **kwargs)


def inside(layer: MoELayer, x: Tensor, *args, **kwargs) -> Tensor:
    """y = sum_e w_e F_e(x), with F_e what expert e makes of F"""
    return layer.mix(x, layer.route(x), base=layer.base)


def imitate(layer: MoELayer, x: Tensor, *args, **kwargs) -> Tensor:
    """y = F(x), and once the experts have been fitted to it, sum_e w_e E_e(x)"""
    return replace(layer, x) if layer.imitates else layer.base(x, *args, **kwargs)


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
