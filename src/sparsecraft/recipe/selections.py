"""Which experts a token takes, once they have scores, and for what a router decides. Torch-free."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.balancing import Balance, ByDropRate, BySparsity, Capacity
from sparsecraft.recipe.kinds import add_kind, family
from sparsecraft.recipe.numbers import check_whole
from sparsecraft.recipe.typed import check_types


@family
class Selection(ABC):
    """Which whole experts a token takes, and with which weights.

    Attributes:
        slots: experts of each token; None for all of them.
        sums_to_one: the weights of every token sum to one.
        in_order: every token has all experts, expert e in slot e.
        mixes_tokens: experts work on means of several tokens.
        through: in training the router learns from experts that a token does not take, too.
        balance: what evens out the experts' loads without a loss; None for nothing.
        capacity: how many tokens an expert takes in training; None for all that come.
        coefficient: what the balance losses of its layer are multiplied by; None for one.
        may_be_empty: a token may have fewer experts than slots.
        wanted: experts that a token is to have on the average, where slots do not say it.
    """

    __slots__ = ()
    kind: str
    through: ClassVar[bool] = False
    balance: ClassVar[Balance | None] = None
    capacity: ClassVar[Capacity | None] = None
    coefficient: ClassVar[ByDropRate | BySparsity | None] = None
    may_be_empty: ClassVar[bool] = False
    wanted: ClassVar[int | None] = None
    sums_to_one: ClassVar[bool] = False
    in_order: ClassVar[bool] = True
    mixes_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def slots(self) -> int | None:
        return None

    def in_layer(self, number: int) -> Selection:
        """What it is in the layer of this number, from 0."""
        return self


@family
class Rule(ABC):
    """Which parts of a split network run for a token.

    Attributes:
        not_negative: its scores must not be negative.
        at_least: parts that it always selects.
    """

    __slots__ = ()
    kind: str
    not_negative: ClassVar[bool] = False
    at_least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, slots=True)
class TopK(Selection, Rule):
    """The k experts of the largest scores."""

    kind: Literal["top_k"] = field(default="top_k", kw_only=True)
    k: int = 2
    renormalize: bool = field(default=True, kw_only=True)
    """Whether the k kept weights are scaled to sum to one; of whole experts alone."""
    through: bool = field(default=False, kw_only=True)
    """Whether the gradient of the weights passes straight through the choice, as if a token had
    taken all experts (DenseMixer, Yao et al. 2025): all of them run in training; of whole experts
    alone."""
    balance: Balance | None = field(default=None, kw_only=True)
    """Of whole experts alone."""
    capacity: Capacity | None = field(default=None, kw_only=True)
    """Of whole experts alone."""
    in_order = False

    def __post_init__(self) -> None:
        check_types(self)
        check_whole("top_k", self.k)

    @property
    def may_be_empty(self) -> bool:
        return self.capacity is not None

    @property
    def coefficient(self) -> ByDropRate | None:
        return None if self.capacity is None else self.capacity.coefficient

    @property
    def slots(self) -> int | None:
        return self.k

    @property
    def sums_to_one(self) -> bool:
        return self.renormalize


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(Selection):
    """One expert, drawn in training; at inference the best one (BTX)."""

    kind: Literal["sample"] = "sample"
    first_soft: bool = False
    """The first layer is `soft`."""
    in_order = False

    @property
    def slots(self) -> int | None:
        return 1

    def in_layer(self, number: int) -> Selection:
        return Soft() if self.first_soft and number == 0 else self


@dataclass(frozen=True, slots=True, kw_only=True)
class Soft(Selection):
    """Every expert, weighted by the softmax."""

    kind: Literal["soft"] = "soft"
    sums_to_one = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ReLU(Selection):
    """Every expert whose logit is positive, with the logit as its weight (ReMoE, Wang et al. 2025);
    the loss `remoe` keeps k of them for a token on the average."""

    kind: Literal["relu"] = "relu"
    k: int = 2
    coefficient: BySparsity = BySparsity()
    may_be_empty = True

    @property
    def wanted(self) -> int:
        return self.k

    def __post_init__(self) -> None:
        check_types(self)
        check_whole("top_k", self.k)

    @property
    def slots(self) -> int | None:
        return self.k


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots(Selection):
    """Soft MoE's: every expert works on one weighted mean of the tokens of a sequence (of its
    prefix, in a causal model), and tokens outside are mixed softly."""

    kind: Literal["slots"] = "slots"
    mixes_tokens = True


class ByThreshold(Rule):
    """A rule by a number that scores are held against."""

    __slots__ = ()
    threshold: float
    most: ClassVar[float] = 1

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.threshold <= self.most or self.threshold == math.inf:
            limits = "lie between 0 and 1" if self.most == 1 else "be a number from 0"
            raise RecipeError(f"select.threshold is {self.threshold}; it must {limits}.")


@dataclass(frozen=True, slots=True)
class Share(ByThreshold):
    """The best experts until their scores sum to `threshold` of all."""

    kind: Literal["share"] = field(default="share", kw_only=True)
    threshold: float
    not_negative = True


@dataclass(frozen=True, slots=True)
class Relative(ByThreshold):
    """Those that reach `threshold` times the best."""

    kind: Literal["relative"] = field(default="relative", kw_only=True)
    threshold: float
    not_negative = True


@dataclass(frozen=True, slots=True)
class Above(ByThreshold):
    """Those that exceed `threshold`."""

    kind: Literal["threshold"] = field(default="threshold", kw_only=True)
    threshold: float
    most = math.inf
    at_least = 0


# ------------------------------------------------------------------------------ what is decided for


@family
class Decides(ABC):
    """For what a router decides."""

    __slots__ = ()
    kind: str

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Token(Decides):
    """For each token."""

    kind: Literal["token"] = "token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head(Decides):
    """For each attention head of a token."""

    kind: Literal["head"] = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence(Decides):
    """For the mean of a sequence's tokens (encoders only: it would show a decoder its future)."""

    kind: Literal["sequence"] = "sequence"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence(Decides):
    """For a frozen sentence embedding."""

    kind: Literal["sentence"] = "sentence"
    encoder: str = "minilm"
    """The frozen sentence encoder: a hub id, folder or packaged name."""
    dim: int = 384
    """Width of its embeddings."""

    def __post_init__(self) -> None:
        check_types(self)
        check_whole("decides.dim", self.dim)
        if self.encoder == "self":
            raise RecipeError(
                "decides.encoder is 'self'; only domains are embedded by the model itself."
            )


for option in (
    TopK, Sample, Soft, ReLU, Slots, Share, Relative, Above, Token, Head, Sequence, Sentence,
):  # fmt: skip
    add_kind(option)
