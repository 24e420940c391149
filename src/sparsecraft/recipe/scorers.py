"""What scores tokens against experts, and how it starts. Torch-free.

Each is a small frozen dataclass with a `kind`. A further one, from anywhere, is a frozen dataclass
below its base, and one line: `sparsecraft.moe.routers.build.register(it, what computes it)`.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.kinds import add_kind, family
from sparsecraft.recipe.numbers import check_deviation, check_whole
from sparsecraft.recipe.typed import check_types

# ------------------------------------------------------------------------------------------- starts


@family
class Start(ABC):
    """How the rows of a scorer start.

    Attributes:
        reads: what `convert` must be given for it: `domains`, one for each expert; `data`, which
            may be domains; or None.
    """

    __slots__ = ()
    kind: str
    reads: ClassVar[Literal["domains", "data"] | None] = None

    def __post_init__(self) -> None:
        check_types(self)

    def factor(self, deviation: float) -> float:
        """What rows that were found in data, of this standard deviation, are multiplied by."""
        return 1.0


@dataclass(frozen=True, slots=True)
class KaimingUniform(Start):
    """The default of nn.Linear."""

    kind: Literal["kaiming_uniform"] = field(default="kaiming_uniform", kw_only=True)


@dataclass(frozen=True, slots=True)
class Zeros(Start):
    """All zero: every expert scores the same."""

    kind: Literal["zeros"] = field(default="zeros", kw_only=True)


class Spread(Start):
    """A start whose rows have a standard deviation."""

    __slots__ = ()
    std: float

    def __post_init__(self) -> None:
        check_types(self)
        check_deviation(self.std, "start.std")

    def factor(self, deviation: float) -> float:
        return self.std / deviation


@dataclass(frozen=True, slots=True)
class Normal(Spread):
    """Drawn from a normal distribution around zero."""

    kind: Literal["normal"] = field(default="normal", kw_only=True)
    std: float = 0.02


@dataclass(frozen=True, slots=True)
class Uniform(Spread):
    """Around zero, from - sqrt(3) std to sqrt(3) std."""

    kind: Literal["uniform"] = field(default="uniform", kw_only=True)
    std: float = 0.02


@dataclass(frozen=True, slots=True)
class Hidden(Spread):
    """The mean of what the router reads of each expert's domain, centered over the experts."""

    kind: Literal["hidden"] = field(default="hidden", kw_only=True)
    std: float = 0.02
    reads = "domains"


@dataclass(frozen=True, slots=True)
class KMeans(Spread):
    """Centers of what the router reads of all data, centered over the experts."""

    kind: Literal["kmeans"] = field(default="kmeans", kw_only=True)
    std: float = 0.02
    reads = "data"


MOST_RIDGE = 1e6  # of a scale or penalty; rows would be infinite, or nothing


@dataclass(frozen=True, slots=True)
class Ridge(Start):
    """A ridge regression on which domain a token is of (DUME), centered over the experts; see
    `sparsecraft.moe.init.domains.Regression`."""

    kind: Literal["ridge"] = field(default="ridge", kw_only=True)
    scale: float = 10.0
    """Factor on the regression's scores, which lie about 0 and 1, so that their softmax would be
    flat: one over a temperature (0.1 in the released code)."""
    penalty: float = 0.01
    """Lambda, the weight of the squares of the rows (0.01 in the released code)."""
    reads = "domains"

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("scale", "penalty"):
            if not 0 < getattr(self, name) <= MOST_RIDGE:
                raise RecipeError(
                    f"start.{name} is {getattr(self, name)}; it must be positive, and at most "
                    f"{MOST_RIDGE:g}."
                )

    def factor(self, deviation: float) -> float:
        return self.scale


# ------------------------------------------------------------------------- scorers of whole experts


@family
class ScorerSpec(ABC):
    """What scores tokens against whole experts.

    Attributes:
        of_domains: the rows of its experts are made from embeddings of their domains.
        reads_experts: it reads what every expert gives for a token.
        reads_previous: it reads the logits of the layer before.
    """

    __slots__ = ()
    kind: str
    of_domains: ClassVar[bool] = False
    reads_previous: ClassVar[bool] = False
    reads_experts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def reads(self) -> Literal["domains", "data"] | None:
        """What `convert` must be given for it to start; see `Start`."""
        return None

    @property
    def shares_rows(self) -> bool:
        """Whether several experts start with one row."""
        return False

    def with_extended(self, count: int) -> ScorerSpec:
        """The same, of which the last `count` experts were added one at a time."""
        return self

    def check(self, num_experts: int) -> None:  # noqa: B027, most take any number
        """Refuse a number of experts that it cannot have.

        Raises:
            RecipeError: so it is.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(ScorerSpec):
    """One row for each expert."""

    kind: Literal["linear"] = "linear"
    start: Start = KaimingUniform()
    repeat: int = 1
    """Number of neighboring experts that start with the same row (virtual groups)."""
    extended: int = 0
    """Number of experts, the last ones, that were added one at a time (`sparsecraft extend`)."""

    def __post_init__(self) -> None:
        check_types(self)
        check_whole("scorer.repeat", self.repeat)

    @property
    def reads(self) -> Literal["domains", "data"] | None:
        return self.start.reads

    @property
    def shares_rows(self) -> bool:
        return self.repeat > 1

    def with_extended(self, count: int) -> Linear:
        return replace(self, extended=count)

    def check(self, num_experts: int) -> None:
        if not 0 <= self.extended < num_experts:
            raise RecipeError(
                f"scorer.extended is {self.extended!r} with num_experts={num_experts}; one expert "
                "at least has been there from the start."
            )
        if num_experts % self.repeat:
            raise RecipeError(
                f"scorer.repeat is {self.repeat} with num_experts={num_experts}; it must divide "
                "them."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain(ScorerSpec):
    """The row of each expert is projected from an embedding of its domain (Nexus)."""

    kind: Literal["domain"] = "domain"
    encoder: str = "minilm"
    """The frozen sentence encoder, a hub id, folder or packaged name; or `self`, the mean last
    hidden state of the model that is converted."""
    dim: int = 384
    """Width of its embeddings; of `self` it is the width of what the router reads."""
    std: float = 0.02
    """Standard deviation of the rows at the start."""
    of_domains = True

    def __post_init__(self) -> None:
        check_types(self)
        check_whole("scorer.dim", self.dim)
        check_deviation(self.std, "scorer.std")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attentive(ScorerSpec):
    """A query of the token against a key of what every expert gives for it (Krishnamurthy et al.
    2023); both are products without a bias."""

    kind: Literal["attentive"] = "attentive"
    dim: int = 32
    """Width of queries and keys."""
    start: Start = KaimingUniform()
    """How the keys' matrix starts."""
    query: Start = KaimingUniform()
    """How the queries' does; with zeros all experts begin with the same weight."""
    reads_experts = True

    def __post_init__(self) -> None:
        check_types(self)
        check_whole("scorer.dim", self.dim)
        if reads := self.start.reads or self.query.reads:
            raise RecipeError(
                f"scorer.start or scorer.query starts from {reads}, which have no rows in an "
                "attentive scorer; use kaiming_uniform, normal, uniform or zeros."
            )


# --------------------------------------------------------------- scorers of parts of split networks


@family
class PartScorerSpec(ABC):
    """What scores tokens against the parts of one split network.

    Attributes:
        not_negative: its scores are never negative.
        reads_target: it computes the gate's target itself.
    """

    __slots__ = ()
    kind: str
    not_negative: ClassVar[bool] = False
    reads_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def rule(self) -> dict[str, Any]:
        """What of it says how tensors become scores."""
        return {"kind": self.kind}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearParts(PartScorerSpec):
    """One row for each expert (LTE)."""

    kind: Literal["linear"] = "linear"
    start: Start = KaimingUniform()
    bias: float | None = None
    """Initial biases; None for none."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.start.reads:
            raise RecipeError(
                f"scorer.start is {self.start.kind!r} for the parts of a split network; domains "
                "are for whole experts, and a split network's router is fitted."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity(PartScorerSpec):
    """The nearness of a token's direction to the mean direction of an expert's rows."""

    kind: Literal["similarity"] = "similarity"


@dataclass(frozen=True, slots=True, kw_only=True)
class MLP(PartScorerSpec):
    """B tanh(A x / |x|) (MoEfication)."""

    kind: Literal["mlp"] = "mlp"
    hidden: int | None = None
    """Width inside; None: as many as experts."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.hidden is not None:
            check_whole("scorer.hidden", self.hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm(PartScorerSpec):
    """|B relu(A x)| (D2DMoE)."""

    kind: Literal["norm"] = "norm"
    hidden: int = 128
    """Width inside; 512 for Gemma-2B."""
    bias: float | None = None
    """Initial biases; None for none."""
    not_negative = True

    def __post_init__(self) -> None:
        check_types(self)
        check_whole("scorer.hidden", self.hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class Analytic(PartScorerSpec):
    """The activation of one neuron of each expert (CMoE)."""

    kind: Literal["analytic"] = "analytic"
    normalize: bool = False
    """Tokens and rows are divided by their length."""

    @property
    def rule(self) -> dict[str, Any]:
        return {"kind": self.kind, "normalize": self.normalize}


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle(PartScorerSpec):
    """What a router should predict, computed from the whole network: a bound, and no saving."""

    kind: Literal["oracle"] = "oracle"
    not_negative = True
    reads_target = True


for option in (
    KaimingUniform, Zeros, Normal, Uniform, Hidden, KMeans, Ridge, Linear, Domain,
    Attentive,
    LinearParts, Similarity, MLP, Norm, Analytic, Oracle,
):  # fmt: skip
    add_kind(option)
