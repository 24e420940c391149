"""More experts than sources: each further one is mixed from two (UpIT, arXiv 2410.01610).

What an expert changes in the base, over all tensors that experts come from, is its task vector. A
child is the base plus alpha and beta times its parents' task vectors, thinned by DARE. Nothing is
kept: a tensor of a child is made when it is read, from the seed, its name and that tensor of the
sources, of which there are as many in memory as it has ancestors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, combinations_with_replacement

import torch
import xxhash
from torch import Tensor

from sparsecraft.conversion.sources.gather import donor_tensors
from sparsecraft.conversion.sources.source import Source
from sparsecraft.errors import RecipeError
from sparsecraft.recipe.recipe import ExpansionSpec, Recipe
from sparsecraft.surgery.plan import PlannedEdit

# Numbers of a tensor whose products are summed at a time, in float64.
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Child:
    """A network that no source has.

    Attributes:
        expert: its number; sources come first.
        parents: numbers of two experts before it.
        alpha: weight of the first parent's thinned task vector.
        beta: weight of the second's, 1 - alpha.
        cosine: of the parents' task vectors; None where one of them is zero.
    """

    expert: int
    parents: tuple[int, int]
    alpha: float
    beta: float
    cosine: float | None

    def __str__(self) -> str:
        (j, k), cosine = self.parents, self.cosine
        alike = "undefined" if cosine is None else f"{cosine:.3f}"
        return (
            f"Expert {self.expert}: the base, {self.alpha:.3f} of what expert {j} changes and "
            f"{self.beta:.3f} of expert {k}'s (cosine {alike})"
        )


def expand(
    recipe: Recipe,
    plan: Sequence[PlannedEdit],
    sources: Sequence[Source],
    base: Callable[[str], Tensor],
    seed: int = 0,
) -> tuple[list[Source], tuple[Child, ...]]:
    """The sources, and behind them as many children as the recipe has experts beyond them.

    Args:
        base: dense name -> tensor of the model that is converted.
        seed: of the weights, of what is dropped, and of random parents.

    Raises:
        RecipeError: fewer experts than sources, one source to make others from, or edits that have
            not all as many experts.
    """
    if recipe.expansion is None or not sources:
        return list(sources), ()
    wanted = _wanted(recipe, len(sources))
    pool = _Pool(recipe.expansion, sources, base, donor_tensors(plan), seed)
    weights = torch.Generator().manual_seed(seed_of(seed, "weights"))
    while pool.count < wanted:
        j, k = pool.random_pair() if recipe.expansion.parents == "random" else pool.least_similar()
        alpha = torch.rand((), generator=weights, dtype=torch.float64).item()
        pool.children.append(Child(pool.count, (j, k), alpha, 1 - alpha, pool.cosine(j, k)))
    made = [
        replace(
            sources[0],
            name=str(child),
            find=partial(pool.tensor, child.expert),
            tokenizer=lambda: None,
            folder=None,
        )
        for child in pool.children
    ]
    return [*sources, *made], tuple(pool.children)


def _wanted(recipe: Recipe, given: int) -> int:
    counts = {edit.experts.networks for edit in recipe.layers}
    wanted = max(counts)
    if len(counts) > 1:
        raise RecipeError(
            f"The layers of recipe {recipe.name!r} have {sorted(counts)} experts; what is mixed "
            "from sources is the same in all of them, so that they need as many each."
        )
    if wanted < given:
        raise RecipeError(
            f"{given} sources cannot give {wanted} experts; set num_experts={given} or more, or "
            "leave sources out."
        )
    if given == 1 < wanted:
        raise RecipeError(
            f"1 source cannot be expanded to {wanted} experts, each of which is mixed from two; "
            "give two sources at least."
        )
    return wanted


class _Pool:
    """Experts so far: those of the sources, and children of two before them."""

    def __init__(
        self,
        spec: ExpansionSpec,
        sources: Sequence[Source],
        base: Callable[[str], Tensor],
        names: Iterable[str],
        seed: int,
    ):
        self.spec, self.sources, self.base, self.seed = spec, sources, base, seed
        self.names = list(dict.fromkeys(names))
        self.children: list[Child] = []
        self.drawn = torch.Generator().manual_seed(seed_of(seed, "parents"))
        self.dots: dict[tuple[int, int], float] = {}

    @property
    def count(self) -> int:
        return len(self.sources) + len(self.children)

    def tensor(self, e: int, name: str) -> Tensor:
        """The tensor of expert `e`, in float32 at least; it is rounded once, where it is put."""
        return _wide(self.base(name)) + self.changes(name, (e,))[e]

    def changes(self, name: str, wanted: Iterable[int]) -> dict[int, Tensor]:
        """Expert -> its task vector's tensor, of those wanted and of their ancestors, each made
        once: checkpoints of one run are so alike that children soon are parents themselves."""
        needed, base = set(wanted), _wide(self.base(name))
        for child in reversed(self.children):
            needed |= set(child.parents) if child.expert in needed else set()
        found: dict[int, Tensor] = {}
        for e in sorted(needed):
            if e < len(self.sources):
                found[e] = _wide(self.sources[e].tensor(name)) - base
                continue
            child = self.children[e - len(self.sources)]
            first, second = (
                dare(found[parent], self.spec.drop, seed_of(self.seed, e, slot, name))
                for slot, parent in enumerate(child.parents)
            )
            found[e] = first.mul_(child.alpha).add_(second, alpha=child.beta)
        return found

    def least_similar(self) -> tuple[int, int]:
        """The pair with the lowest cosine, the first of equal ones. A task vector of zeros has
        none, and counts as similar to every other: a base among the sources has no children."""
        self._measure(range(self.count))
        pairs = combinations(range(self.count), 2)
        return min(pairs, key=lambda pair: 1.0 if (c := self.cosine(*pair)) is None else c)

    def random_pair(self) -> tuple[int, int]:
        j, k = torch.randperm(self.count, generator=self.drawn)[:2].sort().values.tolist()
        self._measure((j, k))
        return j, k

    def cosine(self, j: int, k: int) -> float | None:
        """Of two task vectors that were measured, j before k."""
        size = math.sqrt(self.dots[j, j] * self.dots[k, k])
        return max(-1.0, min(1.0, self.dots[j, k] / size)) if size else None

    def _measure(self, experts: Iterable[int]) -> None:
        """The products of all pairs of task vectors that are not known, in one pass over them."""
        pairs = combinations_with_replacement(experts, 2)
        totals = {pair: 0.0 for pair in pairs if pair not in self.dots}
        wanted = {e for pair in totals for e in pair}
        for name in self.names if totals else ():
            found = self.changes(name, wanted)
            for j, k in totals:
                totals[j, k] += _dot(found[j].flatten(), found[k].flatten())
        self.dots |= totals


def dare(change: Tensor, drop: float, seed: int) -> Tensor:
    """Each entry zero with probability `drop`, the others divided by 1 - drop (Yu et al. 2024)."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(change.shape, generator=generator, dtype=torch.float32) >= drop
    return change * kept / (1 - drop)


def seed_of(*words: int | str) -> int:
    """A seed of its own for every use of the user's."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, words)).encode()) >> 1


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()  # where the generators are: every device gives the same
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _dot(left: Tensor, right: Tensor) -> float:
    pairs = zip(left.split(CHUNK), right.split(CHUNK), strict=True)
    return sum(torch.dot(a.double(), b.double()).item() for a, b in pairs)
