"""Recipe: a published method as data, edits of the model and stages of training."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, replace
from typing import Literal

from sparsecraft.errors import RecipeError, did_you_mean
from sparsecraft.recipe.edits import Edit
from sparsecraft.recipe.kinds import add_kind, family
from sparsecraft.recipe.numbers import is_number
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.stages import Fit, Stage
from sparsecraft.recipe.typed import check_types


@family
class Backbone(ABC):
    """What is done to the dense model's own weights before anything stands on them."""

    __slots__ = ()
    kind: str


@dataclass(frozen=True, slots=True)
class Quantize(Backbone):
    """They are packed into 4 bits each (QLoRA), or 8, by bitsandbytes, and stay as they are."""

    kind: Literal["nf4", "fp4", "int8"] = "nf4"

    def __post_init__(self) -> None:
        check_types(self)


add_kind(Quantize)


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
    backbone: Backbone | None = None
    """What is done to the dense model's own weights before; None: nothing."""
    others: Literal["base", "mean"] = "base"
    """Where experts come from several dense models: what all other tensors are, those of the
    model that is converted, or the mean of the sources'. The network beside which experts stand
    is the converted model's own."""
    expansion: ExpansionSpec | None = None
    """How several dense models give more experts than they are; None: each gives as many."""
    edits: tuple[Edit, ...]
    stages: tuple[Stage | Fit, ...]

    def __post_init__(self) -> None:
        if not self.edits or not self.stages:
            missing = "stages" if self.edits else "edits"
            raise RecipeError(f"Recipe {self.name!r} has no {missing}; at least one is needed.")
        check_types(self)
        for stage in self.stages:
            if stage.router is not None:
                self.with_router_of(stage)
        for stage in self.stages:
            _check_relu(self, stage)
        encoders = {e.router.sentences for e in self.edits if e.router} - {None}
        if len(encoders) > 1:
            raise RecipeError(
                f"The routers of recipe {self.name!r} read sentences by several encoders, "
                f"{sorted((s.encoder, s.dim) for s in encoders)}; give them all the same "
                "decides=Sentence(encoder, dim)."
            )

    def with_router_of(self, stage: Stage) -> Recipe:
        """What a model's recipe is once a stage has put in its router: that router, and the stage
        itself with what comes after it.

        Raises:
            RecipeError: no edit has a router of whole experts, or it does not fit there.
        """
        routed = [edit.router is not None and not edit.router.splits for edit in self.edits]
        if not any(routed):
            raise RecipeError(
                f"Stage {stage.name!r} of recipe {self.name!r} puts in a router, and no edit has "
                "one of whole experts whose place it could take."
            )
        edits = tuple(
            _with_router(edit, stage.router) if has else edit
            for edit, has in zip(self.edits, routed, strict=True)
        )
        later = [s.name for s in self.stages].index(stage.name) + 1
        stages = (replace(stage, router=None), *self.stages[later:])
        exact = self.exact_at_start and stage.router.sums_to_one
        exact = exact and not any(edit.experts.parted for edit in edits)
        return replace(self, edits=edits, stages=stages, exact_at_start=exact)

    @property
    def layers(self) -> tuple[Edit, ...]:
        """Every edit as it is in each layer; see `Edit.layers`."""
        return tuple(layer for edit in self.edits for layer in edit.layers)

    @property
    def quantization(self) -> str | None:
        """How the weights of the dense model are packed: `nf4`, `fp4`, `int8`, or None."""
        return self.backbone.kind if isinstance(self.backbone, Quantize) else None


def _check_relu(recipe: Recipe, stage: Stage | Fit) -> None:
    """Refuse to train routers that select by ReLU without the loss that keeps them sparse.

    Raises:
        RecipeError: so it is.
    """
    routers = [edit.router for edit in recipe.edits if edit.router and not edit.router.splits]
    relu = any(router.select.wanted is not None for router in routers)
    if relu and isinstance(stage, Stage) and stage.router is None and "remoe" not in stage.losses:
        raise RecipeError(
            f"router.select is 'relu' and stage {stage.name!r} of recipe {recipe.name!r} has no "
            "loss 'remoe', without which nothing keeps experts from running; give "
            "losses={'remoe': 1.0} (--set losses=remoe=1)."
        )


def _with_router(edit: Edit, router: RouterSpec) -> Edit:
    """The edit with another router, which has no numbers by layer."""
    by_layer = tuple(by for by in edit.by_layer if not by.field.startswith("router."))
    return replace(edit, router=router, by_layer=by_layer)


def check_variant(variant: str, known: tuple[str, ...]) -> None:
    """Refuse a variant that a recipe does not have, naming the nearest."""
    if variant not in known:
        raise RecipeError(f"Unknown variant {variant!r}." + did_you_mean(variant, known))


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpansionSpec:
    """Experts beyond the sources, each mixed from two (UpIT):
    see `sparsecraft.conversion.sources.expansion`."""

    parents: Literal["least_similar", "random"] = "least_similar"
    """The two whose changes to the base have the lowest cosine, or any two; those that were mixed
    before are among them."""
    drop: float = 0.5
    """Share of each parent's changes that is dropped; what stays is divided by 1 - drop (DARE)."""

    def __post_init__(self) -> None:
        check_types(self)
        if not (is_number(self.drop) and 0 <= self.drop < 1):
            raise RecipeError(f"drop is {self.drop!r}; it must be at least 0 and less than 1.")
