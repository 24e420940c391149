"""A twin whose routers know nothing: the model with other numbers in them, of the same size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparsecraft.evaluation.analysis.watching import routed_layers


@contextmanager
def random_routers(model: nn.Module, seed: int = 0) -> Iterator[int]:
    """Normal numbers in the place of every router's parameters, each of the same root mean square,
    while the block runs; the number of routers that have parameters."""
    generator = torch.Generator().manual_seed(seed)
    held: list[tuple[nn.Parameter, torch.Tensor]] = []
    drawn = 0
    try:
        for layer in routed_layers(model).values():
            parameters = [p for p in layer.router.parameters() if p.is_floating_point()]
            drawn += bool(parameters)
            for parameter in parameters:
                before = parameter.detach().clone()
                held.append((parameter, before))
                size = before.float().square().mean().sqrt()
                noise = torch.randn(before.shape, generator=generator).to(before.device)
                with torch.no_grad():
                    parameter.copy_(noise * size)
        yield drawn
    finally:
        for parameter, before in held:
            with torch.no_grad():
                parameter.copy_(before)
