"""How far two pieces of code are apart on the same random tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsecraft.dense.twins import HERE

# Largest relative error of what is the same, in float32.
TOLERANCE = 1e-5
# Tokens that are small, usual, large, and beyond any clamp.
SCALES = (2.0**-6, 1.0, 2.0**6, 2.0**20)

Run = Callable[[bool, Tensor], Tensor]
"""What a module gives, by whether it trains and the tokens that it reads."""


def random_tokens(width: int) -> list[Tensor]:
    """(2, 3, width) in each of `SCALES`."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, width)
    return [torch.randn(shape, generator=generator, **HERE) * scale for scale in SCALES]


def difference(dense: Run, ours: Run, tokens: list[Tensor], training: bool) -> float:
    """The largest relative error, with the same dropout masks on both sides."""
    worst = 0.0
    with torch.no_grad(), _own_random_state(), torch.autocast("cpu", enabled=False):
        for x in tokens:
            outputs = []
            for run in (dense, ours):
                torch.default_generator.manual_seed(0)
                outputs.append(run(training, x.clone()).double())
            wanted, found = outputs
            if wanted.shape != found.shape or not (wanted.isfinite() & found.isfinite()).all():
                return float("inf")
            if not torch.equal(wanted, found):
                scale = max(wanted.norm(), found.norm())
                worst = max(worst, ((found - wanted).norm() / scale).item())
    return worst


@contextmanager
def _own_random_state() -> Iterator[None]:
    """The CPU's random state is afterwards what it was; torch.manual_seed would seed GPUs too."""
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
