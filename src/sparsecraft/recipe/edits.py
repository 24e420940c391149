"""Edit: one MoE layer at every matching site of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.by_layer import ByLayer, check_by_layer, in_layer
from sparsecraft.recipe.experts import ExpertsSpec
from sparsecraft.recipe.numbers import check_whole
from sparsecraft.recipe.routers import GateSpec, RouterSpec
from sparsecraft.recipe.selections import Token
from sparsecraft.recipe.typed import check_types

MOST_EXPERTS = 1_000_000  # of one layer; PEER has as many

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
    """Every feed-forward network (`ffn`) or attention (`attention`); every Linear/Conv1D of the
    transformer blocks (`linear`, see `sparsecraft.dense.linears`), or those of attentions or of
    feed-forward networks alone; one projection of every attention
    (`query`, `key`, `value`, `output`); or a part of every feed-forward network: `gate`, the
    projection that the activation follows; `down`; the `activation`; and `intermediate`, what the
    down projection reads, at the last module whose input is still that of the network."""
    paths: str = "*"
    """Glob over the sites' module paths, such as `model.layers.1?.mlp`."""
    place: Place = "replace"
    experts: ExpertsSpec
    router: RouterSpec | GateSpec | None = None
    modality: Literal["text", "visual"] | None = None
    """Act on the tokens of one modality only, see `mm_token_type_ids` (0 is text)."""
    by_layer: tuple[ByLayer, ...] = ()
    """Numbers that differ from layer to layer; the fields themselves say the first layer's."""

    def __post_init__(self) -> None:
        check_types(self)
        check_types(self.experts)
        if self.by_layer:
            in_order = sorted(self.by_layer, key=lambda by: by.field)
            object.__setattr__(self, "by_layer", tuple(in_order))
            check_by_layer(self)
        experts, router = self.experts, self.router
        check_whole("num_experts", experts.num_experts, MOST_EXPERTS)
        _check_place(self)
        if router is None:
            if experts.num_experts != 1:
                raise RecipeError(
                    f"{experts.num_experts} {experts.kind} experts have no router; "
                    "only a single expert can do without one."
                )
            return
        if router.splits != experts.parts:
            raise RecipeError(
                f"{experts.kind} experts have a {router.kind}: the parts of a split network are "
                "summed as they are, by a GateSpec, and all other experts mixed by the softmax of "
                "a RouterSpec."
            )
        router.check(experts.num_experts)
        _check_reads(self)
        if not router.splits:
            _check_free(self)

    @property
    def layers(self) -> tuple[Edit, ...]:
        """What it is in each layer; one for all of them where its numbers are the same."""
        if not self.by_layer:
            return (self,)
        return tuple(in_layer(self, n) for n in range(len(self.by_layer[0].numbers)))

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
    if edit.site == "attention" and (router is None or not router.can_be_directed):
        raise RecipeError("Attention experts need a router that decides by token.")


def _check_reads(edit: Edit) -> None:
    """Refuse a router that cannot read, where it stands, what it decides by.

    Raises:
        RecipeError: so it is.
    """
    router = edit.router
    if router.by_head and (edit.site not in ("key", "value") or router.reads != "output"):
        raise RecipeError(
            f"router.decides is 'head' at site {edit.site!r}, reading the {router.reads}; only "
            "the outputs of a key or value projection have heads."
        )
    if router.mixes_tokens and (edit.place != "beside" or router.decides != Token()):
        raise RecipeError(
            f"router.select is 'slots' with place={edit.place!r} and "
            f"decides={router.decides.kind!r}; slots are for experts beside a module, by token."
        )
    if router.through and edit.site == "attention":
        raise RecipeError(
            "router.select.through is True at site 'attention'; attention experts read whole "
            "sequences, and run only where they were chosen."
        )
    if router.may_be_empty and edit.site == "attention":
        raise RecipeError(
            f"router.select is {router.select.kind!r}, which may leave a token without experts, at "
            "site 'attention', where each token needs one; leave its capacity out, or select "
            "'top_k'."
        )
    if router.reads == "experts" and (edit.opens or edit.site == "attention"):
        raise RecipeError(
            f"router.reads is 'experts' with place={edit.place!r} at site {edit.site!r}; only "
            "experts that give one output for each token on their own can be read."
        )


def _check_free(edit: Edit) -> None:
    """Refuse what makes no sense with experts that compute nothing, or without them.

    Raises:
        RecipeError: so it is.
    """
    experts, balance = edit.experts, edit.router.select.balance
    if balance is not None and balance.needs_free and not experts.free:
        raise RecipeError(
            f"router.select.balance is {balance.kind!r} with {experts.kind} experts, none of which "
            "computes nothing; it is for those of `moepp`."
        )
    networks = experts.num_experts - experts.free
    if balance is not None and balance.needs_free and (edit.router.slots or 0) > networks:
        raise RecipeError(
            f"top_k is {edit.router.slots} and {networks} of the experts compute anything; while "
            "the others are held back, a token has no other experts: give a lower top_k, or "
            "hold_steps=0."
        )
    if edit.router.through and experts.free:
        raise RecipeError(
            f"router.select.through is True with {experts.kind} experts, whose weights are not "
            "those of the router alone; leave it out."
        )
