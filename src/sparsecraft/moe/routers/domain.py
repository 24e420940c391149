"""Nexus's scorer: the row of every expert is projected from the embedding of its domain.

Shapes: T tokens, D width, E experts, M width of the embeddings, P = E rounded up to whole blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.errors import SparsecraftError
from sparsecraft.kernels.projections import float32_product
from sparsecraft.moe.kept import Kept, captures
from sparsecraft.moe.routers.scorer import Scorer
from sparsecraft.recipe.scorers import Domain

# Rows of one product. Of a product of another shape the last bits of the same row may differ, so
# whole blocks let the logits of all experts stay what they are when one comes or goes.
BLOCK = 16


class DomainScorer(Scorer):
    """logits = x P(d)^T with P(d) = W2 SwiGLU(W1 d) (Nexus, Gritsch et al. 2024, section 3).

    The rows P(d) do not depend on tokens. In evaluation they are kept, so that a token costs what
    it costs a linear router; in training they are computed anew. `train()` and `eval()` drop them.

    Attributes:
        domains: (E, M) float32, one embedding for each expert; random and orthogonal until `begin`.
        first: W1, (2 D, M), the rows that pass SiLU first.
        second: W2, (D, D).
    """

    def __init__(self, spec: Domain, width: int, num_experts: int, *, device=None, dtype=None):
        super().__init__()
        self.width, self.std = width, spec.std
        M = width if spec.encoder == "self" else spec.dim
        where = {"device": device, "dtype": dtype}
        self.first = nn.Parameter(torch.empty(2 * width, M, **where))
        self.second = nn.Parameter(torch.empty(width, width, **where))
        nn.init.normal_(self.first, std=M**-0.5)
        nn.init.normal_(self.second, std=width**-0.5)
        domains_EM = torch.empty(num_experts, M, device=device, dtype=torch.float32)
        nn.init.orthogonal_(domains_EM)
        self.register_buffer("domains", domains_EM)
        self._kept = Kept()
        self.begin(F.normalize(domains_EM, dim=-1))

    @torch.no_grad()
    def begin(self, domains_EM: Tensor) -> None:
        """Take the embeddings, and scale W2 so that the rows' numbers have the standard deviation
        `std` around zero: x meets them as it meets a linear router of that start."""
        if self.domains.is_meta:
            return
        if domains_EM.shape != self.domains.shape:
            raise SparsecraftError(
                f"The embeddings are {tuple(domains_EM.shape)} and the router takes "
                f"{tuple(self.domains.shape)}: one for each expert, of the recipe's width."
            )
        self.domains.copy_(domains_EM)
        rows_ED = self._project()[: len(self.domains)]
        self.second.mul_(self.std / rows_ED.square().mean().sqrt())

    def forward(self, x_TD: Tensor) -> Tensor:
        parts = [float32_product(x_TD, block_BD) for block_BD in self.rows().split(BLOCK)]
        return torch.cat(parts, dim=-1)[:, : len(self.domains)].contiguous()

    def rows(self) -> Tensor:
        """P(d) of every expert and zeros up to a whole block, (P, D), float32 at least."""
        tensors = (self.domains, self.first, self.second)
        if captures(self.first):  # a graph follows the tensors
            return self._project()
        return self._kept.value(tensors, self._project, training=self.training)

    @property
    def embeddings(self) -> Tensor:
        return self.domains

    @property
    def precomputed(self) -> int:
        """P gives the rows once for all tokens, which meet those rows alone."""
        return self.first.numel() + self.second.numel() - len(self.domains) * self.width

    @property
    def products(self) -> int:
        return len(self.domains) * self.width

    def weight_rows(self) -> Tensor:
        return self.rows()[: len(self.domains)]

    def _project(self) -> Tensor:
        dtype = torch.promote_types(self.first.dtype, torch.float32)
        with torch.autocast(self.first.device.type, enabled=False):
            first, second = self.first.to(dtype), self.second.to(dtype)
            domains_PM = F.pad(self.domains.to(dtype), (0, 0, 0, -len(self.domains) % BLOCK))
            parts = []
            for domains_BM in domains_PM.split(BLOCK):
                gate_BD, up_BD = F.linear(domains_BM, first).chunk(2, dim=-1)
                parts.append(F.linear(F.silu(gate_BD) * up_BD, second))
        return torch.cat(parts)

    @torch.no_grad()
    def append(self, embedding_M: Tensor) -> None:
        """One more expert, the last, with the row P(d) of its domain. The logits of the others stay
        the same bits.

        Raises:
            SparsecraftError: an embedding of another width.
        """
        M = self.domains.shape[1]
        if embedding_M.shape != (M,):
            raise SparsecraftError(
                f"The embedding is {tuple(embedding_M.shape)} and the router reads ({M},); embed "
                "the domain as the others were."
            )
        self.domains = torch.cat([self.domains, embedding_M[None].to(self.domains)])

    @torch.no_grad()
    def remove(self, e: int) -> None:
        """Take expert `e` away. The logits of the others stay the same bits.

        Raises:
            SparsecraftError: there is no such expert, or no other.
        """
        E = len(self.domains)
        if not 0 <= e < E or E == 1:
            raise SparsecraftError(
                f"Expert {e} of {E} cannot be removed; name one from 0 to {E - 1}, and leave one."
            )
        self.domains = torch.cat([self.domains[:e], self.domains[e + 1 :]])

    def train(self, mode: bool = True) -> DomainScorer:
        self._kept.drop()
        return super().train(mode)
