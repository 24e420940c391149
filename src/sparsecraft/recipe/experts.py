"""What a bank of experts is made of, as pure data. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.numbers import check_adapter, check_deviation, check_whole, is_number


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNSpec:
    """Full feed-forward experts made from the dense one, or shards of it."""

    kind: Literal["ffn"] = "ffn"
    num_experts: int = 8
    init: Literal["copy"] = "copy"
    width: int | None = None
    """Neurons of an expert, where they are not the dense network's or a shard of it: of experts
    that were imported (`sparsecraft import`)."""
    granularity: int = 1
    """Shards G of a network: experts e G to e G + G - 1 are those of copy, or source, e."""
    blend: bool = False
    """Expert e is the e-th of `num_experts` shards of every source, side by side (BTX)."""
    scaling: Literal["none", "exact", "paper"] = "none"
    """How outputs become `scale` times as large: see `sparsecraft.moe.experts.ffn.factors`."""
    scale: float = 1.0
    redraw: float = 0.0
    """Share of each expert's neurons drawn anew: see `sparsecraft.moe.init.neurons`."""
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
        if self.width is not None:
            check_whole("width", self.width)
        uneven = type(self.num_experts) is int and self.num_experts % self.granularity
        if uneven or (self.blend and self.granularity > 1):
            raise RecipeError(
                f"granularity is {self.granularity} with num_experts={self.num_experts} and "
                f"blend={self.blend}; it must divide them, and be 1 with blend."
            )
        if not (is_number(self.scale) and 0 < self.scale < math.inf):
            raise RecipeError(f"scale is {self.scale!r}; it must be a positive number.")
        for name in ("redraw", "noise_share"):
            if not (is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1):
                raise RecipeError(f"{name} is {getattr(self, name)!r}; it must lie in [0, 1].")
        check_deviation(self.noise_std, "noise_std")


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
        check_adapter("dim", self.dim, self.dropout, scale=self.scale)


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
        check_adapter("rank", self.rank, self.dropout, alpha=self.alpha)
        check_deviation(self.init_std)


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorSpec:
    """Vectors that scale features one by one, as (IA)3's; ones at the start."""

    kind: Literal["vector"] = "vector"
    num_experts: int = 10
    init_std: float = 0.0
    """Standard deviation of noise on the ones: it tells experts apart at the first step, and the
    model no longer starts as the dense one."""

    def __post_init__(self) -> None:
        check_deviation(self.init_std)


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
        check_adapter("rank", self.rank, self.dropout, alpha=self.alpha)


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
        if not (is_number(self.flops_factor) and 0 < self.flops_factor < math.inf):
            raise RecipeError(f"flops_factor is {self.flops_factor!r}; it must be positive.")


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
