"""Routers of split networks: which of its parts a token needs.

Shapes: T tokens, D width, E experts, R = E less the shared ones, m neurons of each, H width inside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.errors import RecipeError
from sparsecraft.kernels.selection import score, score_torch
from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.moe.routers.scorer import PartScorer
from sparsecraft.moe.routers.starts import draw
from sparsecraft.recipe.routers import GateSpec
from sparsecraft.recipe.scorers import (
    MLP,
    Analytic,
    KaimingUniform,
    LinearParts,
    Norm,
    Oracle,
    PartScorerSpec,
    Similarity,
    Start,
)


class LinearGate(PartScorer):
    """One row for each expert and, where asked, a bias (LTE, Zheng et al. 2024, section 4.1)."""

    def __init__(self, spec: LinearParts, bank: SplitExperts, router: GateSpec):
        super().__init__()
        R, D = bank.num_experts - router.shared, bank.in_features
        self.width = D
        self.weight = _matrix(R, D, bank, spec.start)
        self.bias = _bias(R, spec.bias, bank)

    def forward(self, x_TD: Tensor) -> Tensor:
        return _score(self)(x_TD, self.weight, self.bias, "none", False)


class SimilarityScorer(PartScorer):
    """Distance of a token's direction to the mean direction of an expert's rows (MoEfication)."""

    def __init__(self, spec: Similarity, bank: SplitExperts, router: GateSpec):
        super().__init__()
        R, D = bank.num_experts - router.shared, bank.in_features
        self.width, self.shared = D, router.shared
        self.register_buffer("centers", bank.down.new_zeros(R, D))
        self.begin(bank)

    @torch.no_grad()
    def begin(self, bank: SplitExperts, representatives_R: Tensor | None = None) -> None:
        if not self.centers.is_meta:
            self.centers.data = centers_ED(bank)[self.shared :].to(self.centers, copy=True)

    def forward(self, x_TD: Tensor) -> Tensor:
        centers_RD = _wide(self.centers)
        close_TR = F.normalize(_wide(x_TD), dim=-1) @ centers_RD.t()
        return -(1 + centers_RD.square().sum(-1) - 2 * close_TR).clamp_min(0).sqrt()


class MLPScorer(PartScorer):
    """B tanh(A x / |x|), from the similarity's centers and the identity (MoEfication)."""

    def __init__(self, spec: MLP, bank: SplitExperts, router: GateSpec):
        super().__init__()
        R, D = bank.num_experts - router.shared, bank.in_features
        self.width, self.shared = D, router.shared
        self.first = _matrix(spec.hidden or R, D, bank)
        self.second = _matrix(R, spec.hidden or R, bank)
        self.begin(bank)

    @torch.no_grad()
    def begin(self, bank: SplitExperts, representatives_R: Tensor | None = None) -> None:
        if len(self.first) == len(self.second) and not self.first.is_meta:
            self.first.data = centers_ED(bank)[self.shared :].to(self.first, copy=True)
            self.second.data = torch.eye(len(self.second)).to(self.second)

    def forward(self, x_TD: Tensor) -> Tensor:
        run = _score(self)
        return run(run(x_TD, self.first, None, "tanh", True), self.second, None, "none", False)


class NormScorer(PartScorer):
    """|B relu(A x)|, a regression on the norm of what an expert adds (D2DMoE, section 3.2)."""

    def __init__(self, spec: Norm, bank: SplitExperts, router: GateSpec):
        super().__init__()
        R, D, H = bank.num_experts - router.shared, bank.in_features, spec.hidden
        self.width = D
        self.first, self.second = _matrix(H, D, bank), _matrix(R, H, bank)
        self.first_bias, self.second_bias = _bias(H, spec.bias, bank), _bias(R, spec.bias, bank)

    def forward(self, x_TD: Tensor) -> Tensor:
        run = _score(self)
        hidden_TH = run(x_TD, self.first, self.first_bias, "relu", False)
        return run(hidden_TH, self.second, self.second_bias, "abs", False)


class AnalyticScorer(PartScorer):
    """The activation of one neuron for each expert, the one nearest to its center (CMoE)."""

    def __init__(self, spec: Analytic, bank: SplitExperts, router: GateSpec):
        super().__init__()
        self.shared, self.normalize = router.shared, spec.normalize
        self._bank = (bank,)  # in a tuple, so that it is no part of the router
        R, D = bank.num_experts - router.shared, bank.in_features
        self.width = D
        rows = bank.down.new_zeros(R, bank.parts, D)
        self.rows = nn.Parameter(rows)
        self.bias = None if bank.first_bias is None else nn.Parameter(rows.new_zeros(R, bank.parts))
        self.begin(bank)

    @property
    def activation(self) -> nn.Module:
        """The network's, whatever is put into it."""
        return self._bank[0].activation

    @torch.no_grad()
    def begin(self, bank: SplitExperts, representatives_R: Tensor | None = None) -> None:
        """Take the representatives' rows.

        Args:
            representatives_R: place of one neuron in each routed expert; None takes those whose
                first rows are nearest to their center.
        """
        if self.rows.is_meta:
            return
        m = bank.neurons_per_expert
        rows_EGmD = bank.first.unflatten(1, (-1, m))
        if representatives_R is None:
            near_EmD = F.normalize(rows_EGmD[:, 0].float(), dim=-1)
            center_E1D = near_EmD.mean(1, keepdim=True)
            representatives_R = (near_EmD - center_E1D).norm(dim=-1).argmin(1)[self.shared :]
        experts_R = torch.arange(self.shared, bank.num_experts, device=rows_EGmD.device)
        at = representatives_R.to(rows_EGmD.device)
        rows_RGD = rows_EGmD[experts_R, :, at]
        rows_RGD = F.normalize(rows_RGD, dim=-1) if self.normalize else rows_RGD
        self.rows.data = rows_RGD.to(self.rows)
        if self.bias is not None:
            bias_RG = bank.first_bias.unflatten(1, (-1, m))[experts_R, :, at]
            self.bias.data = bias_RG.to(self.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = F.normalize(_wide(x_TD), dim=-1) if self.normalize else _wide(x_TD)
        first_TRG = torch.einsum("td,rgd->trg", x_TD, _wide(self.rows))
        if self.bias is not None:
            first_TRG = first_TRG + _wide(self.bias)
        hidden_TR = self.activation(first_TRG[..., 0])
        return hidden_TR * first_TRG[..., 1] if first_TRG.shape[-1] == 2 else hidden_TR


class OracleScorer(PartScorer):
    """What a router should predict, computed from the whole network: a bound, and no saving."""

    def __init__(self, spec: Oracle, bank: SplitExperts, router: GateSpec):
        super().__init__()
        self.width = bank.in_features
        self.target, self.shared = router.target, router.shared
        self._bank = (bank,)  # in a tuple, so that it is no part of the router

    def forward(self, x_TD: Tensor) -> Tensor:
        return targets(self._bank[0], x_TD, self.target)[:, self.shared :]


PART_SCORERS: dict[type[PartScorerSpec], type[PartScorer]] = {
    LinearParts: LinearGate,
    Similarity: SimilarityScorer,
    MLP: MLPScorer,
    Norm: NormScorer,
    Analytic: AnalyticScorer,
    Oracle: OracleScorer,
}


@torch.no_grad()
def targets(bank: SplitExperts, x_TD: Tensor, kind: str) -> Tensor:
    """What the experts of a bank matter to each token, float32 (T, E); see `GateSpec.target`.

    Where a bank compensates, an expert matters by how far it is from its mean, whatever the kind.
    """
    _, hidden_TEm = bank.hidden(x_TD)
    if kind in ("deviation", "squared_deviation") and bank.mean is None:
        raise RecipeError(
            f"router.target is {kind!r}, the distance to the mean activation, and the experts keep "
            "none; set experts.compensate=true."
        )
    if bank.mean is not None:
        hidden_TEm = hidden_TEm - bank.mean.to(hidden_TEm.dtype)
    hidden_TEm = hidden_TEm.float()
    match kind:
        case "mass" | "deviation":
            return hidden_TEm.abs().sum(-1)
        case "squared_deviation":
            return hidden_TEm.square().sum(-1)
        case "intermediate_norm":
            return hidden_TEm.norm(dim=-1)
    # |D a| by the Gram matrix of an expert's rows: no tensor (T, E, D).
    down_EmD = bank.down.float()
    gram_Emm = down_EmD @ down_EmD.transpose(1, 2)
    hidden_ETm = hidden_TEm.transpose(0, 1)
    squares_ET = ((hidden_ETm @ gram_Emm) * hidden_ETm).sum(-1)
    return squares_ET.clamp_min(0).sqrt().t()


def centers_ED(bank: SplitExperts) -> Tensor:
    """Mean direction of each expert's first rows (the gate's where there is one), (E, D)."""
    rows_EmD = bank.first[:, : bank.neurons_per_expert].float()
    return F.normalize(rows_EmD, dim=-1).mean(1)


KAIMING = KaimingUniform()


def _matrix(rows: int, columns: int, bank: SplitExperts, start: Start = KAIMING) -> nn.Parameter:
    down = bank.down
    matrix = torch.empty(rows, columns, device=down.device, dtype=down.dtype)
    return nn.Parameter(draw(start, matrix))


def _bias(rows: int, value: float | None, bank: SplitExperts) -> nn.Parameter | None:
    if value is None:
        return None
    return nn.Parameter(torch.full_like(bank.down[0, 0, :1], value).repeat(rows))


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _score(scorer: nn.Module) -> Callable[..., Tensor]:
    """The product that a scorer is made of; while it is fitted, the one that knows vmap."""
    return score_torch if scorer.training else score
