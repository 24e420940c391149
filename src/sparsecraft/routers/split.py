"""Routers of split networks: which of its parts a token needs.

Shapes: T tokens, D width, E experts, R = E less the shared ones, m neurons of each, H width inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.batch import Batch
from sparsecraft.errors import RecipeError
from sparsecraft.experts.split import SplitExperts
from sparsecraft.kernels import selection
from sparsecraft.kernels.selection import Active
from sparsecraft.recipe import RouterSpec
from sparsecraft.routing import Routing

Runs = Literal["sparse", "every", "soft"]

NORM_WIDTH = 128  # D2DMoE's; 512 for Gemma-2B


class Gate(nn.Module):
    """A scorer of the parts of a split network, a rule, and a weighting; see `RouterSpec`.

    Attributes:
        runs: `sparse`, by the rule; `every`, all experts with weight one, where the layer does not
            ask the router at all; `soft`, all experts, each weighted by its score.
        k: experts that are selected, for top-k.
        share: mean share of experts that run, where it is known; for counting costs.
        gain: of `weighting="gain"`, (R,).
    """

    def __init__(self, spec: RouterSpec, bank: SplitExperts):
        super().__init__()
        self.spec = spec
        self.num_experts = bank.num_experts
        self.runs: Runs = "sparse"
        self.k = spec.top_k
        self.share = None if self.k is None else (spec.shared + self.k) / bank.num_experts
        # Not a buffer: a model that is cast to bf16 must keep it.
        self._threshold = torch.tensor(-1.0 if spec.threshold is None else spec.threshold)
        self.scorer = SCORERS[spec.scorer](spec, bank)
        gain = torch.zeros(bank.num_experts - spec.shared, device=bank.down.device)
        self.gain = nn.Parameter(gain) if spec.weighting == "gain" else None

    @property
    def threshold(self) -> float:
        return self._threshold.item()

    @threshold.setter
    def threshold(self, value: float) -> None:
        if self._threshold.is_inference():
            self._threshold = torch.tensor(value, device=self._threshold.device)
        self._threshold.fill_(value)  # in place: a captured CUDA graph reads it

    def forward(self, x: Tensor, batch: Batch | None = None) -> Routing:
        """Route tokens x (..., D). The routing has every expert in its place, with weight zero and
        "no expert" where it does not run."""
        with torch.autocast(x.device.type, enabled=False):
            logits_TR = self.scorer(x.reshape(-1, x.shape[-1]))
            weights_TR, kept_TR, _ = self._weigh(logits_TR)
        shared = (self.spec.shared, 0)
        logits_TE, kept_TE = F.pad(logits_TR, shared), F.pad(kept_TR, shared, value=1.0)
        weights_TE = F.pad(weights_TR, shared, value=1.0)
        experts_E = torch.arange(self.num_experts, device=x.device)
        indices_TE = torch.where(kept_TE > 0, experts_E, self.num_experts)
        return Routing(weights_TE, indices_TE, logits_TE, in_order=True)

    def weigh(self, x_TD: Tensor) -> tuple[Tensor, Active | None]:
        """The weights of `forward` alone, (T, E), and where a kernel has listed them the experts
        that any token uses."""
        with torch.autocast(x_TD.device.type, enabled=False):
            weights_TR, _, used = self._weigh(self.scorer(x_TD))
        if not self.spec.shared:
            return weights_TR, used
        return F.pad(weights_TR, (self.spec.shared, 0), value=1.0), None

    def _weigh(self, logits_TR: Tensor) -> tuple[Tensor, Tensor, Active | None]:
        """Weights; ones where an expert runs and zeros elsewhere; the experts in use."""
        scores_TR = squashed(logits_TR, self.spec.squash)
        if self.runs == "soft":
            return scores_TR, torch.ones_like(scores_TR), None
        if self._threshold.device != logits_TR.device:
            with torch.inference_mode(False):
                self._threshold = torch.tensor(self.threshold, device=logits_TR.device)
        k = 1 if self.k is None else self.k
        kept_TR, used = selection.select(scores_TR.detach(), self.spec.select, k, self._threshold)
        match self.spec.weighting:
            case "one":
                return kept_TR, kept_TR, used
            case "score":
                return scores_TR * kept_TR, kept_TR, used
            case "gain":
                return (1 + logits_TR.softmax(-1) * self.gain) * kept_TR, kept_TR, used
        p_TR = logits_TR.masked_fill(kept_TR == 0, -torch.inf).softmax(-1)
        if self.spec.weighting == "scaled":
            return p_TR * (p_TR.shape[-1] / self.k), kept_TR, used
        return kept_TR + (p_TR - p_TR.detach()), kept_TR, used

    @property
    def products(self) -> int:
        """Multiplications for one token; those of the oracle are not counted, it saves nothing."""
        named = (*self.scorer.named_parameters(), *self.scorer.named_buffers())
        return sum(t.numel() for name, t in named if not name.endswith("bias"))

    def begin(self, bank: SplitExperts) -> None:
        """Start the scorer anew from the bank's weights, which have been dealt out anew."""
        if hasattr(self.scorer, "begin"):
            self.scorer.begin(bank)

    def extra_repr(self) -> str:
        return f"select={self.spec.select}, weighting={self.spec.weighting}, runs={self.runs}"


def squashed(logits: Tensor, how: str) -> Tensor:
    match how:
        case "abs":
            return logits.abs()
        case "sigmoid":
            return logits.sigmoid()
        case "softmax":
            return logits.softmax(-1)
    return logits


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
        self.activation = bank.activation
        R, D = bank.num_experts - spec.shared, bank.in_features
        rows = bank.down.new_zeros(R, bank.parts, D)
        self.rows = nn.Parameter(rows)
        self.bias = None if bank.first_bias is None else nn.Parameter(rows.new_zeros(R, bank.parts))
        self.begin(bank)

    @torch.no_grad()
    def begin(self, bank: SplitExperts, representatives_R: Tensor | None = None) -> None:
        """Take the representatives' rows.

        Args:
            representatives_R: place of one neuron in each routed expert; None takes those whose
                first rows are nearest to their center.
        """
        if self.rows.is_meta:
            return
        self.activation = bank.activation
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
    return selection.score_torch if scorer.training else selection.score
