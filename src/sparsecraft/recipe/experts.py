"""What a bank of experts is made of, as pure data, and what each kind may stand at. Torch-free.

A kind says by class attributes what others need to know of it; no code asks for its name.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from sparsecraft.errors import RecipeError
from sparsecraft.recipe.kinds import add_kind, family
from sparsecraft.recipe.numbers import check_adapter, check_deviation, check_whole, is_number
from sparsecraft.recipe.typed import check_types

DonorWord = Literal["block", "ffn", "attention", "linear", "activation"]
"""What a dense module is read as; see `sparsecraft.dense.donors`. A `block` is a mixture that the
dense model has of its own, at site `ffn`."""

ANYTHING: tuple[DonorWord, ...] = ("ffn", "linear", "activation")
AROUND: tuple[DonorWord, ...] = ("block", *ANYTHING)
CORES = 5  # of a matrix product operator, as in MPOE


def stands(**places: tuple[DonorWord, ...]) -> Mapping[str, tuple[DonorWord, ...]]:
    """Place -> the dense modules that a kind may stand at there; see `ExpertsSpec.places`."""
    return MappingProxyType(places)


@family
@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsSpec(ABC):
    """What every kind of experts says of itself.

    A further kind is a frozen dataclass below this one, with a `kind` of its own, and one line:
    `sparsecraft.moe.experts.build.register(its spec, its bank)`.

    Attributes:
        places: where it may stand, and for each place the dense modules that it may stand at.
        parts: its experts are the parts of one network, whose plain sum is the dense function.
        comes_from: what sources can fill it: dense models by their `network`, adapters by their
            `lora`; None where its experts come from the converted model alone.
        dense_weights: it holds dense weights of its own, so that it is no adapter on a base.
        standard: its experts are full feed-forward networks of the dense one's form, which the
            mixtures of standard architectures have.
        materializes: its experts become such networks by `sparsecraft.interop.materialize`.
        joins: the recipe that one of these experts is, where several with constant weights are one
            wider expert; see `joined`.
        words: what one of them is called in tables, and several.
    """

    kind: str
    num_experts: int

    places: ClassVar[Mapping[str, tuple[DonorWord, ...]]] = stands(
        replace=ANYTHING, beside=ANYTHING, after=ANYTHING, before=ANYTHING
    )
    parts: ClassVar[bool] = False
    comes_from: ClassVar[Literal["network", "lora"] | None] = None
    dense_weights: ClassVar[bool] = False
    standard: ClassVar[bool] = False
    materializes: ClassVar[bool] = False
    joins: ClassVar[str | None] = None
    words: ClassVar[tuple[str, str]] = ("expert", "experts")

    @property
    def networks(self) -> int:
        """How many networks the experts are, or are shards of."""
        return self.num_experts

    @property
    def free(self) -> int:
        """How many of the experts, the last ones, compute nothing."""
        return 0

    @property
    def parted(self) -> bool:
        """Whether they give what the dense network gives in their mean alone."""
        return False

    @property
    def load(self) -> tuple[float, ...] | None:
        """Parts of all slots that experts are meant to have; None for equal ones."""
        return None

    @property
    def blends(self) -> bool:
        """Whether each expert takes a shard of every source."""
        return False

    @property
    def shards(self) -> bool:
        """Whether experts are shards of networks, so that no whole network is one of them."""
        return False

    @property
    def needs_memory(self) -> str | None:
        """What of it cannot be made tensor by tensor, in words; None if all of it can, because
        experts are copies, or drawn at random and so small that a layer's fit into memory."""
        return f"{self.kind} experts"

    def joined(self, count: int) -> ExpertsSpec:
        """The one expert that `count` of these with constant weights are; of kinds that join."""
        raise RecipeError(f"{self.kind} experts with constant weights are no one expert.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What is random in the neurons of copied experts; see `sparsecraft.moe.init.neurons`."""

    redraw: float = 0.0
    """Share of each expert's neurons drawn anew (Drop-Upcycling)."""
    redraw_apart: bool = False
    """Gate, up and down each draw other neurons (Drop-Upcycling's code)."""
    permute: bool = False
    """Each expert has its neurons in a random order, which changes no output."""
    noise_std: float = 0.0
    """Standard deviation of noise on each expert's matrices and first bias."""
    noise_share: float = 1.0
    """Share of the neurons of each matrix that the noise is on."""
    pairs: int | None = None
    """Of the experts 2 i and 2 i + 1 one has every number w of its second matrix raised, and the
    other lowered, by 2^-pairs of the largest power of two in |w|, drawn for each number which: the
    mean of the two is the dense network, exactly, also in bfloat16. From 1 to 7; None leaves them
    alike."""

    def __post_init__(self) -> None:
        if self.pairs not in (None, *range(1, 8)):
            raise RecipeError(f"pairs is {self.pairs!r}; it must be 1 to 7, or None.")
        for name in ("redraw", "noise_share"):
            if not (is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1):
                raise RecipeError(f"{name} is {getattr(self, name)!r}; it must lie in [0, 1].")
        check_deviation(self.noise_std, "noise_std")


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNSpec(ExpertsSpec):
    """Full feed-forward experts made from the dense one, or shards of it."""

    places = stands(replace=("ffn",), beside=("ffn",), after=("ffn",), before=("ffn",))
    comes_from = "network"
    dense_weights = True
    standard = True
    words = ("network", "networks")

    kind: Literal["ffn"] = "ffn"
    num_experts: int = 8
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
    differ: Difference = Difference()
    """How copies differ at the start."""

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

    @property
    def networks(self) -> int:
        return self.num_experts // self.granularity

    @property
    def blends(self) -> bool:
        return self.blend

    @property
    def parted(self) -> bool:
        return self.differ.pairs is not None

    @property
    def shards(self) -> bool:
        return self.granularity > 1 or self.blend

    @property
    def needs_memory(self) -> str | None:
        plain = self == FFNSpec(num_experts=self.num_experts)
        return None if plain else f"{self.kind} experts that are no plain copies"


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec(ExpertsSpec):
    """Whole attentions as experts, with their own queries and outputs."""

    places = stands(replace=("attention",))
    comes_from = "network"
    dense_weights = True
    words = ("attention", "attentions")

    kind: Literal["attention"] = "attention"
    num_experts: int = 4
    kv: Literal["expert", "shared"] = "expert"
    """Keys and values of each expert, and a cache as many times as large; or one of both for all
    experts, from several sources their mean (BAM, section 3.1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec(ExpertsSpec):
    """Bottleneck adapters, x + scale * up(activation(down(x))), `up` zero at the start."""

    places = stands(replace=ANYTHING, beside=AROUND, after=AROUND, before=AROUND)
    needs_memory = None
    joins = "adapter"
    words = ("adapter", "adapters")

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

    def joined(self, count: int) -> AdapterSpec:
        return dataclasses.replace(self, num_experts=1, dim=self.dim * count)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRASpec(ExpertsSpec):
    """Low-rank updates, (alpha / rank) * B A x, B zero at the start."""

    places = stands(beside=("ffn", "linear"))
    comes_from = "lora"
    needs_memory = None
    words = ("LoRA", "LoRAs")

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
class VectorSpec(ExpertsSpec):
    """Vectors that scale features one by one, as (IA)3's; ones at the start."""

    places = stands(after=AROUND, before=AROUND)
    needs_memory = None
    words = ("vector", "vectors")

    kind: Literal["vector"] = "vector"
    num_experts: int = 10
    init_std: float = 0.0
    """Standard deviation of noise on the ones: it makes experts differ at the first step, and the
    model no longer starts as the dense one."""

    def __post_init__(self) -> None:
        check_deviation(self.init_std)


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNLoRASpec(ExpertsSpec):
    """Feed-forward experts that share the dense weights and differ by LoRAs on each Linear."""

    places = stands(inside=("ffn",))
    needs_memory = None
    words = ("network by LoRA", "networks by LoRA")

    kind: Literal["ffn_lora"] = "ffn_lora"
    num_experts: int = 8
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    """On the updates' inputs, in training."""

    def __post_init__(self) -> None:
        check_adapter("rank", self.rank, self.dropout, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True, slots=True)
class MPOSpec(ExpertsSpec):
    """Feed-forward experts whose matrices are products of five cores, the middle one shared."""

    places = stands(replace=("ffn",))
    dense_weights = True
    materializes = True
    words = ("network by shared cores", "networks by shared cores")

    kind: Literal["mpo"] = "mpo"
    num_experts: int = 8
    bond: int | None = None
    """Largest number of terms between two cores; None keeps all, and the dense matrices with
    them."""
    mask: float = 0.0
    """Probability with which a step of training leaves the shared cores as they are."""
    hidden_factors: tuple[int, ...] | None = None
    """Five whole numbers whose product is the hidden width; None: see
    `sparsecraft.moe.init.factors`."""
    width_factors: tuple[int, ...] | None = None
    """The same of the width of the model."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.bond is not None:
            check_whole("bond", self.bond)
        if not 0 <= self.mask < 1:
            raise RecipeError(f"mask is {self.mask}; it must be at least 0 and less than 1.")
        given = self.hidden_factors, self.width_factors
        if given.count(None) == 1 or any(f is not None and len(f) != CORES for f in given):
            raise RecipeError(
                f"hidden_factors is {given[0]} and width_factors {given[1]}; give five of both, or "
                "neither."
            )
        for factor in (f for factors in given for f in factors or ()):
            check_whole("a factor", factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSpec(ExpertsSpec):
    """The dense feed-forward network itself, its neurons partitioned into experts of equal size."""

    places = stands(replace=("ffn",), imitate=("linear",))
    parts = True
    dense_weights = True
    words = ("group of neurons", "groups of neurons")

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


for option in (
    FFNSpec,
    AttentionSpec,
    AdapterSpec,
    LoRASpec,
    VectorSpec,
    FFNLoRASpec,
    MPOSpec,
    SplitSpec,
):
    add_kind(option)
