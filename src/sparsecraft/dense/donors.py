"""One view of every dense feed-forward network and linear layer, whatever its family calls them.

A network is recognized by its structure and by what it computes, not by its class or its names, so
that families that stand in no list work too. Where a family has no module that is the network and
nothing else (OPT, BERT, Bloom), the network spans siblings: the MoE layer takes the first Linear's
place and the other parts become Identity.

Shapes: D width, F hidden width; weights are (out, in) here, also for GPT-2's transposed Conv1D.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from sparsecraft.dense.activations import placed, saved_tensors
from sparsecraft.dense.forms import ATTENTION_FORMS, AttentionForm, FFNForm, features, has, join
from sparsecraft.dense.plain import is_plain_linear
from sparsecraft.errors import DonorError

if TYPE_CHECKING:
    from sparsecraft.dense.sites import Site


@dataclass(frozen=True)
class Linear:
    """A dense Linear, Conv1D or quantized Linear, or some rows of it."""

    module: nn.Module
    path: str
    rows: tuple[int, int] | None = None
    """(start, length) of the output features."""

    @property
    def reference(self) -> Tensor:
        """A weight of the module, whose device and dtype new tensors take."""
        return self.module.weight

    @cached_property
    def in_features(self) -> int:
        return features(self.module)[0]

    @cached_property
    def out_features(self) -> int:
        return self.rows[1] if self.rows else features(self.module)[1]

    def weight(self) -> Tensor:
        """(out, in)."""
        weight = self.module.weight
        if not weight.is_floating_point():
            raise DonorError(
                f"{self.path!r} is quantized ({weight.dtype}); its weights cannot be copied into "
                "experts. Load the model without quantization."
            )
        return weight.t() if isinstance(self.module, Conv1D) else weight

    def of(self, read: Callable[[str], Tensor]) -> Linear:
        """The same projection of another model; see `FFN.of`."""
        module = copy.copy(self.module)
        named = self.module._parameters.items()
        module._parameters = {
            name: old if old is None else nn.Parameter(read(f"{self.path}.{name}"), False)
            for name, old in named
        }
        return Linear(module, self.path, self.rows)


@dataclass(frozen=True)
class Opaque:
    """A module that experts can stand around, and from whose weights none are made."""

    module: nn.Module
    path: str
    width: int

    @property
    def reference(self) -> Tensor:
        """A weight of the module, whose device and dtype new tensors take."""
        return next(p for p in self.module.parameters() if p.ndim > 1)

    @property
    def in_features(self) -> int:
        return self.width

    @property
    def out_features(self) -> int:
        return self.width


class Activation(Opaque):
    """The activation of a feed-forward network; `module` is the projection behind it."""


@dataclass(frozen=True)
class FFN:
    """A dense feed-forward network, activation(gate(x)) * up(x) or activation(up(x)), then down."""

    path: str
    gate: Linear | None
    up: Linear
    down: Linear
    activation: nn.Module
    fused: bool
    hidden_dropout: float
    """Between activation and down, as in T5."""
    output_dropout: float
    """After down, as in GPT-2."""
    activation_path: str = ""
    """Of the activation's module in the model, if it has one: it may have parameters (xIELU)."""

    @property
    def reference(self) -> Tensor:
        """A weight of the network, whose device and dtype new tensors take."""
        return self.down.module.weight

    @property
    def gated(self) -> bool:
        return self.fused or self.gate is not None

    @property
    def width(self) -> int:
        return self.down.out_features

    @property
    def in_features(self) -> int:
        return self.width

    @property
    def out_features(self) -> int:
        return self.width

    @property
    def hidden_width(self) -> int:
        return self.down.in_features

    def compute(self, x: Tensor, training: bool = False) -> Tensor:
        """The formula: what every kind of experts takes the network for, (..., D) -> (..., D)."""
        hidden = F.linear(x, self.first_weight(), self.first_bias())
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate) * up
        else:
            hidden = self.activation(hidden)
        hidden = F.dropout(hidden, self.hidden_dropout, training)
        y = F.linear(hidden, self.down_weight(), self.down_bias())
        return F.dropout(y, self.output_dropout, training)

    def first_weight(self, neurons: slice | None = None) -> Tensor:
        """(2F, D) with the gate's rows first when gated, else (F, D); or of some neurons only."""
        return self._of_neurons([linear.weight() for linear in self._firsts], neurons)

    def first_bias(self, neurons: slice | None = None) -> Tensor | None:
        biases = [linear.module.bias for linear in self._firsts]
        return None if biases[0] is None else self._of_neurons(biases, neurons)

    def down_weight(self, neurons: slice | None = None) -> Tensor:
        """(D, F); or of some neurons only."""
        return self.down.weight() if neurons is None else self.down.weight()[:, neurons]

    @property
    def _firsts(self) -> list[Linear]:
        return [self.up] if self.gate is None else [self.gate, self.up]

    def _of_neurons(self, tensors: list[Tensor], neurons: slice | None) -> Tensor:
        if neurons is None:
            return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        halves = tensors[0].chunk(2) if self.fused else tensors
        return torch.cat([half[neurons] for half in halves])

    def down_bias(self) -> Tensor | None:
        return self.down.module.bias

    def of(self, read: Callable[[str], Tensor]) -> FFN:
        """The same network of another model of this shape.

        Args:
            read: gives the other model's tensor of a dense name, such as `...up_proj.weight`.
        """
        parts = {name: getattr(self, name) for name in ("gate", "up", "down")}
        found = {name: part and part.of(read) for name, part in parts.items()}
        theirs = {name: read(f"{self.activation_path}.{name}") for name in self._activation()}
        activation = placed(self.activation, theirs) if theirs else self.activation
        return dataclasses.replace(self, activation=activation, **found)

    def tensors(self) -> dict[str, Tensor]:
        """Its weights and biases by their dense names, and what its activation holds."""
        parts = filter(None, (self.gate, self.up, self.down))
        found = {f"{p.path}.{name}": t for p in parts for name, t in p.module.named_parameters()}
        own = self._activation().items()
        return found | {f"{self.activation_path}.{name}": tensor for name, tensor in own}

    def _activation(self) -> dict[str, Tensor]:
        """The activation's floating tensors, where the model has them under a name."""
        held = saved_tensors(self.activation) if self.activation_path else {}
        return {name: tensor for name, tensor in held.items() if tensor.is_floating_point()}


@dataclass(frozen=True)
class Attention:
    """A dense attention with separate projections; `module` holds what else belongs to it, such
    as norms of queries and keys."""

    path: str
    module: nn.Module
    form: AttentionForm

    @property
    def reference(self) -> Tensor:
        """A weight of the attention, whose device and dtype new tensors take."""
        return self.query.weight

    @property
    def query(self) -> nn.Module:
        return self.module.get_submodule(self.form.query)

    @property
    def in_features(self) -> int:
        return self.query.in_features

    @property
    def out_features(self) -> int:
        return self.module.get_submodule(self.form.output).out_features

    def of(self, read: Callable[[str], Tensor]) -> Attention:
        """The same attention of another model; see `FFN.of`."""
        module = copy.copy(self.module)
        module._modules = dict(module._modules)
        for name in self.form.parts():
            linear = Linear(self.module.get_submodule(name), f"{self.path}.{name}")
            module._modules[name] = linear.of(read).module
        return dataclasses.replace(self, module=module)

    def tensors(self) -> dict[str, Tensor]:
        """Its weights and biases by their dense names."""
        return {f"{self.path}.{name}": t for name, t in self.module.named_parameters()}


class Block(Opaque):
    """A mixture of experts that the dense model has of its own, with its router."""


Donor = FFN | Attention | Linear | Activation | Block


def view(model: nn.Module, site: Site) -> Donor:
    """Read the dense module at `site` through its family's names."""
    if site.kind == "activation":
        ffn = _view_ffn(model, site)
        return Activation(ffn.down.module, site.path, ffn.hidden_width)
    if site.kind == "ffn" and site.form is None:
        width = model.config.get_text_config().hidden_size
        return Block(model.get_submodule(site.path), site.path, width)
    if site.kind == "ffn":
        return _view_ffn(model, site)
    if site.kind == "attention":
        return _view_attention(model, site)
    path = join(site.owner, site.form.up) if site.activated else site.path
    return Linear(model.get_submodule(path), path, site.rows)


def view_ffn(owner: nn.Module, form: FFNForm, path: str = "", at: str | None = None) -> FFN:
    """The network that `form` describes below `owner`, a module at `path` of the model.

    Args:
        at: what the network is called; None for the owner's path.
    """

    def linear(name: str | None) -> Linear | None:
        return Linear(owner.get_submodule(name), join(path, name)) if name else None

    act = form.activation
    return FFN(
        path=path if at is None else at,
        gate=linear(form.gate),
        up=linear(form.up),
        down=linear(form.down),
        activation=ACT2FN[form.function] if act is None else owner.get_submodule(act),
        fused=form.fused,
        hidden_dropout=form.hidden_dropout,
        output_dropout=form.output_dropout,
        activation_path=join(path, act) if act else "",
    )


def _view_ffn(model: nn.Module, site: Site) -> FFN:
    owner = model.get_submodule(site.owner)
    return view_ffn(owner, site.form, site.owner, site.path)


def _view_attention(model: nn.Module, site: Site) -> Attention:
    module = model.get_submodule(site.path)
    form = next(f for f in ATTENTION_FORMS if all(has(module, part) for part in f.parts()))
    parts = [module.get_submodule(part) for part in form.parts()]
    plain = all(type(part) is nn.Linear and is_plain_linear(part) for part in parts)
    if len(form.parts()) < 4 or not plain or not hasattr(module, "num_key_value_groups"):
        raise DonorError(
            f"The attention at {site.path!r} ({type(module).__name__}) cannot be an expert: that "
            "takes separate Linear projections of queries, keys, values and outputs, and heads in "
            "groups (Llama, Mistral, Qwen2, Qwen3 and their relatives)."
        )
    return Attention(site.path, module, form)
