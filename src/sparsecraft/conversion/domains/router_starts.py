"""What the routers of experts for several domains start from: embeddings of the domains, or what
the routers read of them.

Shapes: B sequences, S positions, T tokens, D width, E experts, M width of the embeddings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.conversion.domains.domain import (
    BATCH,
    ROWS,
    Domain,
    domain_batches,
    length_of,
    mixed_batches,
)
from sparsecraft.conversion.domains.inputs import read_inputs
from sparsecraft.data.batches import as_batches
from sparsecraft.data.sentences import embed
from sparsecraft.errors import DataError, RecipeError
from sparsecraft.moe.init.centers import Centers
from sparsecraft.moe.init.domains import Means, OfDomains
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.routers.starts import gathering
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.surgery.plan import PlannedEdit
from sparsecraft.surgery.record import tokenizer_of

log = logging.getLogger("sparsecraft")


@dataclass(frozen=True, slots=True)
class Starts:
    """What routers start from.

    Attributes:
        names: of the domains, one for each expert.
        tensors: for each planned edit embeddings (E, M), or what experts' tokens are like (E, D).
    """

    names: tuple[str, ...] = ()
    tensors: tuple[Tensor | None, ...] = ()

    def put(self, layers: Sequence[MoELayer]) -> None:
        """Let the routers of the layers, one for each planned edit, start from them."""
        for layer, tensor in zip(layers, self.tensors, strict=bool(self.tensors)):
            if tensor is not None:
                layer.router.scorer.begin(tensor)


@torch.no_grad()
def find_starts(
    model: nn.Module,
    plan: Sequence[PlannedEdit],
    domains: Sequence | Tensor = (),
    data: Any = None,
    *,
    tokenizer: Any = None,
    seed: int = 0,
) -> Starts:
    """Embed the domains of a recipe's experts, which `check_given` has let pass, or read them with
    the dense model.

    Args:
        model: still dense.
        domains: one for each expert, in their order; see `Domain.of`. Or embeddings (E, M).
        data: for starts by `KMeans` without domains.
        tokenizer: None takes that of the model's folder.
        seed: of the first centers of `kmeans`.

    Raises:
        DataError: a domain without data, or two that are the same.
    """
    by_domain = [item.edit.router is not None and item.edit.router.of_domains for item in plan]
    if not len(domains) and any(by_domain):
        log.warning(
            "No domains are given: the embeddings are random, and a later expert has none that "
            "fits them. Give domains=[...] (--domains, --prompts), one for each expert."
        )
    if isinstance(domains, Tensor):
        names = tuple(f"embedding {e}" for e in range(len(domains)))
        return Starts(names, tuple(domains if takes else None for takes in by_domain))
    given = [Domain.of(domain) for domain in domains]
    found = (
        _embeddings(model, plan, given, tokenizer)
        | _from_domains(model, plan, given, tokenizer)
        | _centers(model, plan, given, data, tokenizer, seed)
    )
    tensors = tuple(found.get(n) for n in range(len(plan)))
    return Starts(tuple(domain.name for domain in given), tensors)


def check_given(
    recipe: Recipe, domains: Sequence | Tensor, data: Any, certify: bool = True
) -> None:
    """Refuse domains and data that nothing reads, too many or too few, and routers without theirs.

    Raises:
        RecipeError: so it is.
    """
    edits = [edit for edit in recipe.layers if edit.router is not None]
    by_domain = [edit for edit in edits if edit.router.of_domains]
    hidden, kmeans = (
        [edit for edit in edits if edit.router.starts_from == what] for what in ("domains", "data")
    )
    count = len(domains)
    if count and not (by_domain or hidden or kmeans):
        raise RecipeError(
            f"{count} domains are given (--domains, --prompts) and no router of recipe "
            f"{recipe.name!r} reads them; let its routers start from them by "
            "the start 'hidden' (--set router.start=hidden), or use `nexus`."
        )
    for edit in (*by_domain, *hidden):
        if count and count != edit.experts.num_experts:
            raise RecipeError(
                f"{count} domains are given for {edit.experts.num_experts} experts; give one for "
                "each, in their order, which is that of the sources."
            )
    if hidden and (isinstance(domains, Tensor) or not count):
        raise RecipeError(
            f"router.start={hidden[0].router.scorer.start.kind!r} is made of what the router reads "
            "of each expert's domain; give domains=[...] (--domains, --prompts): a data set or "
            "texts for each expert."
        )
    if kmeans and (isinstance(domains, Tensor) or (not count and data is None)):
        raise RecipeError(
            "router.start='kmeans' takes centers of what the router reads of all data; give "
            "domains=[...] or data=... (--domains, --data)."
        )
    if data is not None and not certify and not (kmeans and not count):
        raise RecipeError(
            "The data would be compared on, and certify=False (--no-certify) compares nothing; "
            "leave one of them out."
        )


def distinct(rows_EM: Tensor, names: Sequence[str]) -> Tensor:
    """The rows, one for each domain.

    Raises:
        DataError: two are equal.
    """
    for j in range(len(rows_EM)):
        for i in range(j):
            if torch.equal(rows_EM[i], rows_EM[j]):
                raise DataError(
                    f"Domains {i} ({names[i]}) and {j} ({names[j]}) are the same, and no router "
                    "can tell their experts apart; give each its own."
                )
    return rows_EM


def embed_domains(
    domains: Iterable[Any],
    encoder: str = "minilm",
    model: nn.Module | None = None,
    *,
    tokenizer: Any = None,
) -> Tensor:
    """The embedding of each domain, (E, M) float32 on the CPU.

    Args:
        domains: see `Domain.of`.
        encoder: of sentences, whose mean it is; or `self`: the mean of the dense model's last
            hidden states (its encoder's, where it has a decoder too) over all real tokens, scaled
            to length one.
        model: the dense model, for `self`.
        tokenizer: its tokenizer; None takes that of its folder.
    """
    given = [Domain.of(domain) for domain in domains]
    if encoder == "self":
        means = Means(len(given))
        _read(model, [], given, tokenizer, lambda tensors, e: means.take(tensors[-1], e))
        return nn.functional.normalize(_rows(means, given), dim=-1).float().cpu()
    return torch.stack([embed(domain.texts(), encoder).mean(0) for domain in given])


def _read(
    model: nn.Module,
    items: Sequence[PlannedEdit],
    domains: Sequence[Domain],
    tokenizer: Any,
    take: Callable[[list[Tensor], int], None],
) -> None:
    """Give `take`, with the domain's number, for each item what its router reads of the domain's
    tokens, (T, D), and behind them the last hidden states."""
    for e, domain in enumerate(domains):
        batches = domain_batches(model, domain, tokenizer)
        read_inputs(model, items, batches, partial(lambda e, tensors: take(tensors, e), e))


def _rows(found: OfDomains, domains: Sequence[Domain]) -> Tensor:
    """What it makes of the domains.

    Raises:
        DataError: a domain had no token.
    """
    if 0 in found.counts:
        name = domains[found.counts.index(0)].name
        raise DataError(f"The domain {name} gave no token.")
    return found.rows()


def _starting_from(what: str, plan: Sequence[PlannedEdit]) -> dict[int, PlannedEdit]:
    """The planned edits, by number, whose routers start from `domains` or from `data`."""
    routers = [item.edit.router for item in plan]
    return {n: plan[n] for n, router in enumerate(routers) if router and router.starts_from == what}


def _embeddings(
    model: nn.Module, plan: Sequence[PlannedEdit], domains: Sequence[Domain], tokenizer: Any
) -> dict[int, Tensor]:
    """For each router of domains their embeddings (E, M), by the number of its planned edit."""
    names = [domain.name for domain in domains]
    found: dict[int, Tensor] = {}
    by_encoder: dict[str, Tensor] = {}
    for n, router in enumerate(item.edit.router for item in plan):
        if domains and router is not None and router.of_domains:
            encoder = router.scorer.encoder
            if encoder not in by_encoder:
                rows_EM = embed_domains(domains, encoder, model, tokenizer=tokenizer)
                by_encoder[encoder] = distinct(rows_EM, names)
            found[n] = by_encoder[encoder]
    return found


def _from_domains(
    model: nn.Module, plan: Sequence[PlannedEdit], domains: Sequence[Domain], tokenizer: Any
) -> dict[int, Tensor]:
    """For each router that starts from domains what it makes of what it reads of them, (E, D)."""
    items = _starting_from("domains", plan)
    if not items:
        return {}
    starts = [item.edit.router.scorer.start for item in items.values()]
    found = [gathering(start, len(domains)) for start in starts]

    def take(tensors: list[Tensor], e: int) -> None:
        for each, x_TD in zip(found, tensors[:-1], strict=True):
            each.take(x_TD, e)

    _read(model, list(items.values()), domains, tokenizer, take)
    names = [domain.name for domain in domains]
    return {n: distinct(_rows(each, domains), names) for n, each in zip(items, found, strict=True)}


def _centers(
    model: nn.Module,
    plan: Sequence[PlannedEdit],
    domains: Sequence[Domain],
    data: Any,
    tokenizer: Any,
    seed: int,
) -> dict[int, Tensor]:
    """For each router that starts from data the centers of what it reads of all, (E, D)."""
    numbered = _starting_from("data", plan)
    if not numbered:
        return {}
    items = list(numbered.values())
    found = [Centers(item.edit.experts.num_experts, seed + n) for n, item in enumerate(items)]

    def take(tensors: list[Tensor]) -> None:
        for centers, x_TD in zip(found, tensors[:-1], strict=True):
            centers.take(x_TD)

    if domains:
        read_inputs(model, items, mixed_batches(model, domains, tokenizer), take)
    else:
        tokenizer = tokenizer or tokenizer_of(model)
        shape = {"batch_size": BATCH, "max_length": length_of(model)}
        batches = as_batches(data, tokenizer, model=model, **shape)
        read_inputs(model, items, islice(batches, ROWS // BATCH), take)
    return {n: centers.centers() for n, centers in zip(numbered, found, strict=True)}
