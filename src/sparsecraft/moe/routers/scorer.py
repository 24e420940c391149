"""Scorer: x_TD -> logits_TE, and all that anything may ask of one.

Shapes: T tokens, D width, E experts, O width of what experts give.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor, nn

from sparsecraft.errors import SparsecraftError


class Scorer(nn.Module, ABC):
    """Scores tokens against experts, in float32 (float64 of float64 tokens).

    Attributes:
        width: D, features of the tokens that it reads.
        extended: number of experts, the last ones, that were appended one at a time.
    """

    width: int
    extended: int = 0

    @abstractmethod
    def forward(self, x_TD: Tensor) -> Tensor:
        """The logits (T, E). Of a router that reads the experts it is called with (x_TD, y_TEO),
        what every expert gives for each token."""

    def weight_rows(self) -> Tensor | None:
        """The matrix (E, D) whose product with a token gives its logits; None where there is none
        such at inference."""
        return None

    def joint_rows(self) -> Tensor | None:
        """The parameter (E, D) whose one product with all tokens is exactly what `forward`
        computes; None where it computes anything else."""
        return None

    def begin(self, what_EX: Tensor) -> None:
        """Start from what data says of each expert; see `RouterSpec.scorer.reads`."""
        raise SparsecraftError(f"A {type(self).__name__} does not start from data; give it none.")

    def append(self, what_X: Tensor) -> None:
        """One more expert, the last. The logits of the others stay the same bits."""
        raise SparsecraftError(f"A {type(self).__name__} takes no further expert.")

    def remove(self, e: int) -> None:
        """Take expert `e` away."""
        raise SparsecraftError(f"A {type(self).__name__} keeps all of its experts.")

    @property
    def embeddings(self) -> Tensor | None:
        """(E, M), the embeddings of domains that its rows are made from; None without."""
        return None

    @property
    def precomputed(self) -> int:
        """Parameters that no token meets, because the rows they give are computed once."""
        return 0

    @property
    def repeated(self) -> int:
        """Multiplications for one token beyond one for each parameter."""
        return 0

    @property
    def products(self) -> int:
        """Multiplications for one token."""
        return (
            _numel(self.named_parameters(), self.named_buffers()) - self.precomputed + self.repeated
        )


class PartScorer(Scorer):
    """Scores tokens against the parts of one split network, R = E less the shared ones."""

    def begin(self, bank: nn.Module, representatives_R: Tensor | None = None) -> None:
        """Start anew from the bank's weights, which have been put in another order; most scorers
        are fitted afterwards and keep theirs.

        Args:
            representatives_R: place of one neuron in each routed expert, where the partition knows.
        """


def _numel(*named: Iterable[tuple[str, Tensor]]) -> int:
    """Numbers in all tensors but biases, which multiply nothing."""
    return sum(t.numel() for tensors in named for name, t in tensors if not name.endswith("bias"))
