"""What the routers of experts for several domains start from: embeddings of the domains, or what
the routers read of them.

Shapes: B sequences, S positions, T tokens, D width, E experts, M width of the embeddings.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft import hub
from sparsecraft.certificate import evaluation_mode
from sparsecraft.data import as_batches, collate, pad_id
from sparsecraft.encoding import row_ids
from sparsecraft.errors import DataError, RecipeError
from sparsecraft.gating import FROM_DATA
from sparsecraft.init.centers import Centers
from sparsecraft.layer import MoELayer
from sparsecraft.origin import Origin
from sparsecraft.planning import PlannedEdit, reads
from sparsecraft.recipe import Recipe
from sparsecraft.rows import load_rows
from sparsecraft.sentences import embed

log = logging.getLogger("sparsecraft")

# Rows of a data set that are taken, tokens of a row, rows of a forward pass; and the tokens of a
# domain after which the model reads no further: the sentence encoder is much smaller.
ROWS, LENGTH, BATCH, TOKENS = 512, 512, 8, 16_384


@dataclass(frozen=True, slots=True)
class Domain:
    """The data of one expert.

    Attributes:
        name: for reports.
        rows: canonical rows; None where batches were given.
        batches: dicts of model inputs; None where rows were.
    """

    name: str
    rows: list[dict] | None = None
    batches: list[dict[str, Any]] | None = None

    @classmethod
    def of(cls, given: Any) -> Domain:
        """From a file, folder or hub data set, of which `ROWS` rows are taken, evenly spaced and
        shuffled; a list of texts; or an iterable of batches, token ids (B, S) or dicts of model
        inputs.

        Raises:
            DataError: none of these, or nothing in it.
        """
        if isinstance(given, (str, Path)):
            rows = load_rows(given)
            name, count = str(given), len(rows)
            if count > ROWS:
                places = [i * count // ROWS for i in range(ROWS)]
                rows = rows.select(random.Random(0).sample(places, ROWS))
                name += f" ({ROWS} of {count} rows)"
            found = cls(name, rows=list(rows))
        elif isinstance(given, (list, tuple)) and all(isinstance(text, str) for text in given):
            found = cls(f"{len(given)} texts", rows=[{"text": text} for text in given])
        else:
            batches = list(as_batches(given))
            found = cls(f"{len(batches)} batches", batches=batches)
        if not (found.rows or found.batches):
            raise DataError(f"A domain holds nothing ({found.name}); give it rows or texts.")
        return found

    def texts(self) -> list[str]:
        """The whole text of every row.

        Raises:
            DataError: there are tokens only.
        """
        if self.rows is None:
            raise DataError(
                "A sentence encoder embeds texts, and a domain is given as batches of tokens; give "
                "texts or a data set, or convert with encoder='self'."
            )
        return [
            row["text"]
            if row.get("messages") is None
            else "\n\n".join(message["content"] for message in row["messages"])
            for row in self.rows
        ]


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
    recipe: Recipe,
    plan: Sequence[PlannedEdit],
    domains: Sequence | Tensor = (),
    data: Any = None,
    *,
    tokenizer: Any = None,
    seed: int = 0,
) -> Starts:
    """Embed the domains of a recipe's experts, or read them with the dense model.

    Args:
        model: still dense.
        domains: one for each expert, in their order; see `Domain.of`. Or embeddings (E, M).
        data: for `init="kmeans"` without domains.
        tokenizer: None takes that of the model's folder.
        seed: of the first centers of `kmeans`.

    Raises:
        RecipeError: a router needs domains that were not given, or the reverse; a wrong number.
        DataError: a domain without data, or two that are the same.
    """
    routers = [item.edit.router for item in plan]
    check_given(recipe, domains, data)
    if not len(domains) and any(r is not None and r.scorer == "domain" for r in routers):
        log.warning(
            "No domains are given: the embeddings are random, and a later expert has none that "
            "fits them. Give domains=[...] (--domains, --prompts), one for each expert."
        )
    if isinstance(domains, Tensor):
        names = tuple(f"embedding {e}" for e in range(len(domains)))
        by_domain = [r is not None and r.scorer == "domain" for r in routers]
        return Starts(names, tuple(domains if takes else None for takes in by_domain))
    given = [Domain.of(domain) for domain in domains]
    names = tuple(domain.name for domain in given)
    tensors: list[Tensor | None] = [None] * len(plan)
    embeddings: dict[str, Tensor] = {}
    for n, router in enumerate(routers):
        if given and router is not None and router.scorer == "domain":
            if router.encoder not in embeddings:
                found = embed_domains(given, router.encoder, model, tokenizer=tokenizer)
                embeddings[router.encoder] = _distinct(found, names)
            tensors[n] = embeddings[router.encoder]
    for init in FROM_DATA:
        places = [n for n, router in enumerate(routers) if router and router.init == init]
        items = [plan[n] for n in places]
        if not items:
            continue
        if init == "hidden":
            found = [_distinct(t, names) for t in _means(model, items, given, tokenizer)[:-1]]
        else:
            found = _centers(model, items, given, data, tokenizer, seed)
        for n, tensor in zip(places, found, strict=True):
            tensors[n] = tensor
    return Starts(names, tuple(tensors))


def check_given(recipe: Recipe, domains: Sequence | Tensor, data: Any) -> None:
    """Refuse domains that nobody reads, too many or too few, and routers that lack theirs.

    Raises:
        RecipeError: so it is.
    """
    edits = [edit for edit in recipe.edits if edit.router is not None]
    by_domain = [edit for edit in edits if edit.router.scorer == "domain"]
    hidden, kmeans = ([e for e in edits if e.router.init == init] for init in FROM_DATA)
    count = len(domains)
    if count and not (by_domain or hidden or kmeans):
        raise RecipeError(
            f"{count} domains are given (--domains, --prompts) and no router of recipe "
            f"{recipe.name!r} reads them; let its routers start from them by router.init='hidden' "
            "(--set router.init=hidden), or use `nexus`."
        )
    for edit in (*by_domain, *hidden):
        if count and count != edit.experts.num_experts:
            raise RecipeError(
                f"{count} domains are given for {edit.experts.num_experts} experts; give one for "
                "each, in their order, which is that of the sources."
            )
    if hidden and (isinstance(domains, Tensor) or not count):
        raise RecipeError(
            "router.init='hidden' is the mean of what the router reads of each expert's domain; "
            "give domains=[...] (--domains, --prompts): a data set or texts for each expert."
        )
    if kmeans and (isinstance(domains, Tensor) or (not count and data is None)):
        raise RecipeError(
            "router.init='kmeans' takes centers of what the router reads of all data; give "
            "domains=[...] or data=... (--domains, --data)."
        )


def _distinct(rows_EM: Tensor, names: Sequence[str]) -> Tensor:
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
    given = [d if isinstance(d, Domain) else Domain.of(d) for d in domains]
    if encoder == "self":
        last_EM = _means(model, [], given, tokenizer)[-1]
        return nn.functional.normalize(last_EM, dim=-1).float().cpu()
    return torch.stack([embed(domain.texts(), encoder).mean(0) for domain in given])


# --------------------------------------------------------------------------- what the routers read


def _means(
    model: nn.Module, items: Sequence[PlannedEdit], domains: Sequence[Domain], tokenizer: Any
) -> list[Tensor]:
    """For each item the mean of what its router reads of each domain, (E, D) float64, and behind
    them that of the last hidden states."""
    means: list[list[Tensor]] = []
    for domain in domains:
        sums, counts = [0.0] * (len(items) + 1), [0] * (len(items) + 1)

        def take(tensors: list[Tensor], sums=sums, counts=counts) -> None:
            for n, x_TD in enumerate(tensors):
                sums[n] = sums[n] + x_TD.double().sum(0)
                counts[n] += len(x_TD)

        _read(model, items, _batches(model, domain, tokenizer), take)
        if not all(counts):
            raise DataError(f"The domain {domain.name} gave no token.")
        means.append([total / count for total, count in zip(sums, counts, strict=True)])
    return [torch.stack(of_domains) for of_domains in zip(*means, strict=True)]


def _centers(
    model: nn.Module,
    items: Sequence[PlannedEdit],
    domains: Sequence[Domain],
    data: Any,
    tokenizer: Any,
    seed: int,
) -> list[Tensor]:
    """For each item the centers of what its router reads of all data, (E, D)."""
    found = [Centers(item.edit.experts.num_experts, seed + n) for n, item in enumerate(items)]

    def take(tensors: list[Tensor]) -> None:
        for centers, x_TD in zip(found, tensors[:-1], strict=True):
            centers.take(x_TD)

    if domains:
        _read(model, items, _mixed(model, domains, tokenizer), take)
    else:
        tokenizer = tokenizer or _tokenizer(model)
        batches = as_batches(data, tokenizer, max_length=_length(model), batch_size=BATCH)
        _read(model, items, islice(batches, ROWS // BATCH), take)
    return [centers.centers() for centers in found]


def _read(
    model: nn.Module,
    items: Sequence[PlannedEdit],
    batches: Iterable[dict[str, Any]],
    take: Callable[[list[Tensor]], None],
) -> None:
    """Give `take`, for every batch, what the router of each item reads of its real tokens, (T, D),
    and the last hidden states of the real tokens."""
    seen: dict[int, Tensor] = {}
    whose = [reads(model, item.site.path) for item in items]

    def keep(n: int) -> Callable:
        return lambda module, args: seen.update({n: args[0]})

    handles = [
        model.get_submodule(item.site.path).register_forward_pre_hook(keep(n))
        for n, item in enumerate(items)
    ]
    try:
        with evaluation_mode(model), torch.no_grad():
            for batch in batches:
                inputs, masks = _inputs(model, batch)
                output = model.base_model(**inputs)
                last = getattr(output, "encoder_last_hidden_state", None)
                last = output.last_hidden_state if last is None else last
                read = [_real(seen[n], masks.get(whose[n])) for n in range(len(items))]
                take([*read, _real(last, masks["input"])])
    finally:
        for handle in handles:
            handle.remove()


def _inputs(
    model: nn.Module, batch: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    """The batch as the model takes it, and of whose tokens which are real."""
    inputs = {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for key, value in batch.items()
        if isinstance(value, Tensor) and key not in ("labels", "token_mask")
    }
    masks = {"input": inputs.get("attention_mask")}
    if getattr(model.config, "is_encoder_decoder", False):
        masks["decoder"] = inputs.get("decoder_attention_mask")
        if "decoder_input_ids" not in inputs:  # the decoder reads the same text
            inputs["decoder_input_ids"], masks["decoder"] = inputs["input_ids"], masks["input"]
    return inputs, masks


def _real(x: Tensor, mask_BS: Tensor | None) -> Tensor:
    x_TD = x.reshape(-1, x.shape[-1])
    return x_TD if mask_BS is None else x_TD[mask_BS.reshape(-1).to(x.device, torch.bool)]


def _batches(model: nn.Module, domain: Domain, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """The domain as model inputs, chats as the tokenizer's template has them, long rows cut; up to
    about `TOKENS` tokens of text, and all batches."""
    if domain.batches is not None:
        yield from domain.batches
        return
    tokenizer = tokenizer or _tokenizer(model)
    if tokenizer is None:
        raise DataError(f"The domain {domain.name} is text; pass the model's tokenizer.")
    length, pad = _length(model), pad_id(tokenizer)
    decodes = model.can_generate() and not model.config.is_encoder_decoder
    count = 0
    for start in range(0, len(domain.rows), BATCH):
        features = []
        for row in domain.rows[start : start + BATCH]:
            ids = row_ids(row, tokenizer, adds_bos_only=decodes)[:length]
            if not ids:
                raise DataError(f"A row of the domain {domain.name} has no token; leave it out.")
            features.append({"input_ids": ids, "labels": ids})
        yield collate(features, pad)
        count += sum(len(feature["input_ids"]) for feature in features)
        if count >= TOKENS:
            return


def _mixed(model: nn.Module, domains: Sequence[Domain], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """A batch of each domain in turn, so that the first ones already tell of all."""
    turns = [_batches(model, domain, tokenizer) for domain in domains]
    while turns:
        for batches in tuple(turns):
            batch = next(batches, None)
            if batch is None:
                turns.remove(batches)
            else:
                yield batch


def _tokenizer(model: nn.Module) -> Any:
    origin = Origin.of(model)
    return origin and hub.load_tokenizer(origin.folder)


def _length(model: nn.Module) -> int:
    return min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH)
