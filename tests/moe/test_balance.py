"""A balance loss of many layers at once is each layer's own, with its gradient."""

from __future__ import annotations

import pytest
import torch

from sparsecraft.moe.balance import TOGETHER, of_layers
from sparsecraft.moe.losses import LOSSES, auxiliary_loss, switch_balance
from sparsecraft.moe.routing import Routing


def routing(seed: int, tokens: int = 9, experts: int = 4, k: int = 2, **changes) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, experts, generator=generator).requires_grad_()
    top = logits_TE.topk(k)
    indices_TK = top.indices.clone()
    indices_TK[::4, 1:] = experts  # no expert
    return Routing(top.values.softmax(-1), indices_TK, logits_TE, **changes)


def soft(seed: int) -> Routing:
    logits_TE = routing(seed).logits_TE
    indices_TE = torch.arange(4).expand(9, 4)
    return Routing(logits_TE.softmax(-1), indices_TE, logits_TE, in_order=True, soft=True)


def layers() -> tuple[list[Routing], list[torch.Tensor | None]]:
    """Layers of several shapes, soft ones, some with masks, some that act on a part of tokens."""
    real = torch.rand(9, generator=torch.Generator().manual_seed(3)) < 0.6
    none = torch.zeros(9, dtype=torch.bool)
    found = [routing(0), routing(1), routing(2, experts=6), soft(3), soft(4), routing(5, k=1)]
    found += [routing(6, acts_T=real), routing(7), routing(8), routing(9, wanted_TK=None)]
    masks = [None, None, None, None, real, None, None, real, none, ~real]
    free = {"target_load": (0.3, 0.3, 0.3, 0.1), "free": 1}
    found += [routing(11, **free), routing(12, **free, of_free=torch.tensor(0.5))]
    found += [routing(13, **free, of_free=torch.tensor(1.0))]
    masks += [None, real, real]
    heads = routing(10, tokens=18, heads=2)
    return [*found, heads], [*masks, real]


@pytest.mark.parametrize("name", TOGETHER)
def test_it_is_each_layers_own(name):
    routings, masks = layers()
    together = of_layers(name, routings, masks)
    alone = [LOSSES[name](r, m) for r, m in zip(routings, masks, strict=True)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)
    logits = [r.logits_TE for r in routings]
    weights = torch.rand(len(routings))
    gradients = (torch.autograd.grad(torch.stack(v) @ weights, logits) for v in (together, alone))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_sum_over_layers_is_as_before():
    routings, masks = layers()
    traced = {str(n): r for n, r in enumerate(routings)}
    total, parts = auxiliary_loss(traced, {"switch": 0.1}, lambda name: masks[int(name)])
    values = [switch_balance(r, m) for r, m in zip(routings, masks, strict=True)]
    torch.testing.assert_close(parts["switch"], torch.stack(values).mean())
    torch.testing.assert_close(total, 0.1 * torch.stack(values).mean())
