"""Where MoE layers can stand in a model: every feed-forward network, attention, and their parts."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from sparsecraft.dense.attentions import find_attentions, fused_rows, why_not
from sparsecraft.dense.forms import (
    ATTENTION_FORMS,
    HEAD_DIM_NAMES,
    AttentionForm,
    FFNForm,
    features,
    is_linear,
    join,
)
from sparsecraft.dense.linears import Placed, linears
from sparsecraft.dense.mixtures import Mixture, inside, mixtures
from sparsecraft.dense.networks import Network, find_networks
from sparsecraft.dense.plain import is_plain_linear
from sparsecraft.dense.proof import span
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
        activated: it covers one Linear of a network and the activation behind it.
        refused: why no experts can stand here, if so.
    """

    kind: SiteKind
    path: str
    members: tuple[str, ...]
    form: FFNForm | None = None
    owner: str = ""
    chain: tuple[tuple[str, str], ...] = ()
    rows: tuple[int, int] | None = None
    head_dim: int | None = None
    activated: bool = False
    refused: str | None = None

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
    """Siblings gathered into one module: `first`, `activation` and, if covered, `second`; an
    activation that is a function belongs to `first`."""

    def __init__(self, model: nn.Module, site: Site):
        super().__init__()
        self.paths = dict(site.chain)
        for name, path in site.chain:
            if name == "second" and site.form.silenced:
                self.dropout = nn.Dropout(site.form.hidden_dropout)
            setattr(self, name, model.get_submodule(path))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


def silence(model: nn.Module, site: Site, *, undo: bool = False) -> None:
    """Set the block's own dropout to zero between siblings that a layer has taken the place of: it
    would fall on the network's output; or set it as it was."""
    if "second" in dict(site.chain) and site.form.silenced:
        rate = site.form.hidden_dropout if undo else 0.0
        setattr(model.get_submodule(site.owner), site.form.silenced, rate)


def find_sites(model: nn.Module, kind: SiteKind, paths: str = "*") -> list[Site]:
    """Every site of one kind whose path matches the glob `paths`, in the model's order.

    None lies inside the experts of a mixture that the model has of its own.

    Raises:
        DonorError: the model has no feed-forward network, no attention, of a known form, or no
            Linear that is a site.
        SurgeryError: it has some, and none matches `paths`.
    """
    own = mixtures(model)
    experts = [mixture.path for mixture in own]
    try:
        sites = [site for site in FINDERS[kind](model) if not inside(site.path, experts)]
    except DonorError as error:
        if not own or kind not in OF_NETWORKS:
            raise
        raise DonorError(_only_mixtures(model, kind, own)) from error
    if not sites:
        raise DonorError(_only_mixtures(model, kind, own))
    found = [site for site in sites if fnmatch.fnmatch(site.path, paths)]
    if not found:
        examples = ", ".join(site.path for site in sites[:3])
        raise SurgeryError(
            f"The path {paths!r} matches none of the {len(sites)} {kind} sites of "
            f"{type(model).__name__}; they are called like {examples}."
        )
    if refused := [site for site in found if site.refused]:
        raise DonorError(
            f"{len(refused)} of the {len(found)} {kind} sites of {type(model).__name__} are "
            f"refused; the first: {refused[0].refused}. Leave them out by paths=, or use a recipe "
            "at Linears (molora, lora)."
        )
    return found


def _only_mixtures(model: nn.Module, kind: SiteKind, own: list[Mixture]) -> str:
    """Why the networks of a mixture of experts are no sites."""
    examples = ", ".join([*dict.fromkeys(mixture.owner for mixture in own)][:2])
    return (
        f"{type(model).__name__} has no {kind} outside of the experts of its own mixtures (such as "
        f"{examples}), which nothing of ours enters yet; adapters and vectors can stand around a "
        "mixture (site='ffn', place='after'), and LoRAs at the Linears of its attentions."
    )


def _ffn_sites(model: nn.Module) -> list[Site]:
    networks, doubtful = find_networks(model)
    if not any(network.why is None for network in networks):
        nearest = [*networks, *doubtful][:1]
        raise DonorError(
            f"{type(model).__name__} has no feed-forward network of a known form: two or three "
            "Linears with an activation between, which compute down(activation(up(x))) or "
            "down(activation(gate(x)) * up(x)). "
            + "".join(f"Nearest: {_described(model, network)}. " for network in nearest)
            + "Recipes at Linears (molora, lora) need none."
        )
    return [_ffn_site(model, network) for network in networks]


def _described(model: nn.Module, network: Network) -> str:
    name = type(model.get_submodule(network.owner)).__name__
    return f"{network.owner!r} ({name}) computes something else: {network.why}"


def _ffn_site(model: nn.Module, network: Network) -> Site:
    owner, form = network.owner, network.form
    refused = network.why and _described(model, network)
    if network.whole or refused:
        return Site("ffn", owner, (owner,), form, owner, refused=refused)
    chain = tuple((name, join(owner, part)) for name, part in span(form).items())
    members = tuple(path for _, path in chain)
    return Site("ffn", members[0], members, form, owner, chain)


def _attentions(model: nn.Module) -> list[tuple[str, nn.Module, AttentionForm]]:
    found = find_attentions(model)
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
        path, rows, refused = join(owner, getattr(form, kind)), None, None
        if kind != "output":
            rows, refused = fused_rows(module, form, kind), why_not(module, form, kind)
        projection = model.get_submodule(path)
        if is_linear(projection) and not is_plain_linear(projection):
            refused = f"its {getattr(form, kind)!r} is no plain Linear"
        if refused:
            refused = f"the attention {owner!r} ({type(module).__name__}): {refused}"
        head_dim = _head_dim(module) if kind in ("key", "value") else None
        site = Site(kind, path, (path,), owner=owner, rows=rows, head_dim=head_dim, refused=refused)
        sites.append(site)
    return sites


def _head_dim(attention: nn.Module) -> int | None:
    modules = (attention, *attention.children())
    values = (getattr(m, name, None) for m in modules for name in HEAD_DIM_NAMES)
    return next((value for value in values if isinstance(value, int)), None)


def _ffn_part_sites(model: nn.Module, kind: SiteKind) -> list[Site]:
    return [_ffn_part(model, ffn, kind) for ffn in _ffn_sites(model)]


def _ffn_part(model: nn.Module, ffn: Site, kind: SiteKind) -> Site:
    form, owner, refused = ffn.form, ffn.owner, ffn.refused
    name = form.gate or form.up if kind == "gate" else getattr(form, kind, form.up)
    rows, parts = None, {}
    activated = kind == "intermediate" and not form.gated
    if name is None:  # an activation that is a function
        name = form.up
        refused = refused or (
            f"{owner!r} ({type(model.get_submodule(owner)).__name__}) calls its activation as a "
            "function, and has no module that experts could stand at"
        )
    if form.fused and kind in ("gate", "intermediate"):
        half = features(model.get_submodule(join(owner, name)))[1] // 2
        rows = (0 if kind == "gate" else half, half)
    if activated:
        parts = {part: path for part, path in span(form).items() if part != "second"}
        name = parts["first"]
    chain = tuple((part, join(owner, path)) for part, path in parts.items())
    chain = chain if len(chain) > 1 else ()
    path = join(owner, name)
    members = tuple(member for _, member in chain) or (path,)
    return Site(kind, path, members, form, owner, chain, rows, activated=activated, refused=refused)


def placed_linears(model: nn.Module) -> list[Placed]:
    """Every Linear of a model, with what it belongs to; see `sparsecraft.dense.linears`."""
    sites = [_ffn_site(model, network) for network in find_networks(model)[0]]
    return linears(model, [member for site in sites for member in site.members])


def _linear_sites(model: nn.Module, kind: SiteKind) -> list[Site]:
    """Linear and Conv1D layers of the blocks, or of their attentions or networks alone."""
    found = [Site(kind, at.path, (at.path,)) for at in placed_linears(model) if at.at(kind)]
    if not found:
        raise DonorError(
            f"{type(model).__name__} has no {kind}: none of its Linears stands in a transformer "
            "block where experts could be put beside it."
        )
    return found


OF_NETWORKS = ("ffn", "ffn_linear", "gate", "down", "intermediate", "activation")

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
