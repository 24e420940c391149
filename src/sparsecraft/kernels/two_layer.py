"""The form that the fast paths of whole experts understand.

Shapes: E experts, I input features, O output features, M first-layer features, H hidden features
after the activation (M = 2H when gated).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TwoLayer:
    """scale * second(activate(first(x))), for a residual bank plus x.

    Attributes:
        activation: the elementwise function that `activate` is, times the second half of the hidden
            values where they are gated; None where it is another.
        by_expert: `activate` takes an expert's number too, and the tokens of that one alone.
    """

    first_EMI: Tensor
    second_EOH: Tensor
    activate: Callable[..., Tensor]
    first_bias_EM: Tensor | None = None
    second_bias_EO: Tensor | None = None
    scale: float = 1.0
    input_dropout: float = 0.0
    output_dropout: float = 0.0
    residual: bool = False
    by_expert: bool = False
    activation: nn.Module | None = None

    @property
    def E(self) -> int:
        return self.first_EMI.shape[0]

    @property
    def O(self) -> int:  # noqa: E743
        return self.second_EOH.shape[1]

    def activated(self, hidden_E: Iterable[Tensor]) -> list[Tensor]:
        """Each expert's own activation on its tokens, (n_e, M) -> (n_e, H)."""
        return [self.activate(hidden_nM, e) for e, hidden_nM in enumerate(hidden_E)]
