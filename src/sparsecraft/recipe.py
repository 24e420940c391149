"""A recipe: a published method as pure data (which edits, experts and router, and what trains).

Nothing here imports torch; a recipe is written to JSON and read back field by field, and an
unknown field is an error.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from sparsecraft.errors import RecipeError, did_you_mean
from sparsecraft.gating import RouterSpec, check_selection, check_split
from sparsecraft.specs import (
    PLACES,
    AdapterSpec,
    AttentionSpec,
    BucketSpec,
    ExpansionSpec,
    ExpertsSpec,
    FFNLoRASpec,
    FFNSpec,
    FitSpec,
    LoRASpec,
    SplitSpec,
    VectorSpec,
    check_whole,
)
from sparsecraft.typed import parse, read

__all__ = [
    "AdapterSpec",
    "AttentionSpec",
    "BucketSpec",
    "Edit",
    "ExpansionSpec",
    "FFNLoRASpec",
    "FFNSpec",
    "FitSpec",
    "LoRASpec",
    "Recipe",
    "RouterSpec",
    "SplitSpec",
    "Stage",
    "VectorSpec",
    "check_variant",
    "facts",
    "from_json",
    "override",
    "router_words",
    "to_json",
]

VERSION = "0.1.0"
FORMAT_VERSION = 1

Place = Literal["replace", "beside", "after", "before", "inside", "imitate"]

SiteKind = Literal[
    "ffn",
    "attention",
    "linear",
    "attention_linear",
    "ffn_linear",
    "query",
    "key",
    "value",
    "output",
    "gate",
    "down",
    "intermediate",
    "activation",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """Put one MoE layer at every matching site of the model."""

    site: SiteKind = "ffn"
    """Every feed-forward network (`ffn`) or attention (`attention`); every Linear/Conv1D of
    attention and feed-forward (`linear`), or of one of them; one projection of every attention
    (`query`, `key`, `value`, `output`); or a part of every feed-forward network: `gate`, the
    projection that the activation follows; `down`; the `activation`; and `intermediate`, what the
    down projection reads, at the last module whose input is still that of the network."""
    paths: str = "*"
    """Glob over the sites' module paths, such as `model.layers.1?.mlp`."""
    place: Place = "replace"
    experts: ExpertsSpec
    router: RouterSpec | None = None
    modality: Literal["text", "visual"] | None = None
    """Act on the tokens of one modality only, as `mm_token_type_ids` tells them (0 is text)."""

    def __post_init__(self) -> None:
        experts, router = self.experts, self.router
        hints = typing.get_type_hints(Edit)
        for name in ("site", "paths", "place", "modality"):
            read(hints[name], getattr(self, name), name)
        read(type(experts), dataclasses.asdict(experts), "experts")
        if router is not None:
            read(RouterSpec, dataclasses.asdict(router), "router")
        check_whole("num_experts", experts.num_experts)
        _check_place(self)
        if router is None:
            if experts.num_experts != 1:
                raise RecipeError(
                    f"{experts.num_experts} {experts.kind} experts have no router; "
                    "only a single expert can do without one."
                )
            return
        if not 0 < router.temperature < math.inf:
            raise RecipeError(f"router.temperature is {router.temperature}; it must be positive.")
        if not 0 <= router.init_std < math.inf:
            raise RecipeError(f"router.init_std is {router.init_std}; it must not be negative.")
        check_split(router)
        check_selection(router, experts.num_experts)
        if router.splits != (experts.kind == "split"):
            raise RecipeError(
                f"router.weighting is {router.weighting!r} with {experts.kind} experts; split "
                "experts are summed as they are (one, scaled, straight_through, score, gain), "
                "all others mixed by the softmax."
            )
        if router.decides == "head" and (
            self.site not in ("key", "value") or router.reads != "output"
        ):
            raise RecipeError(
                f"router.decides is 'head' at site {self.site!r}, reading the {router.reads}; only "
                "the outputs of a key or value projection have heads."
            )
        if router.select == "slots" and (self.place != "beside" or router.decides != "token"):
            raise RecipeError(
                f"router.select is 'slots' with place={self.place!r} and "
                f"decides={router.decides!r}; slots are for experts beside a module, by token."
            )


def _check_place(edit: Edit) -> None:
    """Refuse experts where they make no sense.

    Raises:
        RecipeError: the kind of experts, the place and the site do not go together.
    """
    experts, router = edit.experts, edit.router
    if router and router.gates_base and (edit.place, edit.site) != ("beside", "ffn"):
        raise RecipeError(
            f"router.gates_base is True with place={edit.place!r} at site {edit.site!r}; only a "
            "feed-forward network that experts stand beside can be gated."
        )
    places = PLACES.get(experts.kind, ("replace", "beside", "after", "before"))
    if edit.place not in places:
        raise RecipeError(
            f"{experts.kind} experts cannot stand {edit.place} a module; they stand "
            f"{' or '.join(places)} it."
        )
    if (edit.site == "attention") != (experts.kind == "attention"):
        raise RecipeError(
            f"{experts.kind} experts cannot stand at site {edit.site!r}; attention experts "
            "replace an attention, and nothing else does."
        )
    if edit.place == "imitate" and "linear" not in edit.site:
        raise RecipeError(
            f"A network cannot imitate site {edit.site!r}; it imitates a linear, "
            "attention_linear or ffn_linear."
        )
    if edit.modality and edit.place != "beside":
        raise RecipeError(
            f"modality={edit.modality!r} with place={edit.place!r}: only experts beside a "
            "module can leave tokens out."
        )
    if experts.kind == "attention" and (router is None or router.decides != "token"):
        raise RecipeError("Attention experts need a router that decides by token.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One training phase: what moves, under which losses, with the paper's hyperparameters."""

    name: str = "train"
    trains: tuple[str, ...] = ("experts", "router")
    """`experts`, `router`, `others` (all but those two), `model` (all but the routers), `all`, or
    globs over parameter names."""
    losses: dict[str, float] = field(default_factory=dict)
    """Name in `sparsecraft.losses.LOSSES` -> coefficient."""
    loss_schedule: Literal["constant", "linear", "linear_warmup"] = "constant"
    """Of the coefficients: from zero to their value at the end of the stage, or at its middle."""
    runs: Literal["sparse", "every", "soft"] = "sparse"
    """Experts of split networks in this stage: the selected ones; every one with weight one, which
    is the dense function; or every one, weighted by its score."""
    activation: Literal["relu"] | None = None
    """Put this activation into split networks when the stage begins."""
    fit: FitSpec | None = None
    """Fit the routers of split networks to captured inputs instead of training by gradient."""
    buckets: BucketSpec | None = None
    """Train on rows that are dealt out to the experts first (causal models)."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """Adafactor with steps relative to a parameter's size, as T5X has it: 3e-4 moves ones by 3e-4
    and a router of standard deviation 0.02 by 6e-6."""
    learning_rate: float = 2e-4
    router_learning_rate: float | None = None
    """None: the same as `learning_rate`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: float = 0.03
    warmup_steps: int = 0
    """Overrides `warmup_ratio` when positive."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """0: no clipping."""
    batch_size: int = 128
    """Sequences per optimizer step."""
    max_length: int = 2048
    """Tokens per sequence."""
    epochs: float | None = None
    """Passes over the stage's rows, unless steps or epochs are asked for; None is one."""

    def __post_init__(self) -> None:
        if not self.trains:
            raise RecipeError("The stage trains nothing; name experts, router, all or globs.")
        if self.fit is not None and self.buckets is not None:
            raise RecipeError(f"Stage {self.name!r} has fit and buckets; choose one of them.")
        for name in ("batch_size", "max_length"):
            check_whole(name, getattr(self, name))
        if not 0 <= self.weight_decay < math.inf:
            raise RecipeError(f"weight_decay is {self.weight_decay}; it must not be negative.")
        if not 0 <= self.max_grad_norm < math.inf:
            raise RecipeError(f"max_grad_norm is {self.max_grad_norm}; it must not be negative.")
        for name in ("learning_rate", "router_learning_rate", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RecipeError(f"{name} is {value}; it must be positive.")
        if not (0 <= self.warmup_ratio <= 1 and self.warmup_steps >= 0):
            raise RecipeError(
                f"warmup_ratio is {self.warmup_ratio} and warmup_steps {self.warmup_steps}; the "
                "ratio must lie between 0 and 1, the steps must not be negative."
            )
        for name, coefficient in self.losses.items():
            if not 0 <= coefficient < math.inf:
                raise RecipeError(f"losses.{name} is {coefficient}; it must be a number from 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A method: edits of the model and stages of training."""

    name: str
    title: str
    paper: str
    """Where the method was published."""
    variant: str = "paper"
    exact_at_start: bool
    """The claim that the converted model computes the dense model's function."""
    base_quantization: Literal["nf4"] | None = None
    others: Literal["base", "mean"] = "base"
    """Where experts come from several dense models: what all other tensors are, those of the
    model that is converted, or the mean of the sources'. The network beside which experts stand
    is the converted model's own."""
    expansion: ExpansionSpec | None = None
    """How several dense models give more experts than they are; None: each gives as many."""
    edits: tuple[Edit, ...]
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.edits or not self.stages:
            missing = "stages" if self.edits else "edits"
            raise RecipeError(f"Recipe {self.name!r} has no {missing}; at least one is needed.")
        if self.expansion is not None:
            read(ExpansionSpec, dataclasses.asdict(self.expansion), "expansion")
        routers = [edit.router for edit in self.edits if edit.router]
        encoders = {(r.encoder, r.sentence_dim) for r in routers if r.decides == "sentence"}
        if len(encoders) > 1:
            raise RecipeError(
                f"The routers of recipe {self.name!r} read sentences by several encoders, "
                f"{sorted(encoders)}; give them all the same encoder and sentence_dim."
            )


def check_variant(variant: str, known: tuple[str, ...]) -> None:
    """Refuse a variant that a recipe does not have, naming the nearest."""
    if variant not in known:
        raise RecipeError(f"Unknown variant {variant!r}." + did_you_mean(variant, known))


def router_words(router: RouterSpec) -> str:
    """A router in a few words, for tables."""
    scorer = router.scorer if router.decides == "token" else f"{router.scorer} by {router.decides}"
    if router.threshold is not None:
        return f"{scorer}, {router.select} {router.threshold:g}"
    if router.select != "top_k":
        return f"{scorer}, {router.select}"
    if router.splits:
        shared = f" beside {router.shared} shared" if router.shared else ""
        return f"{scorer}, top-{router.top_k}{shared}"
    return f"{scorer}, top-{router.top_k}{' renormalized' if router.renormalize else ''}"


def facts(recipe: Recipe) -> dict[str, str]:
    """What distinguishes a recipe from another, in a few words each."""
    edits = recipe.edits
    return {
        "paper": recipe.paper,
        "placement": _once(f"{e.place} {e.site}" for e in edits),
        "experts": _once(f"{e.experts.num_experts} {e.experts.kind}" for e in edits),
        "router": _once(router_words(e.router) for e in edits if e.router) or "none",
        "exact_at_start": "yes" if recipe.exact_at_start else "no",
    }


def _once(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON data, `format_version` first."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(recipe)}


def from_json(data: dict[str, Any]) -> Recipe:
    """The recipe that `to_json` wrote.

    Raises:
        RecipeError: a newer format, an unknown or missing field, or a value of the wrong type.
    """
    data = dict(data)
    version = data.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise RecipeError(
            f"The recipe has format_version {version!r} and this sparsecraft reads "
            f"{FORMAT_VERSION}; upgrade sparsecraft, or convert the model again."
        )
    return read(Recipe, data, "recipe")


def override(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """A copy of `recipe` with some fields changed.

    Args:
        changes: dotted path -> value. A path is the whole way (`edits.0.router.temperature`) or
            its unambiguous end (`router.temperature`). Text is parsed by the field's type.

    Raises:
        RecipeError: no field, or more than one, has that path; or the value does not fit.
    """
    leaves, data = _leaves(Recipe, recipe), dataclasses.asdict(recipe)
    for path, value in changes.items():
        found = [leaf for leaf in leaves if leaf.endswith("." + path)]
        if path in leaves:
            found = [path]
        if not found:
            names = {leaf.rpartition(".")[2] for leaf in leaves}
            raise RecipeError(
                f"Recipe {recipe.name!r} has no field {path!r}."
                + did_you_mean(path.rpartition(".")[2], names)
            )
        if len(found) > 1:
            raise RecipeError(f"{path!r} is ambiguous: say one of {', '.join(found)}.")
        *parents, last = found[0].split(".")
        node = data
        for key in parents:
            node = node[int(key)] if isinstance(node, tuple) else node[key]
        node[last] = parse(leaves[found[0]], value) if isinstance(value, str) else value
    # Checked once, when all changes are made: `select` and `top_k` can only change together.
    return read(Recipe, data, "recipe")


def _leaves(hint: Any, value: Any) -> dict[str, Any]:
    """Dotted path -> type of every field below `value` that holds no dataclass."""
    leaves: dict[str, Any] = {}
    for key, child_hint, child in _children(hint, value):
        below = _leaves(child_hint, child)
        leaves |= {f"{key}.{k}": h for k, h in below.items()}
        if not below or isinstance(child, dict):
            leaves[key] = child_hint
    return leaves


def _children(hint: Any, value: Any) -> list[tuple[str, Any, Any]]:
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        return [(f.name, hints[f.name], getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, dict) and value:
        return [(key, typing.get_args(hint)[1], child) for key, child in value.items()]
    if isinstance(value, tuple) and any(dataclasses.is_dataclass(v) for v in value):
        item = typing.get_args(hint)[0]
        return [(str(i), item, child) for i, child in enumerate(value)]
    return []
