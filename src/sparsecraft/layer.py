"""The one layer that every recipe installs: a router, a bank of experts, and the dense base.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from sparsecraft.batch import Batch
from sparsecraft.donor import FFNSpan
from sparsecraft.errors import SparsecraftError
from sparsecraft.experts.attention import AttentionExperts
from sparsecraft.experts.base import Experts, all_in_order, everyone
from sparsecraft.experts.peft import VectorExperts
from sparsecraft.experts.slots import slots
from sparsecraft.experts.split import SplitExperts
from sparsecraft.kernels.projections import is_plain, joins, project, scales_in_chunks
from sparsecraft.recipe import Place
from sparsecraft.routers import Router
from sparsecraft.routing import Routing

# Whose tokens a layer reads: the model's only ones, or its encoder's, of which a batch's masks
# tell; those of a decoder beside an encoder; or those of an image's or sound's own tower.
Reads = Literal["input", "decoder", "tower"]


class MoELayer(nn.Module):
    """Stands where a dense module F stood, with its call signature.

    The placements, with E the experts and w the routing weights:
        replace   y = sum_e w_e E_e(x)
        beside    y = F(x) + sum_e w_e E_e(x)
        after     y = sum_e w_e E_e(F(x))
        before    y = F(sum_e w_e E_e(x))
        inside    y = sum_e w_e F_e(x), with F_e what expert e makes of F
        imitate   y = F(x), and once the experts have been fitted to it, sum_e w_e E_e(x)

    The base runs once per token, whatever the number of experts. Without a router the bank's
    only expert sees every token.

    Attributes:
        rows: (start, length) of the output features that the layer acts on; None for all.
        modality: the kind of tokens that it acts on; None for all.
        batch: what the batch says of its tokens, where router or modality ask for it.
        causal: whether tokens must not see later ones, which `slots` have to respect.
        reads: whose tokens arrive here.
        imitates: of place `imitate`: the experts have been fitted, and run instead of the base.
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
        self.batch: Batch | None = None
        self.imitates = False
        self.tracing = False
        self.routing: Routing | None = None

    def forward(self, x: Tensor | None = None, *args, **kwargs) -> Tensor | tuple:
        if x is None:  # transformers calls an attention by keywords
            x = kwargs.pop("hidden_states")
        match self.place:
            case "replace" if isinstance(self.experts, AttentionExperts):
                return self.experts(x, self._route(x)[0], *args, **kwargs)
            case "imitate" if not self.imitates:
                return self.base(x, *args, **kwargs)
            case "imitate":
                return self._mix_parts(x)
            case "replace" if isinstance(self.experts, SplitExperts):
                return self._mix_parts(x)
            case "replace":
                return self._mix(x, x)
            case "inside":
                return self._mix(x, x, base=self.base)
            case "beside":
                x, z_TN, scores_TE = self._project(x)
                return self._beside(x, self.base(x, *args, **kwargs), z_TN, scores_TE)
            case "after":
                x, _, scores_TE = self._project(x)
                if self._scales(x):
                    routing, sums_to_one = self._route(x, None, scores_TE)
                    return self.experts.after_frozen(self.base, x, routing, sums_to_one)
                y = self.base(x, *args, **kwargs)
                return self._on_rows(y, lambda part: self._mix(part, x, part, None, scores_TE))
            case "before":
                return self.base(self._mix(x, x), *args, **kwargs)
        raise SparsecraftError(f"Unknown place {self.place!r}.")

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x for the base, and what experts and router read of it, where one product gives both."""
        rows_NI = self.experts.rows_of_input() if self.place == "beside" else None
        joint = type(self.router) is Router and self.router.spec.select != "slots"
        scores_EI = self.router.scores_of_input() if joint else None
        if not isinstance(self.base, nn.Linear) or not joins(x, rows_NI, scores_EI):
            return x, None, None
        return project(x, rows_NI, scores_EI, own_gradient=is_plain(self.base, nn.Linear))

    def _scales(self, x: Tensor) -> bool:
        """Whether the base and the vectors after it run as one."""
        merged = type(self.experts) is VectorExperts and self.experts.runs_merged
        if not merged or self.rows or self.modality or type(self.router) is not Router:
            return False
        return self.router.spec.reads == "input" and scales_in_chunks(
            x, self.base, self.experts.vectors
        )

    def _beside(
        self, x: Tensor, y: Tensor, z_TN: Tensor | None, scores_TE: Tensor | None
    ) -> Tensor:
        if self.router and self.router.spec.gates_base:
            y = y * self.router.gate_base(x)
        if self.router and self.router.spec.select == "slots":
            return self._on_rows(y, lambda part: part + self._mix_slots(x).reshape(part.shape))
        # Nobody else holds what a plain Linear has just computed: the update can be added to it.
        in_place = not self.rows and is_plain(self.base, nn.Linear)

        def add(part: Tensor) -> Tensor:
            routing, sums_to_one = self._route(x, part, scores_TE)
            part_TO = _flat(part)
            added = self.experts.add_to(part_TO, _flat(x), routing, sums_to_one, in_place, z_TN)
            return added.reshape(part.shape)

        return self._on_rows(y, add)

    def _on_rows(self, y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        if self.rows is None:
            return change(y)
        start, length = self.rows
        before, part, behind = y.split([start, length, y.shape[-1] - start - length], dim=-1)
        return torch.cat([before, change(part), behind], dim=-1)

    def _mix(
        self,
        inputs: Tensor,
        x: Tensor,
        y: Tensor | None = None,
        base: nn.Module | None = None,
        scores_TE: Tensor | None = None,
    ) -> Tensor:
        """The experts' mixture on `inputs`; the router reads the layer's input x or output y."""
        routing, sums_to_one = self._route(x, y, scores_TE)
        extra = {} if base is None else {"base": base}
        mixed_TO = self.experts(_flat(inputs), routing, sums_to_one, **extra)
        return mixed_TO.reshape(*inputs.shape[:-1], mixed_TO.shape[-1])

    def _mix_parts(self, x: Tensor) -> Tensor:
        """A split network: the parts that the router selects, or, unasked, all of them."""
        x_TD, every = _flat(x), self.router is None or self.router.runs == "every"
        self.experts.records = every and self.tracing and self.training
        if not every and not self.tracing:
            y_TD = self.experts.routed(x_TD, self.router.weigh)
        else:
            routing = None if every else self.router(x)
            y_TD = self.experts(x_TD, routing)
            if self.tracing and self.router is not None:
                routing = all_in_order(x_TD, self.experts.num_experts) if every else routing
                self.routing = replace(routing, pre_TF=self.experts.pre_TF)
                self.experts.pre_TF = None
        return y_TD.reshape(*x.shape[:-1], self.experts.out_features)

    def _route(
        self, x: Tensor, y: Tensor | None = None, scores_TE: Tensor | None = None
    ) -> tuple[Routing | None, bool]:
        """The routing of every token, and whether its weights are known to sum to one."""
        if self.batch is not None:
            self.batch.check()
        if self.router is None and self.modality is None:
            return None, False
        if self.router is None:
            routing, sums_to_one = everyone(_flat(x)), True
        else:
            read = y if self.router.spec.reads == "output" else x
            known = () if scores_TE is None else (scores_TE,)
            routing = self.router(read, self.batch, *known)
            sums_to_one = self.router.spec.sums_to_one
        if self.modality is not None:
            weights_TK = routing.weights_TK * self._of_modality(x).reshape(-1, 1)
            routing, sums_to_one = replace(routing, weights_TK=weights_TK), False
        if self.tracing and self.router is not None:
            self.routing = routing
        return routing, sums_to_one

    def _of_modality(self, x: Tensor) -> Tensor:
        """Which tokens the layer acts on, (B, S); tokens that no mask tells of are text."""
        visual = self._mask("mm_token_type_ids", x)
        if visual is None:
            visual = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        return visual if self.modality == "visual" else ~visual

    def _mask(self, name: str, x: Tensor) -> Tensor | None:
        """A mask of the batch for tokens x, (B, S) bool; None where it does not tell of them."""
        told = self.batch is not None and self.reads == "input"
        return self.batch.tokens(name, x) if told else None

    def _mix_slots(self, x: Tensor) -> Tensor:
        """Soft MoE's dispatch and combine over the tokens of each sequence that may be mixed."""
        x_BSI = self.batch.sequences(x)
        routing, _ = self._route(x_BSI)
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


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def set_dispatch(model: nn.Module, path: str) -> None:
    """Make every bank of experts in `model` run by one path, such as loop, or auto."""
    from sparsecraft.kernels import PATHS

    if path not in ("auto", *PATHS):
        raise SparsecraftError(f"Unknown dispatch {path!r}; known: auto, {', '.join(PATHS)}.")
    for module in model.modules():
        if isinstance(module, Experts):
            module.dispatch = path


def dense_name(model: nn.Module, name: str) -> str | None:
    """The name that a tensor of the converted model had in the dense one; None if it is new."""
    module, path = model, ""
    *parents, leaf = name.split(".")
    for part in parents:
        if isinstance(module, MoELayer):
            if part != "base":
                return None
        elif isinstance(module, FFNSpan):
            path = module.paths[part]
        else:
            path = f"{path}.{part}" if path else part
        module = module.get_submodule(part)
    if isinstance(module, MoELayer):
        return None
    return f"{path}.{leaf}" if path else leaf


def dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Dense name -> tensor for what the dense model shares with the converted one.

    Each shared storage appears once, under its first name, as in `named_parameters`.
    """
    return {
        dense: tensor
        for name, tensor in unique_tensors(model).items()
        if (dense := dense_name(model, name)) is not None
    }


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or persistent buffer, tied ones once."""
    # Not by the keys of state_dict(): bitsandbytes repacks a 4-bit weight to write it, which on
    # the CPU changes its values.
    hidden = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    buffers = {name: b for name, b in model.named_buffers() if name not in hidden}
    return dict(model.named_parameters()) | buffers


def matches(parameter_name: str, word: str) -> bool:
    """Whether a word of `Stage.trains` covers the parameter."""
    if word == "all":
        return True
    if word in ("experts", "router"):
        return f".{word}." in f".{parameter_name}"
    if word == "model":
        return ".router." not in f".{parameter_name}"
    if word == "others":
        return not any(matches(parameter_name, part) for part in ("experts", "router"))
    return fnmatch.fnmatch(parameter_name, word)
