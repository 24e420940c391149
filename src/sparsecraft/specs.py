"""What a router and a bank of experts are made of, as pure data. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sparsecraft.errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSpec:
    """A scorer of tokens and a selection rule. All of it is computed in float32."""

    scorer: Literal["linear", "similarity", "mlp", "norm", "analytic", "oracle"] = "linear"
    """All but `linear` are of split networks; see `sparsecraft.routers.split`."""
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
    reads: Literal["input", "output"] = "input"
    """The layer's input, or the output of the dense module it stands on."""
    decides: Literal["token", "head", "sequence", "sentence"] = "token"
    """For each token; for each attention head of a token; for the mean of a sequence's tokens
    (encoders only: it would show a decoder its future); or for a frozen sentence embedding."""
    encoder: str = "minilm"
    """The frozen sentence encoder of `decides="sentence"`: a hub id, folder or packaged name."""
    sentence_dim: int = 384
    """Width of its embeddings."""
    init: Literal["kaiming_uniform", "normal", "uniform", "zeros"] = "kaiming_uniform"
    """`uniform`, of whole experts alone, has mean zero and standard deviation `init_std`."""
    init_std: float = 0.02
    """Standard deviation of `init="normal"` and `"uniform"`; unused otherwise."""
    init_repeat: int = 1
    """So many experts in a row start with one row of the scorer (virtual groups)."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNSpec:
    """Full feed-forward experts made from the dense one, or shards of it."""

    kind: Literal["ffn"] = "ffn"
    num_experts: int = 8
    init: Literal["copy"] = "copy"
    granularity: int = 1
    """Shards G of a network: experts e G to e G + G - 1 are those of copy, or source, e."""
    blend: bool = False
    """Expert e is the e-th of `num_experts` shards of every source, side by side (BTX)."""
    scaling: Literal["none", "exact", "paper"] = "none"
    """How outputs become `scale` times as large: see `sparsecraft.experts.ffn.factors`."""
    scale: float = 1.0
    redraw: float = 0.0
    """Share of each expert's neurons drawn anew: see `sparsecraft.init.neurons`."""
    redraw_apart: bool = False
    """Gate, up and down each draw other neurons (Drop-Upcycling's code)."""
    permute: bool = False
    """Each expert has its neurons in a random order, which changes no output."""
    noise_std: float = 0.0
    """Standard deviation of noise on each expert's matrices and first bias."""
    noise_share: float = 1.0
    """Share of the neurons of each matrix that the noise is on."""

    def __post_init__(self) -> None:
        check_whole("granularity", self.granularity)
        uneven = type(self.num_experts) is int and self.num_experts % self.granularity
        if uneven or (self.blend and self.granularity > 1):
            raise RecipeError(
                f"granularity is {self.granularity} with num_experts={self.num_experts} and "
                f"blend={self.blend}; it must divide them, and be 1 with blend."
            )
        if not (_is_number(self.scale) and 0 < self.scale < math.inf):
            raise RecipeError(f"scale is {self.scale!r}; it must be a positive number.")
        for name in ("redraw", "noise_share"):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1):
                raise RecipeError(f"{name} is {getattr(self, name)!r}; it must lie in [0, 1].")
        _check_deviation(self.noise_std, "noise_std")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """Whole attentions as experts, with their own queries and outputs."""

    kind: Literal["attention"] = "attention"
    num_experts: int = 4
    kv: Literal["expert", "shared"] = "expert"
    """Keys and values of each expert, and a cache as many times as large; or one of both for all
    experts, from several sources their mean (BAM, section 3.1)."""


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
        _check_adapter("dim", self.dim, self.dropout, scale=self.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRASpec:
    """Low-rank updates, (alpha / rank) * B A x, B zero at the start."""

    kind: Literal["lora"] = "lora"
    num_experts: int = 1
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    """On the update's input, in training."""
    shared_a: bool = False
    """All experts share one A (HydraLoRA)."""
    init: Literal["kaiming_uniform", "normal"] = "kaiming_uniform"
    """Of A."""
    init_std: float = 0.02
    """Standard deviation of `init="normal"`; unused otherwise."""

    def __post_init__(self) -> None:
        _check_adapter("rank", self.rank, self.dropout, alpha=self.alpha)
        _check_deviation(self.init_std)


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorSpec:
    """Vectors that scale features one by one, as (IA)3's; ones at the start."""

    kind: Literal["vector"] = "vector"
    num_experts: int = 10
    init_std: float = 0.0
    """Standard deviation of noise on the ones: it tells experts apart at the first step, and the
    model no longer starts as the dense one."""

    def __post_init__(self) -> None:
        _check_deviation(self.init_std)


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNLoRASpec:
    """Feed-forward experts that share the dense weights and differ by LoRAs on each Linear."""

    kind: Literal["ffn_lora"] = "ffn_lora"
    num_experts: int = 8
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    """On the updates' inputs, in training."""

    def __post_init__(self) -> None:
        _check_adapter("rank", self.rank, self.dropout, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSpec:
    """The dense feed-forward network itself, its neurons dealt out to experts of equal size."""

    kind: Literal["split"] = "split"
    num_experts: int = 32
    partition: Literal[
        "contiguous",
        "random",
        "kmeans",
        "coactivation",
        "coactivation_released",
        "activation",
        "activation_released",
    ] = "kmeans"
    """By position; at random; balanced k-means on the rows of the first matrix, the gate's where
    there is one; a graph of neurons that are active together (MoEfication's paper, or its code);
    clusters of the tokens that neurons react to most (CMoE, or its code). Those that look at
    activations are made by the stage that fits the router."""
    markers: int = 10
    """Neurons that a token marks for `partition="activation"`."""
    compensate: bool | None = None
    """Neurons of experts that do not run take their mean activation (G-MoEfication). None: unless
    the activation is ReLU, whose mean is near zero."""
    flops_factor: float = 1.0
    """Size of a network that imitates a Linear, as a multiple of the Linear's multiplications."""

    def __post_init__(self) -> None:
        check_whole("markers", self.markers)
        if not (_is_number(self.flops_factor) and 0 < self.flops_factor < math.inf):
            raise RecipeError(f"flops_factor is {self.flops_factor!r}; it must be positive.")


@dataclass(frozen=True, kw_only=True, slots=True)
class FitSpec:
    """How parts of split networks are fitted to captured inputs, the rest left alone."""

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

    def __post_init__(self) -> None:
        for name in ("tokens", "epochs", "batch_tokens"):
            check_whole(name, getattr(self, name))
        if not (_is_number(self.holdout) and 0 < self.holdout < 1):
            raise RecipeError(f"holdout is {self.holdout!r}; it must lie between 0 and 1.")
        if not (_is_number(self.learning_rate) and 0 < self.learning_rate < math.inf):
            raise RecipeError(f"learning_rate is {self.learning_rate!r}; it must be positive.")


def check_whole(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise RecipeError(f"{name} is {value!r}; it must be a whole number from 1.")


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
    }
    if wrong := [name for name, fits in known.items() if not fits]:
        raise RecipeError(
            f"router.{wrong[0]} is {getattr(router, wrong[0])!r}, which a {scorer} scorer does not "
            "have."
        )


def check_split(router: RouterSpec) -> None:
    """Refuse what only one of the two kinds of routers can do.

    Raises:
        RecipeError: a router of whole experts with fields of a split network's, or the reverse.
    """
    _check_scorer(router)
    check_whole("router.init_repeat", router.init_repeat)
    if router.splits:
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
        "scorer": router.scorer != "linear",
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


def _check_adapter(name: str, width: int, dropout: float, **factors: float) -> None:
    check_whole(name, width)
    if not (_is_number(dropout) and 0 <= dropout < 1):
        raise RecipeError(f"dropout is {dropout!r}; it must be at least 0 and less than 1.")
    for factor, value in factors.items():
        if not (_is_number(value) and 0 < value < math.inf):
            raise RecipeError(f"{factor} is {value!r}; it must be a positive number.")


def _check_deviation(value: float, name: str = "init_std") -> None:
    if not (_is_number(value) and 0 <= value < math.inf):
        raise RecipeError(f"{name} is {value!r}; it must be a number from 0.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


ExpertsSpec = (
    FFNSpec | AttentionSpec | AdapterSpec | LoRASpec | VectorSpec | FFNLoRASpec | SplitSpec
)

# Where a kind of experts makes sense, unless anywhere.
PLACES = {
    "attention": ("replace",),
    "lora": ("beside",),
    "vector": ("after", "before"),
    "ffn_lora": ("inside",),
    "split": ("replace", "imitate"),
}

# Rules that select by a threshold, and those among them whose scores must not be negative.
BY_THRESHOLD = ("share", "relative", "threshold")
NOT_NEGATIVE = ("share", "relative")
