"""States of routers that move with every optimizer step, by what was routed in it.

Shapes: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.balancing import Balance, Bias, ByDropRate, BySparsity, Hold, Moving


@dataclass(frozen=True, slots=True)
class Seen:
    """What one router did, summed over whatever was seen of it.

    Attributes:
        wanted_E: slots that each expert was chosen for; of soft routings its weights.
        filled: slots that were filled.
        rows: decisions.
    """

    wanted_E: Tensor
    filled: Tensor
    rows: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, routing: Routing, mask_T: Tensor | None) -> Self:
        """What it did in one pass, of the tokens that the mask counts."""
        counted_T = routing.counted(mask_T)
        filled_TK = routing.indices_TK < routing.num_experts
        if counted_T is not None:
            filled_TK = filled_TK & counted_T[:, None]
        filled = filled_TK.sum().float()
        rows = torch.full_like(filled, len(filled_TK)) if counted_T is None else counted_T.sum()
        return cls(routing.amounts_E(mask_T), filled, rows.float())

    @classmethod
    def read(cls, vector: Tensor) -> Self:
        """What `vector` holds."""
        return cls(vector[:-2], vector[-2], vector[-1])

    @property
    def vector(self) -> Tensor:
        """(E + 2,), to be summed."""
        return torch.cat([self.wanted_E, self.filled[None], self.rows[None]])


class Moves(nn.Module, ABC):
    """A state that is float32 in a model of any type: its steps are small beside it."""

    @abstractmethod
    def move(self, own: Seen, every: Sequence[Seen]) -> None:
        """Move, behind an optimizer step.

        Args:
            own: what the router did in it.
            every: what each of the model's did whose states move.
        """

    def append(self) -> None:
        """One more expert, the last."""

    def remove(self, e: int) -> None:
        """Take expert `e` away."""

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype != torch.float32:
                self._buffers[name] = before[name].to(buffer.device)
        return self


class SelectionBias(Moves):
    """See `sparsecraft.recipe.balancing.Bias`.

    Attributes:
        load: parts of all slots that experts are meant to have; None for equal ones.
        values_E: added to the scores that experts are chosen by.
    """

    def __init__(
        self,
        option: Bias,
        num_experts: int,
        load: Sequence[float] | None,
        free: int,
        *,
        device=None,
    ):
        super().__init__()
        self.rate, self.load = option.rate, load
        zeros_E = torch.zeros(num_experts, dtype=torch.float32, device=device)
        self.register_buffer("values_E", zeros_E)

    def forward(self, scores_TE: Tensor) -> Tensor:
        """What experts are chosen by."""
        return scores_TE + self.values_E

    @torch.no_grad()
    def move(self, own: Seen, every: Sequence[Seen]) -> None:
        wanted_E, fair_E = own.wanted_E, own.wanted_E.mean()
        if self.load is not None:
            fair_E = wanted_E.sum() * wanted_E.new_tensor(self.load)
        missing_E = fair_E - wanted_E
        self.values_E += self.rate * missing_E.sign().to(self.values_E.device)

    def append(self) -> None:
        self.values_E = torch.cat([self.values_E, self.values_E.new_zeros(1)])

    def remove(self, e: int) -> None:
        self.values_E = torch.cat([self.values_E[:e], self.values_E[e + 1 :]])


class HoldBack(Moves):
    """See `sparsecraft.recipe.balancing.Hold`.

    Attributes:
        value: (), added to the scores of the last `free` experts.
    """

    def __init__(
        self,
        option: Hold,
        num_experts: int,
        load: Sequence[float] | None,
        free: int,
        *,
        device=None,
    ):
        super().__init__()
        self.steps, self.free = option.steps, free
        self.register_buffer("value", torch.tensor(-1.0, dtype=torch.float32, device=device))

    def forward(self, scores_TE: Tensor) -> Tensor:
        E = scores_TE.shape[-1]
        held_E = torch.arange(E, device=scores_TE.device) >= E - self.free
        return scores_TE + held_E * self.value

    @torch.no_grad()
    def move(self, own: Seen, every: Sequence[Seen]) -> None:
        self.value.add_(1 / self.steps).clamp_(max=0)


class LossScale(Moves):
    """What the balance losses of a layer are multiplied by.

    Attributes:
        value: (), from 0.
    """

    def __init__(self, start: float, *, device=None):
        super().__init__()
        self.register_buffer("value", torch.tensor(start, dtype=torch.float32, device=device))

    def forward(self) -> Tensor:
        return self.value


class DropRateScale(LossScale):
    """See `sparsecraft.recipe.balancing.ByDropRate`; one at the start, as if slots were dropped."""

    def __init__(self, option: ByDropRate, k: int, num_experts: int, *, device=None):
        super().__init__(1.0, device=device)
        self.full_at, self.beta = option.full_at, option.beta

    @torch.no_grad()
    def move(self, own: Seen, every: Sequence[Seen]) -> None:
        dropped = 1 - own.filled / own.wanted_E.sum().clamp_min(1)
        wanted = (dropped / self.full_at).clamp(0, 1).to(self.value.device)
        self.value.mul_(self.beta).add_((1 - self.beta) * wanted)


class SparsityScale(LossScale):
    """See `sparsecraft.recipe.balancing.BySparsity`."""

    def __init__(self, option: BySparsity, k: int, num_experts: int, *, device=None):
        super().__init__(option.start, device=device)
        self.factor, self.wanted = option.factor, 1 - k / num_experts

    @torch.no_grad()
    def move(self, own: Seen, every: Sequence[Seen]) -> None:
        zeros = [1 - seen.filled / (seen.rows.clamp_min(1) * len(seen.wanted_E)) for seen in every]
        mean = torch.stack([share.to(self.value.device) for share in zeros]).mean()
        self.value.mul_(self.factor ** (self.wanted - mean).sign())


# Called with (its options, number of experts, their target load, how many are free, device=).
BALANCES: dict[type[Balance], Callable[..., Moves]] = {Bias: SelectionBias, Hold: HoldBack}
SCALES: dict[type[Moving], Callable[..., LossScale]] = {
    ByDropRate: DropRateScale,
    BySparsity: SparsityScale,
}


def moving_tensors(model: nn.Module) -> set[str]:
    """Names of the tensors of every such state in a model."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Moves)
        for name in module._buffers
    }
