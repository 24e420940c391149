"""Stages of training: what moves under which losses, with the paper's hyperparameters.

`Stage` trains by gradient, `Fit` fits parts of split networks to captured inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Self

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.numbers import check_coefficients, check_whole, is_number
from sparsecraft.recipe.routers import RouterSpec
from sparsecraft.recipe.typed import check_types


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One training phase: what moves, under which losses, with the paper's hyperparameters."""

    kind: Literal["train"] = "train"
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
    router: RouterSpec | None = None
    """When the stage begins, a new router of this kind takes the place of every router of whole
    experts, for good: what the model's recipe says from then on. None leaves those there are."""
    deal: Deal | None = None
    """Train on rows that are assigned to the experts first (causal models)."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """Adafactor with steps relative to a parameter's size, as in T5X: 3e-4 moves ones by 3e-4
    and a router of standard deviation 0.02 by 6e-6."""
    learning_rate: float = 2e-4
    router_learning_rate: float | None = None
    """None: the same as `learning_rate`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    ends_at: float = 0.0
    """Share of the peak learning rate at which a cosine ends."""
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

    def __new__(cls, **fields: object) -> Self:
        for old, new in (("fit", "a stage of its own, Fit(...)"), ("buckets", "deal=Deal(...)")):
            if old in fields:
                raise RecipeError(f"A Stage has no {old}: say it by {new} of sparsecraft.recipe.")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        check_types(self)
        if not self.trains:
            raise RecipeError("The stage trains nothing; name experts, router, all or globs.")
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
        if not 0 <= self.ends_at <= 1:
            raise RecipeError(f"ends_at is {self.ends_at}; it must lie between 0 and 1.")
        if not (0 <= self.warmup_ratio <= 1 and self.warmup_steps >= 0):
            raise RecipeError(
                f"warmup_ratio is {self.warmup_ratio} and warmup_steps {self.warmup_steps}; the "
                "ratio must lie between 0 and 1, the steps must not be negative."
            )
        if self.router is not None:
            _check_new(self.router)
        check_coefficients(self.losses)

    @property
    def deals(self) -> bool:
        """Whether rows are assigned to the experts first."""
        return self.deal is not None

    @property
    def makes_routers(self) -> bool:
        """Whether routers of split networks are made by it, and run no sooner."""
        return self.runs == "soft"


def _check_new(router: RouterSpec) -> None:
    """Refuse a router that a stage cannot put in.

    Raises:
        RecipeError: it reads something else than the layer's input, or starts from data.
    """
    if not router.by_token or router.starts_from or router.reads_previous:
        raise RecipeError(
            f"stage.router has a {router.scorer.kind!r} scorer, decides by "
            f"{router.decides.kind!r}, reads {router.reads!r} and starts from "
            f"{router.starts_from}; one that a stage puts in reads the layer's input alone, by "
            "token, and starts from no data."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Parts of split networks are fitted to captured inputs, the rest left alone."""

    kind: Literal["fit"] = "fit"
    name: str = "router"
    what: Literal["routers", "imitations"] = "routers"
    """The routers of split networks, or the networks that imitate a Linear, on its outputs."""
    sparsity: float = 0.0
    """Weight of the Hoyer measure of an imitation's activations, rising from zero (D2DMoE)."""
    dropout: float = 0.0
    """On an imitation's activations while it is fitted."""
    loss: Literal["bce", "mse", "none"] = "mse"
    """`bce` on targets scaled to [0, 1]; `none` builds routers that learn nothing."""
    tokens: int = 131_072
    """Inputs of each network to capture."""
    epochs: int = 10
    batch_tokens: int = 512
    learning_rate: float = 1e-3
    holdout: float = 0.1
    """Share of the tokens, the last ones, on which the best epoch is chosen."""
    batch_size: int = 128
    """Sequences at a time at most, while inputs are captured."""
    max_length: int = 2048
    """Tokens per sequence."""

    def __post_init__(self) -> None:
        for name in ("tokens", "epochs", "batch_tokens", "batch_size", "max_length"):
            check_whole(name, getattr(self, name))
        if not (is_number(self.holdout) and 0 < self.holdout < 1):
            raise RecipeError(f"holdout is {self.holdout!r}; it must lie between 0 and 1.")
        if not (is_number(self.learning_rate) and 0 < self.learning_rate < math.inf):
            raise RecipeError(f"learning_rate is {self.learning_rate!r}; it must be positive.")
        check_types(self)
        if not 0 <= self.sparsity < math.inf:
            raise RecipeError(f"sparsity is {self.sparsity}; it must be a number from 0.")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"dropout is {self.dropout}; it must be at least 0 and less than 1.")

    @property
    def router(self) -> None:
        """The router that it puts in: none."""
        return None

    @property
    def deals(self) -> bool:
        """Whether rows are assigned to the experts first."""
        return False

    @property
    def losses(self) -> dict[str, float]:
        """Losses on routings, of which a regression has none."""
        return {}

    @property
    def trains(self) -> tuple[str, ...]:
        """The word of the parameters that move."""
        return ("router",) if self.what == "routers" else ("experts",)

    @property
    def makes_routers(self) -> bool:
        """Whether routers of split networks, or imitations, are made by it, and run no sooner."""
        return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Deal:
    """Rows of the training data assigned to the experts, each to the one with the least loss on it:
    all its tokens then go to that expert, with weight one (UpIT)."""

    sample: float = 0.01
    """Share of the rows that are assigned; the others are left out."""
    at_least: int = 500
    """Rows that are assigned at least, or all there are, however small the share."""
    at_most: int = 5000

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("at_least", "at_most"):
            check_whole(name, getattr(self, name))
        if not (is_number(self.sample) and 0 < self.sample <= 1):
            raise RecipeError(f"sample is {self.sample!r}; it must lie in (0, 1].")
        if self.at_least > self.at_most:
            raise RecipeError(
                f"at_least is {self.at_least} and at_most {self.at_most}; the first must not be "
                "larger."
            )
