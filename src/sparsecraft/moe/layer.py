"""The one layer that every recipe installs: a router, a bank of experts, and the dense base.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.dense.tokens import Reads
from sparsecraft.errors import SurgeryError
from sparsecraft.moe.batch import Batch
from sparsecraft.moe.batches import Batches
from sparsecraft.moe.experts.base import Experts
from sparsecraft.moe.experts.slots import slots
from sparsecraft.moe.fusions import faster
from sparsecraft.moe.masks import of_rows
from sparsecraft.moe.places import PLACES, flat
from sparsecraft.moe.routers.router import Router
from sparsecraft.moe.routing import Routing, combined
from sparsecraft.moe.traces import records_of
from sparsecraft.recipe.edits import Place


class MoELayer(nn.Module):
    """Stands where a dense module F stood, with its call signature.

    The forward pass:

    1. `fusions.faster` names a faster way for the parts that stand here together, or
       `places.PLACES` the function of the layer's place, which calls the steps below in its order.
    2. `base`, the dense module, runs once per token, whatever the number of experts.
    3. `route` asks `router` (a `Router`, or the `Gate` of a split network) which experts each token
       goes to, and with which weights: a `Routing`. Without a router the only expert gets all.
    4. `mix` lets `experts` (a bank, `Experts`) run them by the `dispatch` that is fastest, and sums
       their outputs by these weights; with slots, `mix_slots` does.
    5. `on_rows` puts the sum where the experts act, some of the output features or all.

    Attributes:
        rows: (start, length) of the output features that the layer acts on; None for all.
        modality: the kind of tokens that it acts on; None for all.
        batches: what each batch says of its tokens, where router or modality ask for it.
        causal: whether tokens must not see later ones, which `slots` have to respect.
        reads: whose tokens arrive here.
        sequence_first: whether they come as (positions, batch, width).
        warned: whether it was said that a batch's mask is not of the layer's tokens.
        joined: what the layer computes in a form for inference; see `sparsecraft.moe.joined`.
        operator: its number as an operator; 0 for none. See `sparsecraft.moe.operators`.
    """

    def __init__(
        self,
        place: Place,
        experts: Experts,
        router: Router | None = None,
        base: nn.Module | None = None,
        *,
        rows: tuple[int, int] | None = None,
        modality: str | None = None,
    ):
        super().__init__()
        self.place = place
        self.base = base
        self.router = router
        self.experts = experts
        self.rows = rows
        self.modality = modality
        self.causal = True
        self.reads: Reads = "input"
        self.sequence_first = False
        self.batches: Batches | None = None
        self.warned = False
        self.joined: nn.Module | None = None
        self.operator = 0

    def __setattr__(self, name: str, value: Any) -> None:
        # PEFT's target_parameters puts a module that is no bank in the place of one.
        if name == "experts" and not hasattr(value, "dispatch"):
            raise SurgeryError(
                f"A {type(value).__name__} cannot take the place of a layer's experts, of which "
                "router and losses ask more than a forward pass; let PEFT's target_modules name "
                "Linears of the model, and leave the experts' own tensors out of target_parameters."
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor | None = None, *args, **kwargs) -> Tensor | tuple:
        if x is None:  # transformers calls an attention by keywords
            x = kwargs.pop("hidden_states")
        way = faster(self, x) or PLACES[self.place]
        return way(self, x, *args, **kwargs)

    def run_base(self, x: Tensor, *args, **kwargs) -> Tensor:
        """What the dense module makes of x, gated by the router where it does that."""
        y = self.base(x, *args, **kwargs)
        if self.router is not None and self.router.spec.gates_base:
            y = y * self.router.gate_base(x)
        return y

    def route(
        self, x: Tensor, y: Tensor | None = None, scores_TE: Tensor | None = None
    ) -> Routing | None:
        """The routing of every token; None where the only expert takes all of them.

        Args:
            x: the layer's input.
            y: what the dense module made of it, where the router reads that.
            scores_TE: what the scorer gives, where it is known.
        """
        router, batch = self.router, None  # a look-up of a module costs at every call
        if self.batches is not None:
            batch = self.batches.now().seen_by(self.reads, self.sequence_first)
        if router is None:
            if self.modality is None:
                return None
            routing = Routing.of_one(flat(x))
        elif router.runs == "every":
            routing = Routing.of_all(flat(x), self.experts.num_experts)
        elif router.spec.reads == "experts":
            outputs_TEO = self.experts(flat(y if self.place == "after" else x), way=Experts.each)
            routing = router(x, batch, outputs_TEO=outputs_TEO)
        else:
            read = y if router.spec.reads == "output" else x
            routing = router(read, batch) if scores_TE is None else router(read, batch, scores_TE)
        if self.modality is not None:
            routing = routing.only(self._of_modality(x))
        if self.training and batch is not None and router is not None and router.spec.limited:
            routing = self._limited(routing, batch, x)
        if router is not None:
            for record in records_of(self):
                record.note(self, routing, x)
        return routing

    def _limited(self, routing: Routing, batch: Batch, x: Tensor) -> Routing:
        """What is left of it by the capacity of experts."""
        if batch.expert_ids is not None:
            return routing
        mask = batch.real_tokens(self.reads)
        mask_T = None if mask is None else of_rows(mask, x.shape[:-1], self.sequence_first)
        return self.router.limited(routing, mask_T, passes=self.place in ("after", "before"))

    def mix(self, x: Tensor, routing: Routing | None, *args, **kwargs) -> Tensor | tuple:
        """The experts' mixture on x."""
        experts = self.experts
        if experts.whole:
            return experts(x, routing, *args, **kwargs)
        if routing is not None and routing.outputs_TEO is not None:
            mixed_TO = combined(routing)
        elif self.training and self.runs_whole and (records := records_of(self)):
            mixed_TO, routing = experts(flat(x), routing, way=type(experts).recorded)
            for record in records:
                record.note(self, routing, x)
        else:
            mixed_TO = experts(flat(x), routing, **kwargs)
        if routing is not None and routing.through_TE is not None:
            mixed_TO = mixed_TO + self._through(flat(x), routing.through_TE, **kwargs)
        return mixed_TO.reshape(*x.shape[:-1], mixed_TO.shape[-1])

    def _through(self, x_TI: Tensor, weights_TE: Tensor, **kwargs) -> Tensor:
        """Zeros (T, O), with dL/dw_e = <dL/dy, E_e(x)> as the gradient of every weight."""
        with torch.no_grad():
            outputs_TEO = self.experts(x_TI, way=Experts.each, **kwargs)
        mixed_TO = (weights_TE[..., None].to(outputs_TEO.dtype) * outputs_TEO).sum(1)
        return mixed_TO - mixed_TO.detach()

    @property
    def imitates(self) -> bool:
        """Of place `imitate`: whether the experts have been fitted, and run instead of the base."""
        return self.experts.imitates

    @property
    def runs_whole(self) -> bool:
        """Whether all parts of a split network run, unasked."""
        return self.router is not None and self.router.runs == "every"

    @property
    def is_imitation(self) -> bool:
        """Whether the experts are fitted to the base, and run instead of it once `imitates`."""
        return self.place == "imitate"

    @property
    def opens_base(self) -> bool:
        """Whether the experts work between the base's own parts."""
        return self.place == "inside"

    @property
    def runs_base(self) -> bool:
        return self.base is not None and not self.imitates

    @property
    def runs_experts(self) -> bool:
        return self.imitates or not self.is_imitation

    @property
    def asks_router(self) -> bool:
        """Whether tokens differ in what runs: the experts do, and not all of them unasked."""
        return self.router is not None and self.runs_experts and not self.runs_whole

    @property
    def mixes_slots(self) -> bool:
        return self.router is not None and self.router.spec.mixes_tokens

    def on_rows(self, y: Tensor | tuple, change: Callable[[Tensor], Tensor]) -> Tensor | tuple:
        """y with the output features that the layer acts on changed; of a mixture that returns more
        than its output, such as its router's scores, the output alone."""
        if isinstance(y, tuple):
            return (self.on_rows(y[0], change), *y[1:])
        if self.rows is None:
            return change(y)
        start, length = self.rows
        before, part, behind = y.split([start, length, y.shape[-1] - start - length], dim=-1)
        return torch.cat([before, change(part), behind], dim=-1)

    def _of_modality(self, x: Tensor) -> Tensor:
        """Which tokens the layer acts on, (B, S); tokens that no mask covers are text."""
        visual = self._mask("mm_token_type_ids", x)
        if visual is None:
            visual = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        return visual if self.modality == "visual" else ~visual

    def _mask(self, name: str, x: Tensor) -> Tensor | None:
        """A mask of the batch for tokens x, (B, S) bool; None where it does not cover them."""
        known = self.batches is not None and self.reads == "input"
        return self.batches.now().tokens(name, x) if known else None

    def mix_slots(self, x: Tensor) -> Tensor:
        """Soft MoE's dispatch and combine over the tokens of each sequence that may be mixed."""
        x_BSI = self.batches.now().seen_by(self.reads, self.sequence_first).sequences(x)
        routing = self.route(x_BSI)
        mixed_BS = self._mask("prefix_mask" if self.causal else "attention_mask", x_BSI)
        if self.modality is not None and not (self.causal and mixed_BS is None):
            own_BS = self._of_modality(x_BSI)
            mixed_BS = own_BS if mixed_BS is None else mixed_BS & own_BS
        return slots(self.experts, x_BSI, routing, mixed_BS, causal=self.causal)

    @property
    def weight(self) -> Tensor:
        """The base Linear's weight: some models read a Linear's dtype through it (T5)."""
        base = self.base
        if base is None or not isinstance(base.weight, torch.Tensor):
            raise AttributeError("this layer stands on no single weight")
        return base.weight

    def extra_repr(self) -> str:
        return f"place={self.place!r}"
