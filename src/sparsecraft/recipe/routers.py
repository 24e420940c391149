"""What a router is made of, as pure data, and which of its fields go together. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.numbers import check_whole

# Rules that select by a threshold, and those among them whose scores must not be negative.
BY_THRESHOLD = ("share", "relative", "threshold")


NOT_NEGATIVE = ("share", "relative")


# Inits that read data.
FROM_DATA = ("hidden", "kmeans")


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSpec:
    """A scorer of tokens and a selection rule. All of it is computed in float32."""

    scorer: Literal["linear", "domain", "similarity", "mlp", "norm", "analytic", "oracle"] = (
        "linear"
    )
    """`domain` projects an embedding of each expert's domain to its row (Nexus); the others but
    `linear` are of split networks; see `sparsecraft.moe.routers.part_scorers`."""
    select: Literal["top_k", "sample", "soft", "slots", "share", "relative", "threshold"] = "top_k"
    """`sample` draws one expert in training and takes the best at inference (BTX). `slots` is
    Soft MoE's: every expert works on one weighted mean of the tokens of a sequence (of its prefix,
    in a causal model), and tokens outside are mixed softly. `share` takes the best
    experts until their scores sum to `threshold` of all, `relative` those that reach `threshold`
    times the best, `threshold` those that exceed it."""
    top_k: int | None = 2
    """Experts per token, for `top_k`; 1 for `sample`."""
    soft_first: bool = False
    """The first layer is `soft`, whatever the others are (BTX's sampling)."""
    threshold: float | None = None
    """Of the rules by threshold."""
    shared: int = 0
    """So many experts, the first ones, run for every token, beside those that are selected."""
    squash: Literal["none", "abs", "sigmoid", "softmax"] = "none"
    """Logits -> the scores that the rules by threshold read, and `weighting="score"`."""
    weighting: Literal["softmax", "one", "scaled", "straight_through", "score", "gain"] = "softmax"
    """What a selected expert is multiplied by: the softmax; one; the softmax over the k kept times
    E / k (LLaMA-MoE); one, with the gradient of that softmax (Faster MoEfication); its score; or
    one plus its softmax times a learned gain that starts at zero (CMoE)."""
    target: Literal[
        "mass", "deviation", "squared_deviation", "output_norm", "intermediate_norm"
    ] = "mass"
    """What the scores of a split network's router predict of each expert: sum of |activation|; of
    its distance to the mean (squared, or not); Euclidean norm of what the expert adds, or of its
    activations."""
    hidden: int | None = None
    """Width inside the scorers `mlp` (None: as many as experts) and `norm` (None: 128)."""
    bias: float | None = None
    """Initial biases of the scorers `linear` and `norm`; None for none."""
    normalize: bool = False
    """Tokens and rows of the scorer `analytic` are divided by their length."""
    renormalize: bool = True
    """Whether the k kept weights are scaled to sum to one."""
    temperature: float = 1.0
    """Divides the logits."""
    gates_base: bool = False
    """The dense network that experts stand beside is multiplied by the sigmoid of a learned row
    (Qwen2-MoE's shared expert)."""
    reads: Literal["input", "output"] = "input"
    """The layer's input, or the output of the dense module it stands on."""
    decides: Literal["token", "head", "sequence", "sentence"] = "token"
    """For each token; for each attention head of a token; for the mean of a sequence's tokens
    (encoders only: it would show a decoder its future); or for a frozen sentence embedding."""
    encoder: str = "minilm"
    """The frozen sentence encoder of `decides="sentence"` and of the scorer `domain`: a hub id,
    folder or packaged name; for domains also `self`, the mean last hidden state of the model."""
    sentence_dim: int = 384
    """Width of its embeddings; of `self` it is the width of what the router reads."""
    init: Literal["kaiming_uniform", "normal", "uniform", "zeros", "hidden", "kmeans"] = (
        "kaiming_uniform"
    )
    """`uniform`, of whole experts alone, has mean zero and standard deviation `init_std`. `hidden`:
    the mean of what the router reads of each expert's domain; `kmeans`: centers of what it reads of
    all data. Both are given to `convert`, and are centered over the experts."""
    init_std: float = 0.02
    """Standard deviation of all inits but `kaiming_uniform` and `zeros`; of the scorer `domain`,
    of the rows that its projection gives."""
    init_repeat: int = 1
    """So many experts in a row start with one row of the scorer (virtual groups)."""
    extended: int = 0
    """So many experts, the last ones, were added one at a time (`sparsecraft extend`)."""
    balanced: bool = True
    """Whether the losses on routings count this router."""

    @property
    def splits(self) -> bool:
        """Whether it routes the parts of one split network, whose sum is the dense function."""
        return self.weighting != "softmax"

    @property
    def sums_to_one(self) -> bool:
        soft = self.select == "soft" or (self.select == "top_k" and self.renormalize)
        return soft and not self.splits


def check_selection(router: RouterSpec, num_experts: int) -> None:
    """Refuse a rule without its number, or with another's.

    Raises:
        RecipeError: the number is missing, not needed, or out of its range.
    """
    select, top_k, threshold = router.select, router.top_k, router.threshold
    wanted = 1 if select == "sample" else None
    if (top_k is None) if select == "top_k" else (top_k != wanted):
        raise RecipeError(
            f"router.select is {select!r} with top_k={top_k}: {select} selection takes "
            f"{'a number' if select == 'top_k' else f'top_k={wanted}'}."
        )
    if (select in BY_THRESHOLD) == (threshold is None):
        raise RecipeError(
            f"router.select is {select!r} with threshold={threshold}: {select} selection takes "
            f"{'a number' if select in BY_THRESHOLD else 'threshold=None'}."
        )
    most = math.inf if select == "threshold" and router.squash in ("none", "abs") else 1
    if threshold is not None and not 0 <= threshold <= most:
        limits = "lie between 0 and 1" if most == 1 else "be a number from 0"
        raise RecipeError(f"router.threshold is {threshold}; it must {limits}.")
    if router.shared and not 0 < router.shared < num_experts:
        raise RecipeError(
            f"router.shared is {router.shared} with num_experts={num_experts}; one expert at least "
            "must be left to select."
        )
    if top_k is not None and not 1 <= top_k <= num_experts - router.shared:
        beside = f" and shared={router.shared}" if router.shared else ""
        raise RecipeError(
            f"top_k is {top_k} with num_experts={num_experts}{beside}; "
            f"it must lie between 1 and {'num_experts' if not beside else 'what they leave'}."
        )
    if type(router.extended) is not int or not 0 <= router.extended < num_experts:
        raise RecipeError(
            f"router.extended is {router.extended!r} with num_experts={num_experts}; one expert at "
            "least has been there from the start."
        )
    if num_experts % router.init_repeat:
        raise RecipeError(
            f"router.init_repeat is {router.init_repeat} with num_experts={num_experts}; it must "
            "divide them."
        )
    signed = router.squash == "none" and router.scorer not in ("norm", "oracle")
    if select in NOT_NEGATIVE and signed:
        raise RecipeError(
            f"router.select is {select!r} on the logits of a {router.scorer} scorer, which may be "
            "negative; give squash='sigmoid', 'softmax' or 'abs', or scorer='norm'."
        )


def _check_scorer(router: RouterSpec) -> None:
    """Refuse fields that the scorer does not know."""
    scorer = router.scorer
    if router.hidden is not None:
        check_whole("router.hidden", router.hidden)
    known = {
        "hidden": router.hidden is None or scorer in ("mlp", "norm"),
        "bias": router.bias is None or scorer in ("linear", "norm"),
        "normalize": not router.normalize or scorer == "analytic",
        "extended": not router.extended or (scorer == "linear" and not router.splits),
    }
    if wrong := [name for name, fits in known.items() if not fits]:
        raise RecipeError(
            f"router.{wrong[0]} is {getattr(router, wrong[0])!r}, which a {scorer} scorer does not "
            "have."
        )


def _check_start(router: RouterSpec) -> None:
    """Refuse starts that the scorer cannot have."""
    check_whole("router.sentence_dim", router.sentence_dim)
    domain, by_token = (
        router.scorer == "domain",
        (router.decides, router.reads) == ("token", "input"),
    )
    if domain and router.init != "normal":
        raise RecipeError(
            f"router.init is {router.init!r} with scorer='domain', whose projection starts "
            "normal; set init='normal'."
        )
    if router.encoder == "self" and not (domain and router.decides != "sentence"):
        raise RecipeError(
            f"router.encoder is 'self' with scorer={router.scorer!r} and "
            f"decides={router.decides!r}; only domains are embedded by the model itself."
        )
    if router.init in FROM_DATA and not by_token:
        raise RecipeError(
            f"router.init is {router.init!r} with decides={router.decides!r} and "
            f"reads={router.reads!r}; it is for routers by token that read the layer's input."
        )


def check_split(router: RouterSpec) -> None:
    """Refuse what only one of the two kinds of routers can do.

    Raises:
        RecipeError: a router of whole experts with fields of a split network's, or the reverse.
    """
    _check_scorer(router)
    check_whole("router.init_repeat", router.init_repeat)
    _check_start(router)
    if router.splits:
        if router.scorer == "domain" or router.init in FROM_DATA:
            raise RecipeError(
                f"The router of a split network has scorer={router.scorer!r} and "
                f"init={router.init!r}; domains are for whole experts, and its routers are fitted."
            )
        if router.init == "uniform" or router.init_repeat > 1 or router.soft_first:
            raise RecipeError(
                f"router.init={router.init!r}, init_repeat={router.init_repeat} or soft_first="
                f"{router.soft_first} is for whole experts; a split network's has init='normal'."
            )
        if router.temperature != 1:
            raise RecipeError(
                f"router.temperature is {router.temperature} with weighting={router.weighting!r}; "
                "it divides the logits of whole experts only."
            )
        if router.select in ("soft", "slots", "sample"):
            raise RecipeError(
                f"router.select is {router.select!r} with weighting={router.weighting!r}; the "
                "experts of a split network are selected by top_k, share, relative or threshold."
            )
        if router.decides != "token" or router.reads != "input":
            raise RecipeError(
                "The router of a split network decides by token and reads the layer's input; "
                f"it is told decides={router.decides!r}, reads={router.reads!r}."
            )
        if router.select != "top_k" and router.weighting in ("scaled", "straight_through"):
            raise RecipeError(
                f"router.weighting is {router.weighting!r}, which counts on k experts; it needs "
                "select='top_k'."
            )
        return
    own = {
        "scorer": router.scorer not in ("linear", "domain"),
        "select": router.select in BY_THRESHOLD,
        "shared": router.shared != 0,
        "squash": router.squash != "none",
        "bias": router.bias is not None,
    }
    if wrong := [name for name, differs in own.items() if differs]:
        raise RecipeError(
            f"router.{wrong[0]} is {getattr(router, wrong[0])!r}, which is for split experts; "
            "they are weighted by one, scaled, straight_through, score or gain."
        )
