"""Edit: one MoE layer at every matching site of a model."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.experts import ExpertsSpec
from sparsecraft.recipe.numbers import check_whole
from sparsecraft.recipe.routers import RouterSpec, check_selection, check_split
from sparsecraft.recipe.typed import read

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
        if router.splits != experts.parts:
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

    # What a place means, for those who ask; what a layer computes there, `sparsecraft.moe.places`.

    @property
    def replaces(self) -> bool:
        """The dense module goes away."""
        return self.place == "replace"

    @property
    def adds(self) -> bool:
        """The experts add to what the dense module gives."""
        return self.place == "beside"

    @property
    def changes_input(self) -> bool:
        """The experts change what the dense module reads."""
        return self.place == "before"

    @property
    def opens(self) -> bool:
        """The experts work between the dense module's own parts."""
        return self.place == "inside"


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
    if edit.place not in experts.places:
        raise RecipeError(
            f"{experts.kind} experts cannot stand {edit.place} a module; they stand "
            f"{' or '.join(experts.places)} it."
        )
    if (edit.site == "attention") != ("attention" in experts.places[edit.place]):
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
    if edit.site == "attention" and (router is None or router.decides != "token"):
        raise RecipeError("Attention experts need a router that decides by token.")
