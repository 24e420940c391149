"""What a stream of tokens of known domains makes rows of: their means, or a regression on them.

Both keep sums alone, which do not depend on the order of the tokens.

Shapes: T tokens of one domain, D features, E experts, one for each domain.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class OfDomains(ABC):
    """Sums over the tokens of E domains."""

    def __init__(self, num_experts: int):
        self.counts = [0] * num_experts
        self.sums: list[Tensor | float] = [0.0] * num_experts  # (D,) float64 each, of its tokens

    def take(self, x_TD: Tensor, e: int) -> None:
        """Further tokens of domain e; none of them is kept."""
        self.sums[e] = self.sums[e] + x_TD.double().sum(0)
        self.counts[e] += len(x_TD)

    @abstractmethod
    def rows(self) -> Tensor:
        """(E, D) float64. Every domain must have had a token."""


class Means(OfDomains):
    """The mean token of each domain."""

    def rows(self) -> Tensor:
        counted = zip(self.sums, self.counts, strict=True)
        return torch.stack([total / count for total, count in counted])


class Regression(OfDomains):
    """Ridge regression of whose domain a token is of: W = argmin sum_t |W x_t - y_t|^2 + penalty
    |W|^2 with y_t one at its domain and zero elsewhere, so that W = Y^T X (X^T X + penalty)^-1.

    Fanì and Ersoy. Training-Free Dynamic Upcycling of Expert Language Models (DUME).
    arXiv:2603.29765, 2026. Known to us are its abstract and its released code, which does this with
    a bias, divides each row by its length and the logits by a temperature of 0.1, and reads what
    the mixture's routers get when each domain goes to its own expert. Not as there: rows have no
    bias, as linear scorers have none, and keep their lengths, since dividing by those would then
    move the borders between experts; routers read what the dense model gives; no padding counts.

    X^T X and Y^T X are all that is kept. A domain that comes later adds its own, and the rows are
    then those of all tokens at once; until it has tokens its row is zero.

    Args:
        penalty: lambda (released code: 0.01).
    """

    def __init__(self, num_experts: int, penalty: float):
        super().__init__(num_experts)
        self.penalty, self.gram_DD = penalty, 0.0

    def take(self, x_TD: Tensor, e: int) -> None:
        super().take(x_TD, e)
        x_TD = x_TD.double()
        self.gram_DD = self.gram_DD + x_TD.T @ x_TD

    def rows(self) -> Tensor:
        """W (E, D) float64."""
        zero_D = torch.zeros_like(self.gram_DD[0])
        sums_ED = torch.stack([zero_D + total for total in self.sums])
        ridge_DD = self.penalty * torch.eye(len(zero_D)).to(zero_D)
        return torch.linalg.solve(self.gram_DD + ridge_DD, sums_ED.T).T
