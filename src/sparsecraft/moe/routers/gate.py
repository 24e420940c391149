"""Gate: which parts of a split network run, for each token."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.kernels.selection import Active, select
from sparsecraft.moe.batch import Batch
from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.moe.extra_state import is_left_out, is_number, pack, unpack
from sparsecraft.moe.routers.part_scorers import PART_SCORERS
from sparsecraft.moe.routers.running import Running, is_running
from sparsecraft.moe.routers.starts import DOOR
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.kinds import named
from sparsecraft.recipe.routers import GateSpec

Runs = Literal["sparse", "every", "soft"]


class Gate(nn.Module):
    """A scorer of the parts of a split network, a rule, and a weighting; see `GateSpec`.

    Attributes:
        runs: `sparse`, by the rule; `every`, all experts with weight one, where the layer does not
            ask the router at all; `soft`, all experts, each weighted by its score.
        k: experts that are selected, for top-k.
        share: mean share of experts that run, where it is known; for counting costs.
        gain: of `weighting="gain"`, (R,).
        running: what the model runs, which all of its gates share.
    """

    def __init__(self, spec: GateSpec, bank: SplitExperts):
        super().__init__()
        self.spec = spec
        self.num_experts = bank.num_experts
        self.runs: Runs = "sparse"
        self.running = Running()
        self.k = spec.k
        self.share = None if self.k is None else (spec.shared + self.k) / bank.num_experts
        # Not a buffer: a model that is cast to bf16 must keep it.
        value = -1.0 if spec.threshold is None else spec.threshold
        self._threshold = torch.tensor(value, dtype=torch.float32)
        self.scorer = named(PART_SCORERS, spec.scorer, "scorer", DOOR)(spec.scorer, bank, spec)
        gain = bank.down.new_zeros(bank.num_experts - spec.shared, dtype=torch.float32)
        self.gain = nn.Parameter(gain) if spec.weighting == "gain" else None

    @property
    def threshold(self) -> float:
        return self._threshold.item()

    @threshold.setter
    def threshold(self, value: float) -> None:
        if self._threshold.is_inference():
            self._threshold = torch.full_like(self._threshold, value)
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
        soft = self.runs == "soft"
        return Routing(weights_TE, indices_TE, logits_TE, in_order=True, soft=soft)

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
                self._threshold = self._threshold.to(logits_TR.device, copy=True)
        k = 1 if self.k is None else self.k
        kept_TR, used = select(scores_TR.detach(), self.spec.select.kind, k, self._threshold)
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
        return self.scorer.products

    def repeated(self, width: int) -> int:
        """Multiplications for a token beyond one for each parameter: none."""
        return 0

    def begin(self, bank: SplitExperts, representatives_R: Tensor | None = None) -> None:
        """Start the scorer anew from the bank's weights, which are in another order now."""
        self.scorer.begin(bank, representatives_R)

    @property
    def moving(self) -> list:
        """None of its states moves with optimizer steps."""
        return []

    def at_step(self, step: int) -> None:
        """Note how many steps of training there were; its rules do not depend on that."""

    def get_extra_state(self) -> Tensor:
        """The rule and how it is set, for `state_dict`."""
        settings = {"runs": self.runs, "k": self.k, "share": self.share}
        settings |= {"threshold": self.threshold, "running": self.running.to_dict()}
        return pack({"rule": _rule(self.spec), **settings})

    def set_extra_state(self, state: Tensor) -> None:
        """Take over how another gate with this rule is set.

        Raises:
            SparsecraftError: the state is another rule's, or none.
        """
        if is_left_out(state):
            return
        most, ruled_by_k = self.num_experts - self.spec.shared, self.k is not None
        checks = {
            "rule": lambda rule: rule == _rule(self.spec),
            "runs": lambda runs: runs in get_args(Runs),
            "k": lambda k: type(k) is int and 1 <= k <= most if ruled_by_k else k is None,
            "share": lambda share: share is None or (is_number(share) and 0 <= share <= 1),
            "threshold": self._is_threshold,
            "running": is_running,
        }
        found = unpack(state, f"gate of {self.num_experts} experts", checks)
        self.runs, self.k, self.share = found["runs"], found["k"], found["share"]
        self.threshold = found["threshold"]
        self.running.read(found["running"])

    def _is_threshold(self, value: Any) -> bool:
        """Whether the rule can have it; that of top-k reads none."""
        if not is_number(value) or self.spec.threshold is None:
            return is_number(value)
        rule = self.spec.select
        # A hair more than the rule's own limits: those from data are rounded.
        return rule.most == math.inf or -1e-3 <= value <= rule.most + 1e-3

    def extra_repr(self) -> str:
        return f"select={self.spec.select.kind}, weighting={self.spec.weighting}, runs={self.runs}"


def _rule(spec: GateSpec) -> dict[str, Any]:
    """What of the recipe says how scores become weights."""
    rule = {"scorer": spec.scorer.rule, "select": spec.select.kind, "shared": spec.shared}
    rule |= {"weighting": spec.weighting, "squash": spec.squash}
    return rule | ({"target": spec.target} if spec.scorer.reads_target else {})


def squashed(logits: Tensor, how: str) -> Tensor:
    match how:
        case "abs":
            return logits.abs()
        case "sigmoid":
            return logits.sigmoid()
        case "softmax":
            return logits.softmax(-1)
    return logits
