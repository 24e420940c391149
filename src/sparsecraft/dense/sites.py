"""Where MoE layers can stand in a model: every feed-forward network, attention, and their parts."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsecraft.dense.forms import (
    ATTENTION_FORMS,
    FORMS,
    HEAD_DIM_NAMES,
    AttentionForm,
    FFNForm,
    features,
    has,
    join,
)
from sparsecraft.errors import DonorError, SurgeryError
from sparsecraft.recipe.edits import SiteKind


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


def find_sites(model: nn.Module, kind: SiteKind, paths: str = "*") -> list[Site]:
    """Every site of one kind whose path matches the glob `paths`, in the model's order.

    Raises:
        DonorError: the model has no feed-forward network, or no attention, of a known form.
        SurgeryError: it has some, and none matches `paths`.
    """
    sites = FINDERS[kind](model)
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
            if not all(has(module, part) for part in form.parts()):
                continue
            roots = {part.split(".")[0] for part in form.parts()}
            if roots == {name for name, _ in module.named_children()}:
                sites.append(Site("ffn", owner, (owner,), form, owner))
            elif type(module).__name__ in form.spans:
                chain = _chain(owner, form, ("first", "activation", "second"))
                members = tuple(path for _, path in chain)
                sites.append(Site("ffn", members[0], members, form, owner, chain))
    if not sites:
        known = "; ".join(", ".join(form.parts()) for form in FORMS)
        raise DonorError(
            f"{type(model).__name__} has no feed-forward network of a known form. A form is a "
            f"module with these parts: {known}. Add one to sparsecraft.dense.forms.FORMS."
        )
    return sites


def _chain(owner: str, form: FFNForm, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    parts = {"first": form.up, "activation": form.activation, "second": form.down}
    return tuple((name, join(owner, parts[name])) for name in names)


def _attentions(model: nn.Module) -> list[tuple[str, nn.Module, AttentionForm]]:
    found = [
        (owner, module, form)
        for owner, module in model.named_modules()
        for form in ATTENTION_FORMS
        if all(has(module, part) for part in form.parts())
    ]
    if not found:
        known = "; ".join(", ".join(form.parts()) for form in ATTENTION_FORMS)
        raise DonorError(
            f"{type(model).__name__} has no attention of a known form. A form is a module with "
            f"these parts: {known}. Add one to sparsecraft.dense.forms.ATTENTION_FORMS."
        )
    return found


def _projection_sites(model: nn.Module, kind: SiteKind) -> list[Site]:
    """The query, key, value or output projection of every attention."""
    sites = []
    for owner, module, form in _attentions(model):
        path = join(owner, getattr(form, kind))
        rows = None
        if kind != "output" and form.query == form.key:
            width = features(model.get_submodule(join(owner, form.output)))[0]
            fused = features(model.get_submodule(path))[1]
            shared = (fused - width) // 2  # of keys and of values
            starts = {"query": 0, "key": width, "value": width + shared}
            rows = (starts[kind], width if kind == "query" else shared)
        head_dim = _head_dim(module) if kind in ("key", "value") else None
        sites.append(Site(kind, path, (path,), owner=owner, rows=rows, head_dim=head_dim))
    return sites


def _head_dim(attention: nn.Module) -> int | None:
    modules = (attention, *attention.children())
    values = (getattr(m, name, None) for m in modules for name in HEAD_DIM_NAMES)
    return next((value for value in values if isinstance(value, int)), None)


def _ffn_part_sites(model: nn.Module, kind: SiteKind) -> list[Site]:
    return [_ffn_part(model, ffn, kind) for ffn in _ffn_sites(model)]


def _ffn_part(model: nn.Module, ffn: Site, kind: SiteKind) -> Site:
    form, owner = ffn.form, ffn.owner
    name = form.gate or form.up if kind == "gate" else getattr(form, kind, form.up)
    path, rows, chain = join(owner, name), None, ()
    if form.fused and kind in ("gate", "intermediate"):
        half = features(model.get_submodule(path))[1] // 2
        rows = (0 if kind == "gate" else half, half)
    if kind == "intermediate" and not (form.gate or form.fused):
        chain = _chain(owner, form, ("first", "activation"))
    members = tuple(member for _, member in chain) or (path,)
    return Site(kind, path, members, form, owner, chain, rows)


def _linear_sites(model: nn.Module, kind: SiteKind) -> list[Site]:
    """Linear and Conv1D layers inside an attention module or a feed-forward network."""
    blocks = []
    ffns = _ffn_sites(model)
    if kind != "attention_linear":
        blocks += [member for site in ffns for member in site.members]
    if kind != "ffn_linear":
        blocks += [n for n, m in model.named_modules() if "Attention" in type(m).__name__]
    inside = tuple(f"{block}." for block in blocks)
    return [
        Site(kind, path, (path,))
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and f"{path}.".startswith(inside)
    ]


FINDERS: dict[SiteKind, Callable[[nn.Module], list[Site]]] = {
    "ffn": _ffn_sites,
    "attention": lambda model: [
        Site("attention", owner, (owner,), owner=owner) for owner, _, _ in _attentions(model)
    ],
    "linear": lambda model: _linear_sites(model, "linear"),
    "attention_linear": lambda model: _linear_sites(model, "attention_linear"),
    "ffn_linear": lambda model: _linear_sites(model, "ffn_linear"),
    "query": lambda model: _projection_sites(model, "query"),
    "key": lambda model: _projection_sites(model, "key"),
    "value": lambda model: _projection_sites(model, "value"),
    "output": lambda model: _projection_sites(model, "output"),
    "gate": lambda model: _ffn_part_sites(model, "gate"),
    "down": lambda model: _ffn_part_sites(model, "down"),
    "intermediate": lambda model: _ffn_part_sites(model, "intermediate"),
    "activation": lambda model: _ffn_part_sites(model, "activation"),
}
