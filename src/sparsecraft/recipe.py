"""A recipe: a published method as pure data (which edits, experts and router, and what trains).

Nothing here imports torch; a recipe is written to JSON and read back field by field, and an
unknown field is an error.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from sparsecraft.errors import RecipeError, did_you_mean

FORMAT_VERSION = 1

Place = Literal["replace", "beside", "after", "before"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSpec:
    """A scorer of tokens and a selection rule. All of it is computed in float32."""

    scorer: Literal["linear"] = "linear"
    select: Literal["top_k", "soft"] = "top_k"
    top_k: int | None = 2
    """Experts per token; None only with `soft`, which uses all of them."""
    renormalize: bool = True
    """Whether the k kept weights are scaled to sum to one."""
    temperature: float = 1.0
    """Divides the logits."""
    reads: Literal["input", "output"] = "input"
    """The layer's input, or the output of the dense module it stands on."""
    init: Literal["kaiming_uniform", "normal", "zeros"] = "kaiming_uniform"
    init_std: float = 0.02
    """Standard deviation of `init="normal"`; unused otherwise."""

    @property
    def sums_to_one(self) -> bool:
        return self.select == "soft" or self.renormalize


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNSpec:
    """Full feed-forward experts made from the dense one."""

    kind: Literal["ffn"] = "ffn"
    num_experts: int = 8
    init: Literal["copy"] = "copy"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """Bottleneck adapters, x + scale * up(activation(down(x))), `up` zero at the start."""

    kind: Literal["adapter"] = "adapter"
    num_experts: int = 8
    dim: int = 512
    """Bottleneck width."""
    activation: str = "gelu"
    dropout: float = 0.1
    """On the adapter's input, in training."""
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_adapter("dim", self.dim, self.dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRASpec:
    """Low-rank updates, (alpha / rank) * B A x, B zero at the start."""

    kind: Literal["lora"] = "lora"
    num_experts: int = 1
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    """On the update's input, in training."""

    def __post_init__(self) -> None:
        _check_adapter("rank", self.rank, self.dropout)


def _check_whole(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise RecipeError(f"{name} is {value!r}; it must be a whole number from 1.")


def _check_adapter(name: str, width: int, dropout: float) -> None:
    _check_whole(name, width)
    if not 0 <= dropout < 1:
        raise RecipeError(f"dropout is {dropout}; it must be at least 0 and less than 1.")


ExpertsSpec = FFNSpec | AdapterSpec | LoRASpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """Put one MoE layer at every matching site of the model."""

    site: Literal["ffn", "linear"] = "ffn"
    """Every feed-forward network, or every Linear/Conv1D of attention and feed-forward."""
    paths: str = "*"
    """Glob over the sites' module paths, such as `model.layers.1?.mlp`."""
    place: Place = "replace"
    experts: ExpertsSpec
    router: RouterSpec | None = None

    def __post_init__(self) -> None:
        experts, router = self.experts, self.router
        _check_whole("num_experts", experts.num_experts)
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
        if (router.select == "soft") != (router.top_k is None):
            raise RecipeError(
                f"router.select is {router.select!r} with top_k={router.top_k}: "
                "soft selection takes top_k=None, top_k selection takes a number."
            )
        if router.top_k is not None and not 1 <= router.top_k <= experts.num_experts:
            raise RecipeError(
                f"top_k is {router.top_k} with num_experts={experts.num_experts}; "
                "it must lie between 1 and num_experts."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One training phase: what moves, under which losses, with the paper's hyperparameters."""

    name: str = "train"
    trains: tuple[str, ...] = ("experts", "router")
    """`experts`, `router`, `all`, or globs over parameter names."""
    losses: dict[str, float] = field(default_factory=dict)
    """Name in `sparsecraft.losses.LOSSES` -> coefficient."""
    learning_rate: float = 2e-4
    router_learning_rate: float | None = None
    """None: the same as `learning_rate`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: float = 0.03
    warmup_steps: int = 0
    """Overrides `warmup_ratio` when positive."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 128
    """Sequences per optimizer step."""
    max_length: int = 2048
    """Tokens per sequence."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length"):
            _check_whole(name, getattr(self, name))
        for name in ("learning_rate", "router_learning_rate", "max_grad_norm"):
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
    edits: tuple[Edit, ...]
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.edits or not self.stages:
            missing = "stages" if self.edits else "edits"
            raise RecipeError(f"Recipe {self.name!r} has no {missing}; at least one is needed.")


def router_words(router: RouterSpec) -> str:
    """A router in a few words, for tables."""
    if router.select == "soft":
        return f"{router.scorer}, soft"
    return f"{router.scorer}, top-{router.top_k}{' renormalized' if router.renormalize else ''}"


def facts(recipe: Recipe) -> dict[str, str]:
    """What distinguishes a recipe from another, in a few words each."""
    edits = recipe.edits
    return {
        "paper": recipe.paper,
        "placement": ", ".join(f"{e.place} {e.site}" for e in edits),
        "experts": ", ".join(f"{e.experts.num_experts} {e.experts.kind}" for e in edits),
        "router": ", ".join(router_words(e.router) for e in edits if e.router) or "none",
        "exact_at_start": "yes" if recipe.exact_at_start else "no",
    }


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
    return _read(Recipe, data, "recipe")


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
        node[last] = _parse(leaves[found[0]], value) if isinstance(value, str) else value
    # Checked once, when all changes are made: `select` and `top_k` can only change together.
    return _read(Recipe, data, "recipe")


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


def _options(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _parse(hint: Any, text: str) -> Any:
    """Text from a command line -> a plain value of the field's type, or the text itself."""
    for option in _options(hint):
        if option is type(None) and text.lower() == "none":
            return None
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
        if typing.get_origin(option) is tuple:
            return tuple(text.split(","))
        if typing.get_origin(option) is dict:
            pairs = (pair.partition("=") for pair in text.split(",") if pair)
            return {k: _parse(typing.get_args(option)[1], v) for k, _, v in pairs}
    return text


def _read(hint: Any, value: Any, path: str) -> Any:
    """Check `value` against the type `hint`, building the dataclasses on the way."""
    options = _options(hint)
    specs = [o for o in options if dataclasses.is_dataclass(o)]
    if specs and (isinstance(value, dict) or dataclasses.is_dataclass(value)):
        return value if dataclasses.is_dataclass(value) else _read_spec(specs, value, path)
    for option in options:
        origin, args = typing.get_origin(option), typing.get_args(option)
        if origin is Literal and value in args:
            return value
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(_read(args[0], v, f"{path}.{i}") for i, v in enumerate(value))
        if origin is dict and isinstance(value, dict):
            return {key: _read(args[1], v, f"{path}.{key}") for key, v in value.items()}
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and origin is None and type(value) is option:
            return value
    wanted = " or ".join(
        " or ".join(map(repr, typing.get_args(o)))
        if typing.get_origin(o) is Literal
        else getattr(o, "__name__", str(o))
        for o in options
    )
    raise RecipeError(f"{path} is {value!r}; it must be {wanted}.")


def _read_spec(specs: list[type], data: dict[str, Any], path: str) -> Any:
    if len(specs) > 1:
        kinds = {typing.get_type_hints(s)["kind"].__args__[0]: s for s in specs}
        if data.get("kind") not in kinds:
            raise RecipeError(
                f"{path}.kind is {data.get('kind')!r}." + did_you_mean(str(data.get("kind")), kinds)
            )
        specs = [kinds[data["kind"]]]
    hints = typing.get_type_hints(specs[0])
    for key in data:
        if key not in hints:
            raise RecipeError(f"{path} has no field {key!r}." + did_you_mean(key, hints))
    values = {key: _read(hints[key], value, f"{path}.{key}") for key, value in data.items()}
    try:
        return specs[0](**values)
    except TypeError as error:
        raise RecipeError(f"{path} is incomplete: {error}.") from None
