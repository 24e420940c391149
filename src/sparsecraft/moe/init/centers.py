"""Centers of a stream of tokens: k-means that sees every token once (MacQueen 1967).

Shapes: T tokens, D features, E centers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecraft.errors import DataError

# Steps of Lloyd's algorithm on the first tokens, from which the stream goes on.
STEPS = 10


class Centers:
    """Each center is the mean of the tokens that were nearest to it when they came.

    It starts from the first tokens: k-means++ and some steps of Lloyd's algorithm. Only the
    centers are kept, and until there are E tokens those.
    """

    def __init__(self, count: int, seed: int = 0):
        self.count = count
        self._generator = torch.Generator().manual_seed(seed)
        self._first: list[Tensor] = []
        self._centers_ED: Tensor | None = None
        self._sizes_E: Tensor | None = None

    def take(self, x_TD: Tensor) -> None:
        """The next tokens of the stream."""
        x_TD = x_TD.double()
        if self._centers_ED is None:
            self._first.append(x_TD)
            x_TD = torch.cat(self._first)
            if len(x_TD) < self.count:
                return
            self._first.clear()
            self._begin(x_TD)
        self._move(x_TD)

    def centers(self) -> Tensor:
        """(E, D) float64.

        Raises:
            DataError: fewer tokens than centers.
        """
        if self._centers_ED is None:
            found = sum(map(len, self._first))
            raise DataError(f"{found} tokens have no {self.count} centers; give more data.")
        return self._centers_ED

    def _begin(self, x_TD: Tensor) -> None:
        chosen = [int(torch.randint(len(x_TD), (1,), generator=self._generator))]
        for _ in range(self.count - 1):
            near_T = torch.cdist(x_TD, x_TD[chosen]).amin(1).square().cpu()
            if not near_T.any():
                raise DataError(
                    f"The first {len(x_TD)} tokens are too few different ones for {self.count} "
                    "centers; give other data."
                )
            chosen.append(int(torch.multinomial(near_T, 1, generator=self._generator)))
        self._centers_ED = x_TD[chosen]
        for _ in range(STEPS):
            self._sizes_E = x_TD.new_zeros(self.count)
            self._move(x_TD)
        self._sizes_E = x_TD.new_zeros(self.count)

    def _move(self, x_TD: Tensor) -> None:
        nearest_T = torch.cdist(x_TD, self._centers_ED).argmin(1)
        counts_E = torch.bincount(nearest_T, minlength=self.count).to(x_TD)
        sums_ED = torch.zeros_like(self._centers_ED).index_add_(0, nearest_T, x_TD)
        self._sizes_E += counts_E
        moved_ED = sums_ED - counts_E[:, None] * self._centers_ED
        self._centers_ED = self._centers_ED + moved_ED / self._sizes_E.clamp_min(1)[:, None]
