"""Routers of split networks: which of its parts a token needs.

Shapes: T tokens, D width, E experts, R = E less the shared ones, m neurons of each, H width inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.errors import RecipeError
from sparsecraft.kernels.selection import score as score_tokens
from sparsecraft.kernels.selection import score_torch
from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.recipe.routers import RouterSpec

NORM_WIDTH = 128  # D2DMoE's; 512 for Gemma-2B


class LinearGate(nn.Module):
    """One row for each expert and, where asked, a bias (LTE, Zheng et al. 2024, section 4.1)."""

    def __init__(self, spec: RouterSpec, bank: SplitExperts):
        super().__init__()
        R, D = bank.num_experts - spec.shared, bank.in_features
        self.weight = _matrix(R, D, bank, None if spec.init == "kaiming_uniform" else spec.init_std)
        if spec.init == "zeros":
            nn.init.zeros_(self.weight)
        self.bias = _bias(R, spec, bank)

    def forward(self, x_TD: Tensor) -> Tensor:
        return _score(self)(x_TD, self.weight, self.bias, "none", False)


class SimilarityScorer(nn.Module):
    """Distance of a token's direction to the mean direction of an expert's rows (MoEfication)."""

    def __init__(self, spec: RouterSpec, bank: SplitExperts):
        super().__init__()
        R, D = bank.num_experts - spec.shared, bank.in_features
        self.shared = spec.shared
        self.register_buffer("centers", bank.down.new_zeros(R, D))
        self.begin(bank)

    @torch.no_grad()
    def begin(self, bank: SplitExperts) -> None:
        if not self.centers.is_meta:
            self.centers.copy_(centers_ED(bank)[self.shared :])

    def forward(self, x_TD: Tensor) -> Tensor:
        centers_RD = _wide(self.centers)
        close_TR = F.normalize(_wide(x_TD), dim=-1) @ centers_RD.t()
        return -(1 + centers_RD.square().sum(-1) - 2 * close_TR).clamp_min(0).sqrt()


class MLPScorer(nn.Module):
    """B tanh(A x / |x|), from the similarity's centers and the identity (MoEfication)."""

    def __init__(self, spec: RouterSpec, bank: SplitExperts):
        super().__init__()
        R, D = bank.num_experts - spec.shared, bank.in_features
        self.shared = spec.shared
        self.first = _matrix(spec.hidden or R, D, bank)
        self.second = _matrix(R, spec.hidden or R, bank)
        self.begin(bank)

    @torch.no_grad()
    def begin(self, bank: SplitExperts) -> None:
        if len(self.first) == len(self.second) and not self.first.is_meta:
            self.first.copy_(centers_ED(bank)[self.shared :])
            self.second.copy_(torch.eye(len(self.second)))

    def forward(self, x_TD: Tensor) -> Tensor:
        score = _score(self)
        return score(score(x_TD, self.first, None, "tanh", True), self.second, None, "none", False)


class NormScorer(nn.Module):
    """|B relu(A x)|, a regression on the norm of what an expert adds (D2DMoE, section 3.2)."""

    def __init__(self, spec: RouterSpec, bank: SplitExperts):
        super().__init__()
        R, D, H = bank.num_experts - spec.shared, bank.in_features, spec.hidden or NORM_WIDTH
        self.first, self.second = _matrix(H, D, bank), _matrix(R, H, bank)
        self.first_bias, self.second_bias = _bias(H, spec, bank), _bias(R, spec, bank)

    def forward(self, x_TD: Tensor) -> Tensor:
        score = _score(self)
        hidden_TH = score(x_TD, self.first, self.first_bias, "relu", False)
        return score(hidden_TH, self.second, self.second_bias, "abs", False)


class AnalyticScorer(nn.Module):
    """The activation of one neuron for each expert, the one nearest to its center (CMoE)."""

    def __init__(self, spec: RouterSpec, bank: SplitExperts):
        super().__init__()
        self.shared, self.normalize = spec.shared, spec.normalize
        self._bank = (bank,)  # in a tuple, so that it is no part of the router
        R, D = bank.num_experts - spec.shared, bank.in_features
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
        self.rows.copy_(F.normalize(rows_RGD, dim=-1) if self.normalize else rows_RGD)
        if self.bias is not None:
            self.bias.copy_(bank.first_bias.unflatten(1, (-1, m))[experts_R, :, at])

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = F.normalize(_wide(x_TD), dim=-1) if self.normalize else _wide(x_TD)
        first_TRG = torch.einsum("td,rgd->trg", x_TD, _wide(self.rows))
        if self.bias is not None:
            first_TRG = first_TRG + _wide(self.bias)
        hidden_TR = self.activation(first_TRG[..., 0])
        return hidden_TR * first_TRG[..., 1] if first_TRG.shape[-1] == 2 else hidden_TR


class OracleScorer(nn.Module):
    """What a router should predict, computed from the whole network: a bound, and no saving."""

    def __init__(self, spec: RouterSpec, bank: SplitExperts):
        super().__init__()
        self.target, self.shared = spec.target, spec.shared
        self._bank = (bank,)  # in a tuple, so that it is no part of the router

    def forward(self, x_TD: Tensor) -> Tensor:
        return targets(self._bank[0], x_TD, self.target)[:, self.shared :]


SCORERS = {
    "linear": LinearGate,
    "similarity": SimilarityScorer,
    "mlp": MLPScorer,
    "norm": NormScorer,
    "analytic": AnalyticScorer,
    "oracle": OracleScorer,
}


@torch.no_grad()
def targets(bank: SplitExperts, x_TD: Tensor, kind: str) -> Tensor:
    """What the experts of a bank matter to each token, float32 (T, E); see `RouterSpec.target`.

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


def _matrix(rows: int, columns: int, bank: SplitExperts, std: float | None = None) -> nn.Parameter:
    matrix = nn.Parameter(
        torch.empty(rows, columns, device=bank.down.device, dtype=bank.down.dtype)
    )
    if std is None:
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))  # the default of nn.Linear
    else:
        nn.init.normal_(matrix, std=std)
    return matrix


def _bias(rows: int, spec: RouterSpec, bank: SplitExperts) -> nn.Parameter | None:
    if spec.bias is None:
        return None
    return nn.Parameter(torch.full_like(bank.down[0, 0, :1], spec.bias).repeat(rows))


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _score(scorer: nn.Module) -> Callable[..., Tensor]:
    """The product that a scorer is made of; while it is fitted, the one that knows vmap."""
    return score_torch if scorer.training else score_tokens
