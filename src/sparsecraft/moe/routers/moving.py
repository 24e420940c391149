"""States of routers that move with every optimizer step, by what was routed in it.

Shapes: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from sparsecraft.moe.routing import BALANCE_LOSSES, Routing, of_last
from sparsecraft.recipe.balancing import Balance, Bias, ByDropRate, BySparsity, Hold, Moving
from sparsecraft.recipe.experts import ExpertsSpec


@dataclass(frozen=True, slots=True)
class Seen:
    """What one router did, summed over whatever was seen of it.

    Attributes:
        wanted_E: slots that each expert was chosen for; of soft routings its weights.
        filled: slots that were filled.
        rows: decisions.
        k: experts that a decision is meant to take, where slots do not say it.
    """

    wanted_E: Tensor
    filled: Tensor
    rows: Tensor
    k: int | None = None

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
        return cls(routing.amounts_E(mask_T), filled, rows.float(), routing.k)

    @classmethod
    def read(cls, vector: Tensor, k: int | None = None) -> Self:
        """What `vector` holds."""
        return cls(vector[:-2], vector[-2], vector[-1], k)

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

    def unfinished(self) -> str | None:
        """What is to be said if a training ends with the state as it is; None for nothing."""
        return None

    def of_free(self) -> Tensor | None:
        """(), how far zero-computation experts are in use, from 0 to 1; None where they are."""
        return None

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
        self, option: Bias, num_experts: int, experts: ExpertsSpec | None = None, *, device=None
    ):
        super().__init__()
        self.rate, self.load = option.rate, None if experts is None else experts.load
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
        free: how many of the experts, the last ones, compute nothing.
        value: (), which their scores are multiplied by.
    """

    def __init__(
        self, option: Hold, num_experts: int, experts: ExpertsSpec | None = None, *, device=None
    ):
        super().__init__()
        self.steps, self.free = option.steps, 0 if experts is None else experts.free
        self.register_buffer("value", torch.tensor(0.0, dtype=torch.float32, device=device))

    def forward(self, scores_TE: Tensor) -> Tensor:
        """What experts are chosen by."""
        return scores_TE * of_last(self.free, self.value, scores_TE.shape[-1])

    @torch.no_grad()
    def move(self, own: Seen, every: Sequence[Seen]) -> None:
        self.value.add_(1 / self.steps).clamp_(max=1)

    def of_free(self) -> Tensor:
        return self.value

    def unfinished(self) -> str | None:
        left = round((1 - self.value.item()) * self.steps)
        if not left:
            return None
        return (
            f"Zero-computation experts are held back still, for {left} of {self.steps} steps: the "
            "model hardly uses them. Train on, or convert with fewer hold_steps (--hold-steps)."
        )


class LossScale(Moves):
    """What losses of a layer are multiplied by.

    Attributes:
        losses: names of these.
        value: (), from 0.
    """

    losses: ClassVar[tuple[str, ...]] = BALANCE_LOSSES

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
    """See `sparsecraft.recipe.balancing.BySparsity`; all layers that route so move alike.

    It stays between numbers that mean no loss and nothing but loss, so that it comes back from
    either.
    """

    losses = ("remoe",)
    LEAST, MOST = 1e-12, 1e3

    def __init__(self, option: BySparsity, k: int, num_experts: int, *, device=None):
        super().__init__(option.start, device=device)
        self.factor = option.factor

    @torch.no_grad()
    def move(self, own: Seen, every: Sequence[Seen]) -> None:
        missing = [_missing_zeros(seen).to(self.value.device) for seen in every if seen.k]
        self.value.mul_(self.factor ** torch.stack(missing).mean().sign())
        self.value.clamp_(self.LEAST, self.MOST)


def _missing_zeros(seen: Seen) -> Tensor:
    """The share of zero weights that there should be, less that which there is."""
    E = len(seen.wanted_E)
    zeros = 1 - seen.filled / (seen.rows.clamp_min(1) * E)
    return (1 - seen.k / E) - zeros


# Called with (its options, number of experts, what they are, device=).
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
