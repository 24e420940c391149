"""Router saturation while a model trains: how much of what routers choose for the same rows stays
(Muennighoff et al. 2024, "OLMoE", section 4.1, who compare with the end of training).

T tokens, E experts.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback

from sparsecraft.dense.memory import is_out_of_memory
from sparsecraft.moe.context import layer_masks
from sparsecraft.moe.outputs import undisturbed
from sparsecraft.moe.routing import Routing
from sparsecraft.moe.tracing import trace
from sparsecraft.training.arguments import processes
from sparsecraft.training.engine import share_again

log = logging.getLogger("sparsecraft")

TOKENS = 512  # of the first rows, about, and no more rows than a micro-batch has
EVERY = 10  # steps between two looks, at least: one costs a forward pass of these tokens


class Saturation(TrainerCallback):
    """Looks at the start, and at the log lines that are far enough apart or of a state, so that a
    run that is resumed looks as it would have."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.step, self.chosen = 0, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.step, self.chosen = state.global_step, self._choices()

    def shares(self, saves: bool) -> dict[str, float]:
        """For each layer and over all: the share of choices that are as they were at the last look;
        nothing where it is not looked.

        Args:
            saves: whether a state is written here.
        """
        step = self.trainer.state.global_step
        if not self.chosen or step == self.step or (step - self.step < EVERY and not saves):
            return {}
        before, self.step, self.chosen = self.chosen, step, self._choices()
        if not self.chosen:  # memory ran out
            return {}
        found = {
            f"saturation/{layer}": _shared(before[layer], chosen_TE)
            for layer, chosen_TE in self.chosen.items()
            if layer in before
        }
        return found | {"saturation": sum(found.values()) / len(found)} if found else {}

    def _choices(self) -> dict[str, Tensor]:
        """Layer -> which experts each token goes to, (T, E) bool; a soft routing's first."""
        trainer = self.trainer
        # Forced or whole, routers choose nothing.
        if not trainer._has_routers() or trainer.stage.deal or trainer.stage.runs == "every":
            return {}
        model = trainer.accelerator.unwrap_model(trainer.model)
        found = {}
        try:
            inputs = trainer._prepare_inputs(trainer.data_collator(self._rows()))
            mask, given = inputs.get("token_mask"), dict(inputs)
            with undisturbed(model), trace(model) as traced:
                trainer.compute_loss(trainer.model, inputs)
                masks = layer_masks(model, given, mask, traced)
                found = {layer: _chosen(routing, masks(layer)) for layer, routing in traced.items()}
        except Exception as error:
            if not is_out_of_memory(error) or processes() > 1:  # others would wait for this one
                raise
            log.warning("The log will not say how far routers have settled: memory ran out.")
        share_again(trainer.model)
        return found

    def _rows(self) -> list[dict[str, Any]]:
        rows, most = [], self.trainer.args.per_device_train_batch_size
        for row in self.trainer.train_dataset:
            rows.append(row)
            tokens = len(rows) * max(len(row["input_ids"]) for row in rows)
            if tokens >= TOKENS or len(rows) == most:
                break
        return rows


def _chosen(routing: Routing, mask_T: Tensor | None) -> Tensor:
    weights_TE = routing.weights_TE()
    live_TE = weights_TE != 0
    if routing.soft:
        live_TE = F.one_hot(weights_TE.argmax(1), routing.num_experts).bool()
    counted_T = routing.counted(mask_T)
    return (live_TE if counted_T is None else live_TE[counted_T]).cpu()


def _shared(before_TE: Tensor, now_TE: Tensor) -> float:
    """Of the pass with more of them."""
    most = max(before_TE.sum(), now_TE.sum(), torch.tensor(1))
    return ((before_TE & now_TE).sum() / most).item()
