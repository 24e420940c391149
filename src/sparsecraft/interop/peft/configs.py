"""PEFT configurations: a few fields of a method, and the recipe that they make."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftConfig, PeftType
from peft.utils.constants import DUMMY_TARGET_MODULES

from sparsecraft import recipes
from sparsecraft.checkpoint.adapter import ADAPTER_TYPES, AdapterType
from sparsecraft.errors import RecipeError
from sparsecraft.recipe.formats import from_json, to_json
from sparsecraft.recipe.recipe import Recipe


@dataclass
class SparsecraftConfig(PeftConfig):
    """Any recipe that leaves the dense modules where they are, as a PEFT adapter.

    Args:
        recipe: a `Recipe`, kept as its JSON, so that adapter_config.json says everything.
        modules_to_save: names of further modules that are trained and saved whole, such as a new
            classification head.
        files: in adapter_config.json, digests of what was saved; of no meaning here.

    Raises:
        RecipeError: the recipe replaces dense modules, is another method's, or contradicts a field.
    """

    recipe: Any = None
    modules_to_save: list[str] | None = None
    files: dict[str, Any] | None = None

    TYPE: ClassVar[str] = "SPARSECRAFT"
    target_modules: ClassVar[str] = DUMMY_TARGET_MODULES
    """The recipe says where layers stand; PEFT shall match no module by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type, self.files = PeftType[self.TYPE], None
        recipe = self._made_from_fields() if self.recipe is None else self.recipe
        if isinstance(recipe, Recipe):
            recipe = json.loads(json.dumps(to_json(recipe)))
        self.recipe = recipe
        self.checked_recipe()
        for name, value in self._type.values(from_json(recipe)).items():
            setattr(self, name, value)

    @property
    def _type(self) -> AdapterType:
        return ADAPTER_TYPES[self.TYPE]

    def checked_recipe(self) -> Recipe:
        """The recipe, after a check that the fields still say the same."""
        recipe = from_json(self.recipe)
        if reason := why_no_adapter(recipe):
            raise RecipeError(f"Recipe {recipe.name!r} cannot be a PEFT adapter: {reason}")
        if self._type.method not in (None, recipe.name):
            raise RecipeError(
                f"{type(self).__name__} holds recipe {self._type.method!r}, and was given "
                f"{recipe.name!r}; use {_holder(recipe).__name__}(recipe=...)."
            )
        self._check_fields(recipe)
        return recipe

    def _check_fields(self, recipe: Recipe) -> None:
        try:
            self._type.check_fields(recipe, vars(self))
        except RecipeError as error:
            raise RecipeError(f"{type(self).__name__}: {error}") from None

    def _made_from_fields(self) -> Recipe:
        if self._type.method is None:
            raise RecipeError(
                "SparsecraftConfig needs a recipe, such as recipe=sc.recipes.camel(lora_rank=8)."
            )
        given = {argument: getattr(self, name) for name, (argument, _) in self._type.fields.items()}
        given = {argument: value for argument, value in given.items() if value is not None}
        return getattr(recipes, self._type.method)(**given)


@dataclass
class PescConfig(SparsecraftConfig):
    """PESC: the top-k of E adapters after every feed-forward network (`sc.recipes.camelidae`).

    What is not given is as in the recipe, but for LoRA. A whole number may be a list, one for each
    layer.

    Args:
        num_experts: adapters per feed-forward network.
        top_k: adapters per token.
        adapter_dim: bottleneck width.
        lora_r: rank of a LoRA on every Linear, as in Camelidae; none unless given.
        lora_alpha: LoRA's alpha.
        adapter_scale: factor on the adapters' outputs.
        dropout: on the inputs of adapters and LoRA, in training.
        paths: glob over the paths of the feed-forward networks.
    """

    num_experts: int | list[int] | None = None
    top_k: int | list[int] | None = None
    adapter_dim: int | list[int] | None = None
    lora_r: int | list[int] | None = None
    lora_alpha: float | None = None
    adapter_scale: float | None = None
    dropout: float | None = None
    paths: str | None = None

    TYPE: ClassVar[str] = "PESC"

    def __post_init__(self) -> None:
        if self.recipe is None and self.lora_r is None:
            self.lora_r = 0
        super().__post_init__()

    def _check_fields(self, recipe: Recipe) -> None:
        if self.lora_alpha and not self.lora_r and len(recipe.edits) == 1:
            raise RecipeError(
                f"PescConfig has lora_alpha={self.lora_alpha!r} and no LoRA to scale: lora_alpha "
                "needs lora_r; give both, or neither."
            )
        super()._check_fields(recipe)


@dataclass
class MovConfig(SparsecraftConfig):
    """MoV: mixtures of E vectors on keys, values and feed-forward activations (`sc.recipes.mov`).

    What is not given is as in the recipe. A whole number may be a list, one for each layer.

    Args:
        num_experts: vectors at each site.
        top_k: vectors per token; all of them, softly, unless given.
        variant: `paper`, `released` or `tuned`.
        paths: glob over the paths of the scaled modules.
    """

    num_experts: int | list[int] | None = None
    top_k: int | list[int] | None = None
    variant: str | None = None
    paths: str | None = None

    TYPE: ClassVar[str] = "MOV"


@dataclass
class MoloraConfig(SparsecraftConfig):
    """MoLORA: a mixture of E LoRAs on every Linear (`sc.recipes.molora`).

    What is not given is as in the recipe. A whole number may be a list, one for each layer.

    Args:
        num_experts: LoRAs at each Linear.
        r: rank of each.
        lora_alpha: updates are scaled by lora_alpha / r.
        top_k: LoRAs per token; all of them, softly, unless given.
        variant: `paper`, `released` or `tuned`.
        dropout: on the updates' input, in training.
        paths: glob over the paths of the Linears.
    """

    num_experts: int | list[int] | None = None
    r: int | list[int] | None = None
    lora_alpha: float | None = None
    top_k: int | list[int] | None = None
    variant: str | None = None
    dropout: float | None = None
    paths: str | None = None

    TYPE: ClassVar[str] = "MOLORA"


CONFIGS = (SparsecraftConfig, PescConfig, MovConfig, MoloraConfig)


def config_of(recipe: Recipe) -> SparsecraftConfig:
    """The configuration of a recipe, of its method's own type if it has one."""
    return _holder(recipe)(recipe=recipe)


def _holder(recipe: Recipe) -> type[SparsecraftConfig]:
    own = {ADAPTER_TYPES[config_class.TYPE].method: config_class for config_class in CONFIGS}
    return own.get(recipe.name, SparsecraftConfig)


def why_no_adapter(recipe: Recipe) -> str | None:
    """Why a recipe cannot be a PEFT adapter; None if it can."""
    for edit in recipe.edits:
        if edit.experts.parts:
            what = "splits" if edit.replaces else "imitates"
            return (
                f"it {what} the {edit.site} of a dense model, and an adapter only adds to a base "
                "that stays."
            )
        if edit.replaces or edit.experts.dense_weights:
            return (
                f"its {edit.experts.kind!r} experts ({edit.place} the {edit.site}) have "
                "dense weights of their own, and an adapter only adds to a base that stays."
            )
    return None
