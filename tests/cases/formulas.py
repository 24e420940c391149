"""The number of new parameters of each recipe in each family, written out by hand.

Sizes: D width, F hidden width, E experts, K of them for a token, H adapter width, R LoRA rank,
G shards of a network.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.cases.families import FAMILIES, LAYERS, D, F, Family
from tests.reference import splitting
from tests.reference.papers import camelidae_parameters, lora_parameters

E, K, H, R, G = 4, 2, 16, 4, 2
EMBEDDING = 24


def ffn_parameters(family: Family) -> int:
    gate = 2 if family.gated else 1
    biases = gate * F + D if family.biased else 0
    return gate * D * F + F * D + biases


def lora(family: Family) -> int:
    if family.seven:
        return lora_parameters(LAYERS, D, *family.seven, F, R)
    return LAYERS * R * sum(i + o for i, o in family.linears)


def pesc(family: Family) -> int:
    return camelidae_parameters(family.ffns, D, H, E)


def upcycled(family: Family) -> int:
    return family.ffns * E * (ffn_parameters(family) + D)


def attentive(family: Family, dim: int = 8) -> int:
    """E copies of every network, W_q (dim, D) and W_k (dim, D)."""
    return family.ffns * (E * ffn_parameters(family) + 2 * dim * D)


def grouped(family: Family) -> int:
    """E copies of every network in G shards, each with the second bias, and G router rows each."""
    biases = (G - 1) * D if family.biased else 0
    return family.ffns * E * (ffn_parameters(family) + biases + G * D)


def mpoe(family: Family, central: int = 16 * 6 * 16, own: int = 16 + 256 + 256 + 16) -> int:
    """D = 2 * 2 * 2 * 2 * 2 and F = 2 * 2 * 3 * 2 * 2: a central core (16, 3, 2, 16) for all
    experts of a matrix, and (1, 2, 2, 4), (4, 2, 2, 16), (16, 2, 2, 4), (4, 2, 2, 1) of each."""
    matrices = 3 if family.gated else 2
    biases = (matrices - 1) * F + D if family.biased else 0
    return family.ffns * (matrices * (central + E * own) + biases + E * D)


def mpoe_cut(family: Family) -> int:
    """With bonds of 4: (4, 3, 2, 4), and (1, 2, 2, 4), (4, 2, 2, 4), (4, 2, 2, 4), (4, 2, 2, 1)."""
    return mpoe(family, central=4 * 6 * 4, own=16 + 64 + 64 + 16)


def nexus(family: Family) -> int:
    """The experts, and for each router W1 (2 d, 24) and W2 (d, d); embeddings are no parameters."""
    return family.ffns * (E * ffn_parameters(family) + 2 * D * EMBEDDING + D * D)


def ffn_linears(family: Family) -> list[tuple[int, int]]:
    fused = family is FAMILIES["phi3"]  # GPT-2's fused attention happens to have 2 F outputs too
    return [(i, o) for i, o in family.linears if F in (i, o) or (fused and o == 2 * F)]


def vectors(family: Family) -> int:
    """One vector on keys, values and the FFN's intermediate activation."""
    return family.attentions * 2 * family.kv + family.ffns * F


def mov(family: Family) -> int:
    return E * vectors(family) + E * D * (2 * family.attentions + family.ffns)


def mov_released(family: Family) -> int:
    routers = family.attentions * 2 * family.head + family.ffns * F
    return E * (vectors(family) + routers)


def molora(family: Family) -> int:
    return LAYERS * E * sum(R * (i + o) + i for i, o in family.linears)


def six_loras(family: Family) -> int:
    """LoRA on q, k, v, o, the gate (or up) and down."""
    attention = 2 * (D + family.q) + 2 * (D + family.kv)
    return R * (family.attentions * attention + family.ffns * 2 * (D + F))


def molora_released(family: Family) -> int:
    routers = family.attentions * (3 * D + family.q) + family.ffns * (D + F)
    return E * (six_loras(family) + routers)


def attention_lora(family: Family, rank: int) -> int:
    attention = sum(i + o for i, o in family.linears) - sum(i + o for i, o in ffn_linears(family))
    return LAYERS * rank * attention


def mixlora(family: Family) -> int:
    inside = LAYERS * E * R * sum(i + o for i, o in ffn_linears(family)) + family.ffns * E * D
    return inside + attention_lora(family, R)


def hydralora(family: Family) -> int:
    return LAYERS * sum(R * i + E * R * o + E * i for i, o in ffn_linears(family))


def split(router: int | Callable[[Family], int]) -> Callable[[Family], int]:
    """A router of this size for every network, whose neurons are the dense ones."""

    def new(family: Family) -> int:
        return family.ffns * (router(family) if callable(router) else router)

    return new


def cmoe_router(family: Family) -> int:
    return splitting.analytic_router(D, E - 1, family.gated, family.biased)


def attentions(family: Family) -> int:
    """E attentions with separate projections, and their router; norms of queries and keys once."""
    widths = family.q + 2 * family.kv
    biases = {"llama": widths + D, "qwen2": widths}
    name = next(name for name, other in FAMILIES.items() if other is family)
    one = D * widths + family.q * D + biases.get(name, 0)
    norms = 2 * family.head if name == "qwen3" else 0
    return family.attentions * (E * one + norms + E * D)


def moepp(family: Family) -> int:
    """Two networks, a constant expert and a zero; every router but the first of a stack goes on
    from the one before it."""
    return _networks(family) + family.ffns * (E * D + 3 * D) + _links(family)


def moepp_released(family: Family) -> int:
    """Two networks, a copy and a zero; routers of two layers."""
    return _networks(family) + family.ffns * (8 * E * D + E * 8 * E) + _links(family)


def _networks(family: Family) -> int:
    """Two copies of every network, by the formula of E of them and their router."""
    return (upcycled(family) - family.ffns * E * D) * 2 // E


def _links(family: Family) -> int:
    stacks = 2 if family.ffns > LAYERS else 1
    return (family.ffns - stacks) * E * E
