"""One view of every dense feed-forward network and linear layer, whatever its family calls them.

A family is recognized by the names of a module's parts, not by its class, so that relatives of a
known family work too. Where a family has no feed-forward module (OPT, BERT), the network spans
siblings: the MoE layer takes the first Linear's place and the other parts become Identity.

Shapes: D width, F hidden width; weights are (out, in) here, also for GPT-2's transposed Conv1D.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsecraft.errors import DonorError, SurgeryError


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


@dataclass(frozen=True, slots=True)
class Site:
    """A place where an MoE layer can stand.

    Attributes:
        kind: `ffn` or `linear`.
        path: the module path that the layer takes.
        members: paths of all the dense modules that it covers.
        form: for an FFN, where its parts are below `owner`.
        owner: path of the module that `form` is relative to.
    """

    kind: Literal["ffn", "linear"]
    path: str
    members: tuple[str, ...]
    form: FFNForm | None = None
    owner: str = ""

    @property
    def spans_siblings(self) -> bool:
        return self.kind == "ffn" and self.path != self.owner

    def contains(self, other: Site) -> bool:
        """Whether `other` lies inside this site (and is not the same one)."""
        return self.members != other.members and all(
            any(m == mine or m.startswith(mine + ".") for mine in self.members)
            for m in other.members
        )


class FFNSpan(nn.Module):
    """A dense feed-forward network gathered from siblings: second(activation(first(x)))."""

    def __init__(self, model: nn.Module, site: Site):
        super().__init__()
        paths = {
            "first": site.form.up,
            "activation": site.form.activation,
            "second": site.form.down,
        }
        self.paths = {name: _join(site.owner, part) for name, part in paths.items()}
        for name, path in self.paths.items():
            setattr(self, name, model.get_submodule(path))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))


@dataclass(frozen=True)
class Linear:
    """A dense Linear, Conv1D or quantized Linear."""

    module: nn.Module
    path: str

    @cached_property
    def in_features(self) -> int:
        return self.module.nx if isinstance(self.module, Conv1D) else self.module.in_features

    @cached_property
    def out_features(self) -> int:
        return self.module.nf if isinstance(self.module, Conv1D) else self.module.out_features

    def weight(self) -> Tensor:
        """(out, in)."""
        weight = self.module.weight
        if not weight.is_floating_point():
            raise DonorError(
                f"{self.path!r} is quantized ({weight.dtype}); its weights cannot be copied into "
                "experts. Load the model without quantization."
            )
        return weight.t() if isinstance(self.module, Conv1D) else weight


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

    def first_weight(self) -> Tensor:
        """(2F, D) with the gate's rows first when gated, else (F, D)."""
        if self.gate is None:
            return self.up.weight()
        return torch.cat([self.gate.weight(), self.up.weight()])

    def first_bias(self) -> Tensor | None:
        up = self.up.module.bias
        if self.gate is None or up is None:
            return up
        return torch.cat([self.gate.module.bias, up])

    def down_weight(self) -> Tensor:
        """(D, F)."""
        return self.down.weight()

    def down_bias(self) -> Tensor | None:
        return self.down.module.bias


def view(model: nn.Module, site: Site) -> FFN | Linear:
    """Read the dense module at `site` through its family's names."""
    if site.kind == "linear":
        return Linear(model.get_submodule(site.path), site.path)

    def part(name: str | None) -> nn.Module | None:
        return model.get_submodule(_join(site.owner, name)) if name else None

    def linear(name: str | None) -> Linear | None:
        return Linear(part(name), _join(site.owner, name)) if name else None

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


def find_sites(model: nn.Module, kind: Literal["ffn", "linear"], paths: str = "*") -> list[Site]:
    """Every site of one kind whose path matches the glob `paths`, in the model's order.

    Raises:
        DonorError: the model has no feed-forward network of a known form.
        SurgeryError: it has some, and none matches `paths`.
    """
    sites = _ffn_sites(model)
    if not sites:
        known = "; ".join(", ".join(form.parts()) for form in FORMS)
        raise DonorError(
            f"{type(model).__name__} has no feed-forward network of a known form. A form is a "
            f"module with these parts: {known}. Add one to sparsecraft.donor.FORMS."
        )
    if kind == "linear":
        sites = _linear_sites(model, sites)
    found = [site for site in sites if fnmatch.fnmatch(site.path, paths)]
    if not found:
        examples = ", ".join(site.path for site in sites[:3])
        raise SurgeryError(
            f"The path {paths!r} matches none of the {len(sites)} {kind} sites of "
            f"{type(model).__name__}; they are called like {examples}."
        )
    return found


def _ffn_sites(model: nn.Module) -> list[Site]:
    sites = []
    for owner, module in model.named_modules():
        for form in FORMS:
            if not all(_has(module, part) for part in form.parts()):
                continue
            roots = {part.split(".")[0] for part in form.parts()}
            if roots == {name for name, _ in module.named_children()}:
                sites.append(Site("ffn", owner, (owner,), form, owner))
            elif type(module).__name__ in form.spans:
                members = tuple(_join(owner, part) for part in form.parts())
                sites.append(Site("ffn", _join(owner, form.up), members, form, owner))
    return sites


def _linear_sites(model: nn.Module, ffn_sites: list[Site]) -> list[Site]:
    """Linear and Conv1D layers inside an attention module or a feed-forward network."""
    blocks = [member for site in ffn_sites for member in site.members]
    blocks += [n for n, m in model.named_modules() if "Attention" in type(m).__name__]
    inside = tuple(f"{block}." for block in blocks)
    return [
        Site("linear", path, (path,))
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and f"{path}.".startswith(inside)
    ]


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
    return isinstance(module, nn.Module)


def _join(owner: str, part: str) -> str:
    return f"{owner}.{part}" if owner else part
