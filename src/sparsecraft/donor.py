"""One view of every dense feed-forward network and linear layer, whatever its family calls them.

A family is recognized by the names of a module's parts, not by its class, so that relatives of a
known family work too. Where a family has no feed-forward module (OPT, BERT), the network spans
siblings: the MoE layer takes the first Linear's place and the other parts become Identity.

Shapes: D width, F hidden width; weights are (out, in) here, also for GPT-2's transposed Conv1D.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsecraft.errors import DonorError
from sparsecraft.recipe import SiteKind


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNForm:
    """Where a family keeps the parts of its feed-forward network, as paths below one module."""

    up: str
    down: str
    activation: str
    gate: str | None = None
    fused: bool = False
    """`up` holds gate and up in one matrix, gate rows first."""
    hidden_dropout: str | None = None
    output_dropout: str | None = None
    spans: tuple[str, ...] = ()
    """Classes in which the parts are siblings of other modules, applied one after the other."""

    def parts(self) -> list[str]:
        names = (self.gate, self.up, self.activation, self.down)
        return [name for name in (*names, self.hidden_dropout, self.output_dropout) if name]


FORMS = (
    # Llama, Mistral, Qwen2, Qwen3, Gemma
    FFNForm(gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn"),
    # Phi-3
    FFNForm(up="gate_up_proj", down="down_proj", activation="activation_fn", fused=True),
    # GPT-2
    FFNForm(up="c_fc", down="c_proj", activation="act", output_dropout="dropout"),
    # T5 v1.1 and Flan-T5
    FFNForm(gate="wi_0", up="wi_1", down="wo", activation="act", hidden_dropout="dropout"),
    # T5
    FFNForm(up="wi", down="wo", activation="act", hidden_dropout="dropout"),
    # ViT (a module) and OPT (siblings in the decoder layer)
    FFNForm(up="fc1", down="fc2", activation="activation_fn", spans=("OPTDecoderLayer",)),
    # BERT, MiniLM and their close relatives
    FFNForm(
        up="intermediate.dense",
        down="output.dense",
        activation="intermediate.intermediate_act_fn",
        spans=("BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer"),
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionForm:
    """Where a family keeps the projections of its attention, as paths below one module.

    In a fused projection the rows of the queries come first, then those of keys and values.
    """

    query: str
    key: str
    value: str
    output: str

    def parts(self) -> list[str]:
        return list(dict.fromkeys((self.query, self.key, self.value, self.output)))


ATTENTION_FORMS = (
    # Llama, Mistral, Qwen, Gemma, ViT
    AttentionForm(query="q_proj", key="k_proj", value="v_proj", output="o_proj"),
    # OPT
    AttentionForm(query="q_proj", key="k_proj", value="v_proj", output="out_proj"),
    # T5
    AttentionForm(query="q", key="k", value="v", output="o"),
    # BERT, MiniLM
    AttentionForm(query="self.query", key="self.key", value="self.value", output="output.dense"),
    # ViT before transformers 5.20
    AttentionForm(
        query="attention.query", key="attention.key", value="attention.value", output="output.dense"
    ),
    # Phi-3
    AttentionForm(query="qkv_proj", key="qkv_proj", value="qkv_proj", output="o_proj"),
    # GPT-2
    AttentionForm(query="c_attn", key="c_attn", value="c_attn", output="c_proj"),
)

HEAD_DIM_NAMES = ("head_dim", "key_value_proj_dim", "attention_head_size")


@dataclass(frozen=True, slots=True)
class Site:
    """A place where an MoE layer can stand.

    Attributes:
        kind: the word of the edit that asks for it.
        path: the module path that the layer takes.
        members: paths of all the dense modules that it covers.
        form: for an FFN, where its parts are below `owner`.
        owner: path of the module that `form` is relative to.
        chain: where the covered modules are siblings, applied one after the other: the name that
            each gets in an `FFNSpan`, and its path.
        rows: (start, length) of the output features, where several projections are fused.
        head_dim: width of one attention head, for keys and values.
    """

    kind: SiteKind
    path: str
    members: tuple[str, ...]
    form: FFNForm | None = None
    owner: str = ""
    chain: tuple[tuple[str, str], ...] = ()
    rows: tuple[int, int] | None = None
    head_dim: int | None = None

    @property
    def spans_siblings(self) -> bool:
        return bool(self.chain)

    def contains(self, other: Site) -> bool:
        """Whether `other` lies inside this site (and is not the same one)."""
        return self.members != other.members and all(
            any(m == mine or m.startswith(mine + ".") for mine in self.members)
            for m in other.members
        )


class FFNSpan(nn.Module):
    """Siblings gathered into one module: `first`, `activation` and, if covered, `second`."""

    def __init__(self, model: nn.Module, site: Site):
        super().__init__()
        self.paths = dict(site.chain)
        for name, path in site.chain:
            setattr(self, name, model.get_submodule(path))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a Linear or Conv1D."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features


@dataclass(frozen=True)
class Linear:
    """A dense Linear, Conv1D or quantized Linear, or some rows of it."""

    module: nn.Module
    path: str
    rows: tuple[int, int] | None = None
    """(start, length) of the output features."""

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
class Activation:
    """The activation of a feed-forward network; `module` is the projection behind it."""

    module: nn.Module
    path: str
    width: int

    @property
    def in_features(self) -> int:
        return self.width

    @property
    def out_features(self) -> int:
        return self.width


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
        return dataclasses.replace(
            self, **{name: part and part.of(read) for name, part in parts.items()}
        )

    def tensors(self) -> dict[str, Tensor]:
        """Its weights and biases by their dense names."""
        parts = filter(None, (self.gate, self.up, self.down))
        return {f"{p.path}.{name}": t for p in parts for name, t in p.module.named_parameters()}


@dataclass(frozen=True)
class Attention:
    """A dense attention with separate projections; `module` holds what else belongs to it, such
    as norms of queries and keys."""

    path: str
    module: nn.Module
    form: AttentionForm

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


Donor = FFN | Attention | Linear | Activation


def view(model: nn.Module, site: Site) -> Donor:
    """Read the dense module at `site` through its family's names."""
    if site.kind == "activation":
        ffn = _view_ffn(model, site)
        return Activation(ffn.down.module, site.path, ffn.hidden_width)
    if site.kind == "ffn":
        return _view_ffn(model, site)
    if site.kind == "attention":
        return _view_attention(model, site)
    return Linear(model.get_submodule(site.path), site.path, site.rows)


def _view_ffn(model: nn.Module, site: Site) -> FFN:
    def part(name: str | None) -> nn.Module | None:
        return model.get_submodule(join(site.owner, name)) if name else None

    def linear(name: str | None) -> Linear | None:
        return Linear(part(name), join(site.owner, name)) if name else None

    def rate(name: str | None) -> float:
        return part(name).p if name else 0.0

    form = site.form
    return FFN(
        path=site.path,
        gate=linear(form.gate),
        up=linear(form.up),
        down=linear(form.down),
        activation=part(form.activation),
        fused=form.fused,
        hidden_dropout=rate(form.hidden_dropout),
        output_dropout=rate(form.output_dropout),
    )


def _view_attention(model: nn.Module, site: Site) -> Attention:
    module = model.get_submodule(site.path)
    form = next(f for f in ATTENTION_FORMS if all(has(module, part) for part in f.parts()))
    plain = all(type(module.get_submodule(part)) is nn.Linear for part in form.parts())
    if len(form.parts()) < 4 or not plain or not hasattr(module, "num_key_value_groups"):
        raise DonorError(
            f"The attention at {site.path!r} ({type(module).__name__}) cannot be an expert: that "
            "takes separate Linear projections of queries, keys, values and outputs, and heads in "
            "groups (Llama, Mistral, Qwen2, Qwen3 and their relatives)."
        )
    return Attention(site.path, module, form)


def has(module: nn.Module, path: str) -> bool:
    """Whether there is a module at `path` below."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return isinstance(module, nn.Module)


def join(owner: str, part: str) -> str:
    return f"{owner}.{part}" if owner else part
