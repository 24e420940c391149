"""Nexus's scorer: the row of every expert is projected from the embedding of its domain.

Shapes: T tokens, D width, E experts, M width of the embeddings, P = E rounded up to whole blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.errors import SparsecraftError
from sparsecraft.kernels.device import needs_grad
from sparsecraft.kernels.projections import float32_product
from sparsecraft.moe.routers.scorer import Scorer
from sparsecraft.recipe.scorers import Domain

# Rows of one product. Of a product of another shape the last bits of the same row may differ, so
# whole blocks let the logits of all experts stay what they are when one comes or goes.
BLOCK = 16


class DomainScorer(Scorer):
    """logits = x P(d)^T with P(d) = W2 SwiGLU(W1 d) (Nexus, Gritsch et al. 2024, section 3).

    The rows P(d) do not depend on tokens. In evaluation they are kept, so that a token costs what
    it costs a linear router; in training they are computed anew. What is kept counts while the
    tensors are the same and unchanged; only an edit in place through `.data` is not seen, and
    `train()` and `eval()` drop it.

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
        self._kept: tuple[list[tuple[Tensor, int]], Tensor] | None = None
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
        if not self._keeps(tensors):
            return self._project()
        kept = self._kept
        # Old tensors are held: memory of theirs that is freed may hold the next ones.
        if kept is None or any(
            (old.data_ptr(), old.dtype, version) != (t.data_ptr(), t.dtype, t._version)
            for t, (old, version) in zip(tensors, kept[0], strict=True)
        ):
            with torch.inference_mode(False), torch.no_grad():  # kept beyond an inference_mode
                known = [(t.detach(), t._version) for t in tensors]
                self._kept = kept = known, self._project()
        return kept[1]

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

    def _keeps(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether rows may be kept: nothing trains, and a change of the tensors would be seen."""
        if torch.compiler.is_compiling():
            return False
        if self.training:
            self._kept = None
            return False
        capturing = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
        # Tensors made in inference_mode count no versions.
        return not (capturing or needs_grad(*tensors) or any(t.is_inference() for t in tensors))

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
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return vars(self) | {"_kept": None}  # versions of a copy start anew
