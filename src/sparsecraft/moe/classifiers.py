"""MixtureOfClassifiers: any networks that classify, as experts under a gate.

The setting of Krishnamurthy et al. 2023, beside `convert`, which is for transformers: experts and
gate begin together and untrained. Shapes: B samples, D features of the gate's trunk, E experts, H
features of an expert's last hidden layer, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.errors import SparsecraftError
from sparsecraft.moe.losses import auxiliary_loss, check_names
from sparsecraft.moe.outputs import evaluation_mode
from sparsecraft.moe.routers.build import build_router
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.numbers import check_coefficients
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.scorers import Attentive
from sparsecraft.recipe.selections import Soft, TopK

ORIGINAL = RouterSpec(select=Soft())
ATTENTIVE = RouterSpec(scorer=Attentive(), reads="experts", select=Soft())


Given = list[tuple[Tensor, Tensor]]  # of every expert its hidden layer and its logits


@dataclass(frozen=True, slots=True)
class Classified:
    """What a mixture makes of samples.

    Attributes:
        log_probs_BC: of the classes.
        routing: of the samples over the experts; `logits_TE.softmax(-1)` are the gate's
            probabilities.
        loss: with labels the negative log-likelihood, and in training the auxiliary losses.
    """

    log_probs_BC: Tensor
    routing: Routing
    loss: Tensor | None = None


class MixtureOfClassifiers(nn.Module):
    """y = sum_e p_e(x) y_e(x), p by a gate and y_e(x) the classes' probabilities of expert e.

    `ORIGINAL` scores what the trunk gives by one row for each expert; `ATTENTIVE` compares it with
    the hidden layers of all experts, which therefore all run. `distilled` makes a mixture of the
    second kind one of the first, and `choose` lets each sample run its best experts alone.

    Args:
        experts: networks, each called with samples (B, ...) and giving its last hidden layer (B, H)
            and logits (B, C).
        trunk: the gate's network, samples -> (B, D).
        example: samples (B, ...), from which the sizes are read.
        gate: what scores and selects.
        losses: name in `sc.losses.LOSSES` -> coefficient; samples are compared as they came.
        mixture: `paper`, the negative log of y; `released`, whose code takes another softmax of y
            before it.

    Attributes:
        width, classes: D and C.
        hidden: H; None where the experts' differ, which an attentive gate refuses.
        frozen: what stays in evaluation.

    Raises:
        SparsecraftError: there is no expert or example, a network gives something else than it
            should, or the gate does not fit.
    """

    def __init__(
        self,
        experts: Iterable[nn.Module],
        trunk: nn.Module,
        example: Tensor,
        gate: RouterSpec = ORIGINAL,
        *,
        losses: Mapping[str, float] | None = None,
        mixture: Literal["paper", "released"] = "paper",
    ):
        super().__init__()
        self.experts, self.trunk = nn.ModuleList(experts), trunk
        self.losses, self.mixture = dict(losses or {}), mixture
        self.frozen: tuple[nn.Module, ...] = ()
        if not len(self.experts):
            raise SparsecraftError("There are no experts; give one network at least.")
        if mixture not in ("paper", "released"):
            raise SparsecraftError(f"mixture is {mixture!r}; it must be 'paper' or 'released'.")
        check_names(self.losses)
        check_coefficients(self.losses)
        if not (isinstance(example, Tensor) and example.ndim):
            raise SparsecraftError(
                f"example is {_shape(example)}; pass a tensor of samples, one at least."
            )
        self.width, self.hidden, self.classes = self._sizes(example)
        self.router = self._router(gate)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Classified:
        """Classify samples (B, ...), and with labels (B,) give the loss.

        Raises:
            SparsecraftError: labels are missing in training, or are none; an expert or the trunk
                gives something else than it should.
        """
        features_BD = self._features(x)
        if self.router.spec.reads == "experts":
            given = self._run_all(x)
            hidden_BEH = torch.stack([hidden_BH for hidden_BH, _ in given], dim=1)
            routing = self.router(features_BD, outputs_TEO=hidden_BEH)
        else:
            given, routing = None, self.router(features_BD)
        probs_BC = self._mixed(x, routing, given)
        if self.mixture == "released":
            log_probs_BC = probs_BC.log_softmax(-1)
        else:
            log_probs_BC = probs_BC.clamp_min(torch.finfo(probs_BC.dtype).tiny).log()
        loss = self._loss(x, labels, log_probs_BC, routing)
        return Classified(log_probs_BC, routing, loss)

    def distilled(
        self, gate: RouterSpec = ORIGINAL, *, trunk: bool = False
    ) -> MixtureOfClassifiers:
        """Copies of experts and trunk under a new conventional gate, to be trained without
        auxiliary losses. The experts are frozen.

        Args:
            trunk: train the trunk, too (ours); the paper trains the rows on it alone.

        Raises:
            SparsecraftError: the gate reads the experts, too.
        """
        if gate.reads == "experts":
            raise SparsecraftError(
                "gate.reads is 'experts': such a gate lets all of them run, which distilling is to "
                "end; give a linear scorer, such as ORIGINAL."
            )
        new = copy.deepcopy(self)
        new.losses = {}
        new.router = new._router(gate).to(next(self.router.parameters()).device)
        new.frozen = (new.experts,) if trunk else (new.experts, new.trunk)
        new.experts.requires_grad_(False)
        new.trunk.requires_grad_(trunk)
        new.zero_grad()
        return new.train(self.training)

    def choose(self, k: int) -> None:
        """Let each sample run its k best experts alone, weighted by the softmax over them.

        Raises:
            SparsecraftError: the gate reads all experts; or there are not as many.
        """
        spec = self.router.spec
        if spec.reads == "experts":
            raise SparsecraftError(
                "An attentive gate reads what all experts give, so that none of them can be left "
                "out; use distilled()."
            )
        router = self._router(replace(spec, select=TopK(k)))
        router.scorer = self.router.scorer
        self.router = router

    def train(self, mode: bool = True) -> MixtureOfClassifiers:
        """As of any module; what is frozen stays in evaluation (dropout, running means)."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    @torch.no_grad()
    def _sizes(self, x: Tensor) -> tuple[int, int | None, int]:
        """Features of the trunk, of hidden layers if they are alike, and classes."""
        with evaluation_mode(self):
            features_BD, given = self._features(x), self._run_all(x)
        hidden = {hidden_BH.shape[-1] for hidden_BH, _ in given}
        classes = [logits_BC.shape[-1] for _, logits_BC in given]
        for e, count in enumerate(classes):
            if count != classes[0]:
                raise SparsecraftError(
                    f"Expert {e} knows {count} classes and expert 0 {classes[0]}; all must know "
                    "the same."
                )
        return features_BD.shape[-1], hidden.pop() if len(hidden) == 1 else None, classes[0]

    def _router(self, gate: RouterSpec) -> nn.Module:
        count = len(self.experts)
        gate.check(count)
        plain = (gate.by_token or gate.reads == "experts") and not gate.reads_previous
        if not plain or gate.mixes_tokens or gate.through or gate.gates_base or gate.of_domains:
            raise SparsecraftError(
                f"The gate decides by {gate.decides.kind!r}, scores by {gate.scorer.kind!r} and "
                f"selects by {gate.select.kind!r}; one of classifiers decides by sample, and mixes "
                "no samples."
            )
        select = gate.select
        if select.may_be_empty or select.capacity or select.balance or select.coefficient:
            raise SparsecraftError(
                f"The gate selects by {select!r}; classifiers have no capacity, no state that "
                "moves, and an expert at least for each sample: leave these options out."
            )
        if gate.reads == "experts" and self.hidden is None:
            raise SparsecraftError(
                "The experts' hidden layers differ in width, and an attentive gate compares all of "
                "them; give them the same, or the gate ORIGINAL."
            )
        return build_router(gate, self.width, count, outputs=self.hidden)

    def _features(self, x: Tensor) -> Tensor:
        if not len(x):
            raise SparsecraftError("There are no samples; pass one at least.")
        features_BD = self.trunk(x)
        good = isinstance(features_BD, Tensor) and features_BD.ndim == 2
        if not good or len(features_BD) != len(x):
            raise SparsecraftError(
                f"The gate's trunk gives {_shape(features_BD)} for {len(x)} samples; it should be "
                f"({len(x)}, features)."
            )
        return features_BD

    def _run_all(self, x: Tensor) -> Given:
        return [self._run(e, x) for e in range(len(self.experts))]

    def _run(self, e: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden layer and logits of expert e."""
        given = self.experts[e](x)
        if not (isinstance(given, tuple) and len(given) == 2):
            raise SparsecraftError(
                f"Expert {e} gives {_shape(given)}; it should give its last hidden layer and its "
                "logits."
            )
        if not all(isinstance(part, Tensor) for part in given):
            raise SparsecraftError(
                f"Expert {e} gives {' and '.join(map(_shape, given))}; it should give two tensors, "
                "its last hidden layer and its logits."
            )
        if any(part.ndim != 2 or len(part) != len(x) for part in given):
            raise SparsecraftError(
                f"Expert {e} gives a hidden layer {_shape(given[0])} and logits "
                f"{_shape(given[1])} for {len(x)} samples; it should be ({len(x)}, hidden) and "
                f"({len(x)}, classes)."
            )
        return given

    def _mixed(self, x: Tensor, routing: Routing, given: Given | None) -> Tensor:
        """The classes' probabilities (B, C) float32."""
        if given is None and routing.in_order:
            given = self._run_all(x)
        if given is not None:
            probs_BEC = torch.stack([logits_BC.float() for _, logits_BC in given], 1).softmax(-1)
            return (routing.weights_TE()[..., None] * probs_BEC).sum(1)
        weights_BE, mixed_BC = routing.weights_TE(), None
        chosen_BE = torch.zeros_like(weights_BE, dtype=torch.bool)
        chosen_BE.scatter_(1, routing.indices_TK, True)
        for e in range(len(self.experts)):
            (rows,) = torch.where(chosen_BE[:, e])
            if not len(rows):
                continue
            probs = self._run(e, x[rows])[1].float().softmax(-1)
            if mixed_BC is None:
                mixed_BC = probs.new_zeros(len(x), probs.shape[-1])
            weighed = weights_BE[rows, e, None].to(probs.dtype) * probs
            mixed_BC = mixed_BC.index_add(0, rows, weighed)
        return mixed_BC

    def _loss(
        self, x: Tensor, labels: Tensor | None, log_probs_BC: Tensor, routing: Routing
    ) -> Tensor | None:
        if labels is None:
            if not self.training:
                return None
            raise SparsecraftError(
                "The mixture is in training and was given no labels; pass labels (samples,), or "
                "call eval()."
            )
        if labels.shape != (len(x),) or labels.is_floating_point():
            raise SparsecraftError(
                f"labels is {labels.dtype} of shape {tuple(labels.shape)} for {len(x)} samples; "
                "pass the number of one class for each."
            )
        if not 0 <= labels.min() <= labels.max() < self.classes:
            raise SparsecraftError(
                f"labels lie between {labels.min()} and {labels.max()}, and there are classes 0 to "
                f"{self.classes - 1}."
            )
        loss = F.nll_loss(log_probs_BC, labels.long())
        if not (self.training and self.losses):
            return loss
        routing = replace(routing, inputs_TD=x.detach().reshape(len(x), -1).float())
        auxiliary, _ = auxiliary_loss({"gate": routing}, self.losses)
        return loss + auxiliary


def _shape(given: object) -> str:
    return str(tuple(given.shape)) if isinstance(given, Tensor) else f"a {type(given).__name__}"
