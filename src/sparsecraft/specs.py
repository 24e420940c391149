"""What a router and a bank of experts are made of, as pure data. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sparsecraft.errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSpec:
    """A scorer of tokens and a selection rule. All of it is computed in float32."""

    scorer: Literal["linear"] = "linear"
    select: Literal["top_k", "soft", "slots"] = "top_k"
    """`slots` is Soft MoE's: every expert works on one weighted mean of the tokens of a sequence
    (of its prefix, in a causal model), and tokens outside are mixed softly."""
    top_k: int | None = 2
    """Experts per token; None with `soft` and `slots`, which use all of them."""
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
    init: Literal["kaiming_uniform", "normal", "zeros"] = "kaiming_uniform"
    init_std: float = 0.02
    """Standard deviation of `init="normal"`; unused otherwise."""

    @property
    def sums_to_one(self) -> bool:
        return self.select == "soft" or (self.select == "top_k" and self.renormalize)


@dataclass(frozen=True, kw_only=True, slots=True)
class FFNSpec:
    """Full feed-forward experts made from the dense one."""

    kind: Literal["ffn"] = "ffn"
    num_experts: int = 8
    init: Literal["copy"] = "copy"


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


def check_whole(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise RecipeError(f"{name} is {value!r}; it must be a whole number from 1.")


def _check_adapter(name: str, width: int, dropout: float, **factors: float) -> None:
    check_whole(name, width)
    if not (_is_number(dropout) and 0 <= dropout < 1):
        raise RecipeError(f"dropout is {dropout!r}; it must be at least 0 and less than 1.")
    for factor, value in factors.items():
        if not (_is_number(value) and 0 < value < math.inf):
            raise RecipeError(f"{factor} is {value!r}; it must be a positive number.")


def _check_deviation(value: float) -> None:
    if not (_is_number(value) and 0 <= value < math.inf):
        raise RecipeError(f"init_std is {value!r}; it must be a number from 0.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


ExpertsSpec = FFNSpec | AdapterSpec | LoRASpec | VectorSpec | FFNLoRASpec

# Where a kind of experts makes sense, unless anywhere.
PLACES = {"lora": ("beside",), "vector": ("after", "before"), "ffn_lora": ("inside",)}
