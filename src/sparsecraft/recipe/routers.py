"""What a router is made of, as pure data. Torch-free.

`RouterSpec` is of whole experts, `GateSpec` of the parts of one split network. What they are made
of are small types of their own: `sparsecraft.recipe.scorers` and `sparsecraft.recipe.selections`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.scorers import Linear, LinearParts, PartScorerSpec, ScorerSpec
from sparsecraft.recipe.selections import (
    Decides,
    Head,
    Rule,
    Selection,
    Sentence,
    Sequence,
    Token,
    TopK,
)
from sparsecraft.recipe.typed import check_types


class AnyRouterSpec(ABC):
    """What may be asked of a router, of whole experts or of parts; the answers are those of parts.

    Attributes:
        reads: the layer's `input`, the `output` of its dense module, or what its `experts` give.
        splits: it routes the parts of one split network, whose sum is the dense function.
        sums_to_one: the weights of every token sum to one.
        slots: experts that a token meets; None where that depends on the token, or is all of them.
        mixes_tokens: experts work on means of several tokens.
        by_token: a token's input is all that a decision depends on.
        by_head: a decision is for a head of a token.
        by_sequence: one decision is for all tokens of a sequence, or of a sentence.
        sentences: what embeds the sentences that it decides for; None if it decides for none.
        can_be_directed: a batch may say which expert each token goes to.
        starts_from: what `convert` must be given for its start; see `Start.reads`.
        of_domains: the rows of its experts are made from embeddings of their domains.
        gates_base: the dense module is multiplied by a gate of its own.
        through: its gradient passes by experts that a token does not go to.
        limited: in training an expert takes a limited number of tokens.
        may_be_empty: a token may be left without experts.
        reads_previous: it reads the logits of the layer before.
    """

    __slots__ = ()
    kind: str
    balanced: bool
    reads: str = "input"
    splits: ClassVar[bool] = True
    sums_to_one: bool = False
    slots: int | None = None
    mixes_tokens: bool = False
    by_token: bool = True
    by_head: bool = False
    by_sequence: bool = False
    sentences: Sentence | None = None
    can_be_directed: bool = False
    gates_base: bool = False
    through: bool = False
    limited: bool = False
    may_be_empty: bool = False
    reads_previous: bool = False
    starts_from: Literal["domains", "data"] | None = None
    of_domains: bool = False

    @abstractmethod
    def check(self, num_experts: int) -> None:
        """Refuse a number of experts that it cannot choose among.

        Raises:
            RecipeError: so it is.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSpec(AnyRouterSpec):
    """A scorer of tokens and a selection of whole experts. All of it is computed in float32."""

    kind: Literal["router"] = "router"
    scorer: ScorerSpec = Linear()
    select: Selection = TopK(2)
    reads: Literal["input", "output", "experts"] = "input"
    """The layer's input, the output of the dense module it stands on, or what every expert gives
    for the token (all of them run)."""
    decides: Decides = Token()
    standardize: float | None = None
    """Before that, the logits of each token are brought to mean zero over the experts and to this
    standard deviation (the gating logit normalization of Skywork-MoE, Wei et al. 2024, Eq. 4-5,
    whose lambda it is); None leaves them."""
    temperature: float = 1.0
    """Divides the logits."""
    gates_base: bool = False
    """The dense network that experts stand beside is multiplied by the sigmoid of a learned row
    (Qwen2-MoE's shared expert)."""
    balanced: bool = True
    """Whether the losses on routings count this router."""
    splits = False

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.temperature < math.inf:
            raise RecipeError(f"router.temperature is {self.temperature}; it must be positive.")
        if self.standardize is not None and not 0 < self.standardize < math.inf:
            raise RecipeError(
                f"router.standardize is {self.standardize}; it must be positive, such as 1."
            )
        if self.through and (self.reads == "experts" or self.by_head):
            raise RecipeError(
                f"router.select.through is True with reads={self.reads!r} and "
                f"decides={self.decides.kind!r}; it is for routers by token or sequence, where "
                "not all experts run as it is."
            )
        if self.starts_from and not self.by_token:
            raise RecipeError(
                f"router.scorer starts from {self.starts_from} with decides="
                f"{self.decides.kind!r} and reads={self.reads!r}; it is for routers by token that "
                "read the layer's input."
            )
        if self.reads_previous and not self.by_token:
            raise RecipeError(
                f"router.scorer is {self.scorer.kind!r}, which goes on from the layer before, with "
                f"decides={self.decides.kind!r} and reads={self.reads!r}; it is for "
                "routers by token that read the layer's input."
            )
        if isinstance(self.decides, Sentence) and getattr(self.scorer, "encoder", "") == "self":
            raise RecipeError(
                "router.scorer.encoder is 'self' with decides='sentence'; the model itself embeds "
                "no sentences, so that their embeddings would be another encoder's."
            )
        if (self.reads == "experts") != self.scorer.reads_experts:
            raise RecipeError(
                f"router.reads is {self.reads!r} with a {self.scorer.kind} scorer, which reads "
                f"{'what experts give' if self.scorer.reads_experts else 'tokens alone'}."
            )
        plain = isinstance(self.decides, Token) and not self.select.mixes_tokens
        if self.reads == "experts" and not plain:
            raise RecipeError(
                f"router.reads is 'experts' with decides={self.decides.kind!r} and "
                f"select={self.select.kind!r}; what experts give is read by "
                "token, and not by slots."
            )

    @property
    def through(self) -> bool:
        return self.select.through

    @property
    def limited(self) -> bool:
        return self.select.capacity is not None

    @property
    def may_be_empty(self) -> bool:
        return self.select.may_be_empty

    @property
    def reads_previous(self) -> bool:
        return self.scorer.reads_previous

    @property
    def sums_to_one(self) -> bool:
        return self.select.sums_to_one

    @property
    def slots(self) -> int | None:
        return None if self.reads == "experts" else self.select.slots

    @property
    def mixes_tokens(self) -> bool:
        return self.select.mixes_tokens

    @property
    def by_token(self) -> bool:
        return isinstance(self.decides, Token) and self.reads == "input"

    @property
    def by_head(self) -> bool:
        return isinstance(self.decides, Head)

    @property
    def by_sequence(self) -> bool:
        return isinstance(self.decides, (Sequence, Sentence))

    @property
    def sentences(self) -> Sentence | None:
        return self.decides if isinstance(self.decides, Sentence) else None

    @property
    def starts_from(self) -> Literal["domains", "data"] | None:
        return self.scorer.reads

    @property
    def of_domains(self) -> bool:
        return self.scorer.of_domains

    @property
    def can_be_directed(self) -> bool:
        return isinstance(self.decides, Token) and not self.mixes_tokens

    def in_layer(self, number: int) -> RouterSpec:
        """What it is in the layer of this number, from 0."""
        return replace(self, select=self.select.in_layer(number))

    def with_extended(self, count: int) -> RouterSpec:
        """The same, of which the last `count` experts were added one at a time."""
        return replace(self, scorer=self.scorer.with_extended(count))

    def check(self, num_experts: int) -> None:
        _check_k(self.select.slots, num_experts)
        self.scorer.check(num_experts)
        if self.standardize is not None and num_experts < 2:
            raise RecipeError(
                f"router.standardize is {self.standardize} with num_experts={num_experts}; one "
                "logit has no standard deviation."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GateSpec(AnyRouterSpec):
    """A scorer of the parts of one split network, a rule, and what a part is multiplied by. All of
    it is computed in float32."""

    kind: Literal["gate"] = "gate"
    scorer: PartScorerSpec = LinearParts()
    select: Rule = TopK(2)
    shared: int = 0
    """Number of experts, the first ones, that run for every token beside the selected ones."""
    squash: Literal["none", "abs", "sigmoid", "softmax"] = "none"
    """Logits -> the scores that the rules by threshold read, and `weighting="score"`."""
    weighting: Literal["one", "scaled", "straight_through", "score", "gain"] = "one"
    """What a selected expert is multiplied by: one; the softmax over the k kept times E / k
    (LLaMA-MoE); one, with the gradient of that softmax (Faster MoEfication); its score; or one plus
    its softmax times a learned gain that starts at zero (CMoE)."""
    target: Literal[
        "mass", "deviation", "squared_deviation", "output_norm", "intermediate_norm"
    ] = "mass"
    """What the scores predict of each expert: sum of |activation|; of its distance to the mean
    (squared, or not); Euclidean norm of what the expert adds, or of its activations."""
    balanced: bool = True
    """Whether the losses on routings count this router."""

    def __post_init__(self) -> None:
        check_types(self)
        if isinstance(self.select, TopK):
            if not self.select.renormalize:
                raise RecipeError(
                    "select.renormalize is False for the parts of a split network, which are not "
                    "mixed by a softmax; leave it out."
                )
            if self.select.through:
                raise RecipeError(
                    "select.through is True for the parts of a split network; give "
                    "weighting='straight_through', or leave it out."
                )
            for name in ("balance", "capacity"):
                if (option := getattr(self.select, name)) is not None:
                    raise RecipeError(
                        f"select.{name} is {option.kind!r} for the parts of a split network, whose "
                        "sum is the dense function; leave it out."
                    )
        elif self.weighting in ("scaled", "straight_through"):
            raise RecipeError(
                f"router.weighting is {self.weighting!r}, which counts on k experts; it needs "
                f"select='top_k', and has {self.select.kind!r}."
            )
        bounded = self.squash in ("sigmoid", "softmax")
        if self.threshold is not None and bounded and self.threshold > 1:
            raise RecipeError(
                f"select.threshold is {self.threshold} on scores by {self.squash}; it must lie "
                "between 0 and 1."
            )
        if self.select.not_negative and self.squash == "none" and not self.scorer.not_negative:
            raise RecipeError(
                f"router.select is {self.select.kind!r} on the logits of a {self.scorer.kind} "
                "scorer, which may be negative; give squash='sigmoid', 'softmax' or 'abs', or "
                "scorer='norm'."
            )

    @property
    def k(self) -> int | None:
        """Experts that are selected, of top-k."""
        return self.select.k if isinstance(self.select, TopK) else None

    @property
    def threshold(self) -> float | None:
        """Of the rules by threshold."""
        return None if isinstance(self.select, TopK) else self.select.threshold

    @property
    def least(self) -> int:
        """Experts that run for every token, however the rule decides."""
        return self.shared + self.select.at_least

    @property
    def slots(self) -> int | None:
        return self.k

    def check(self, num_experts: int) -> None:
        if self.shared and not 0 < self.shared < num_experts:
            raise RecipeError(
                f"router.shared is {self.shared} with num_experts={num_experts}; one expert at "
                "least must be left to select."
            )
        _check_k(self.k, num_experts, self.shared)


def _check_k(k: int | None, num_experts: int, shared: int = 0) -> None:
    if k is not None and not 1 <= k <= num_experts - shared:
        beside = f" and shared={shared}" if shared else ""
        raise RecipeError(
            f"top_k is {k} with num_experts={num_experts}{beside}; it must lie between 1 and "
            f"{'what they leave' if beside else 'num_experts'}."
        )
