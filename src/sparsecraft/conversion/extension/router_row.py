"""What routers know of an expert that is added to the others.

Shapes: T tokens, D width, E experts that are there already, M width of a domain's embedding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sparsecraft.conversion.domains.domain import Domain, domain_batches
from sparsecraft.conversion.domains.inputs import read_inputs
from sparsecraft.conversion.domains.router_starts import distinct, embed_domains
from sparsecraft.dense import hub
from sparsecraft.errors import DataError, RecipeError
from sparsecraft.moe.layer import MoELayer
from sparsecraft.surgery.plan import PlannedEdit
from sparsecraft.surgery.record import Conversion

log = logging.getLogger("sparsecraft")

# Most tokens and most batches of a domain that are read; of every STRIDE tokens one is kept.
TOKENS, BATCHES, STRIDE = 8192, 64, 2

# Weight of |r|^2 / 2, with inputs of mean square one.
RIDGE = 1e-2
STEPS = 200

# The probability that a regression in closed form aims at; certainty would need endless logits.
SURE = 0.95


@torch.enable_grad()
def fit_row(
    own_TD: Tensor,
    own_logits_TE: Tensor,
    other_TD: Tensor,
    other_logits_TE: Tensor,
    wanted: float = 1.0,
) -> Tensor:
    """The row r (D,) that gives the added expert its own tokens and leaves the others theirs.

    Beside logits z of the others the softmax gives the added expert
    sigmoid(x . r - logsumexp(z)): a logistic regression with an offset for each token, convex in
    r. Both kinds of tokens weigh the same, however many there are.

    Args:
        wanted: the added expert's probability on its own tokens.
        own_TD: what the router reads of the added expert's tokens.
        own_logits_TE: the others' logits there.
        other_TD: what it reads of other tokens.
        other_logits_TE: the others' logits there.
    """
    tokens, logits = (own_TD, other_TD), (own_logits_TE, other_logits_TE)
    inputs, offsets, size = _scaled(tokens, logits, torch.float32)
    row_D = torch.zeros_like(inputs[0][0], requires_grad=True)
    optimizer = torch.optim.LBFGS([row_D], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        own_T, other_T = (x @ row_D - offset for x, offset in zip(inputs, offsets, strict=True))
        target_T = torch.full_like(own_T, wanted)
        own = F.binary_cross_entropy_with_logits(own_T, target_T)
        wrong = (own + F.softplus(other_T).mean()) / 2
        total = wrong + RIDGE / 2 * row_D.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return row_D.detach() / size


def ridge_row(
    own_TD: Tensor,
    own_logits_TE: Tensor,
    other_TD: Tensor,
    other_logits_TE: Tensor,
    wanted: float = 1.0,
) -> Tensor:
    """As `fit_row`, in closed form: a ridge regression on the row's logits.

    The added expert has probability p of a token where x . r = logsumexp(z) + logit(p). r is the
    minimum of the squares of what is missing to that, p being `wanted` of its own tokens (`SURE` at
    most) and 1 - `SURE` of the others, with both kinds weighing the same, and `RIDGE` |r|^2. DUME
    (arXiv:2603.29765) regresses all rows anew on whose tokens they are, which would change the
    other experts' logits; here these stay, and the targets are relative to them (ours).
    """
    tokens, logits = (own_TD, other_TD), (own_logits_TE, other_logits_TE)
    inputs, offsets, size = _scaled(tokens, logits, torch.float64)
    margins = [math.log(p / (1 - p)) for p in (min(wanted, SURE), 1 - SURE)]
    gram_DD = RIDGE * torch.eye(inputs[0].shape[-1]).to(inputs[0])
    sum_D = torch.zeros_like(gram_DD[0])
    for x_TD, offset_T, margin in zip(inputs, offsets, margins, strict=True):
        gram_DD += x_TD.T @ x_TD / (2 * len(x_TD))
        sum_D += x_TD.T @ (offset_T + margin) / (2 * len(x_TD))
    return (torch.linalg.solve(gram_DD, sum_D) / size).float()


def _scaled(
    tokens: tuple[Tensor, Tensor], logits: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Both kinds of tokens divided by their root mean square, the logsumexp of the others' logits
    there, and that number."""
    inputs = [x_TD.detach().to(dtype) for x_TD in tokens]
    offsets = [z_TE.detach().to(dtype).logsumexp(-1) for z_TE in logits]
    size = torch.cat(inputs).square().mean().sqrt().clamp_min(1e-12)
    return [x_TD / size for x_TD in inputs], offsets, size


# How the row of a linear router is found, by the word that `extend` takes.
FITS = {"calibrated": fit_row, "ridge": ridge_row}


def embedding_of(
    model: nn.Module,
    record: Conversion,
    new: Domain | None,
    given: Tensor | None,
    base: str | Path | PreTrainedModel | None,
    tokenizer: Any,
) -> Tensor:
    """The embedding (M,) of the added expert's domain, checked to differ from every other's."""
    routers = [edit.router for edit in record.recipe.edits if edit.router.of_domains]
    if given is None:
        encoder, *others = sorted({router.scorer.encoder for router in routers})
        if others:
            raise RecipeError(
                f"The routers embed domains by {encoder!r} and {others[0]!r}; no one embedding is "
                "for both."
            )
        dense = _dense(model, record, base) if encoder == "self" else None
        given = embed_domains([new], encoder, dense, tokenizer=tokenizer)[0]
    embeddings = (layer.router.scorer.embeddings for layer in record.layers)
    known_EM = next(known for known in embeddings if known is not None)
    if given.shape != known_EM.shape[1:]:
        raise RecipeError(
            f"The embedding is {tuple(given.shape)} and the routers read "
            f"({known_EM.shape[1]},); embed the domain as the others were."
        )
    names = [*(f"of expert {e}" for e in range(len(known_EM))), "of the new expert"]
    distinct(torch.cat([known_EM, given[None].to(known_EM)]), names)
    return given


def _dense(
    model: nn.Module, record: Conversion, base: str | Path | PreTrainedModel | None
) -> nn.Module:
    """The dense model that embedded the other domains."""
    if isinstance(base, PreTrainedModel):
        return base
    if base is None and record.base is None:
        raise DataError(
            "Domains are embedded by the dense model, which is in no folder that the model knows; "
            "give it as base (--base), or give the embedding."
        )
    name = str(record.base.folder if base is None else base)
    return hub.load_dense(name, dtype=model.dtype, device_map=model.device)


def inputs_of(
    model: nn.Module, plan: Sequence[PlannedEdit], domain: Domain | None, tokenizer: Any
) -> list[Tensor] | None:
    """What each layer reads of some tokens of the domain, (T, D); None where a router decides by
    anything else than a token's input."""
    if domain is None or not all(item.edit.router.by_token for item in plan):
        return None  # what other routers read is not the input of a token
    log.info(f"Reading up to {TOKENS} tokens of {domain.name} for the routers.")
    kept: list[list[Tensor]] = [[] for _ in plan]

    def take(tensors: list[Tensor]) -> None:
        for parts, x_TD in zip(kept, tensors[:-1], strict=True):
            parts.append(x_TD[::STRIDE][:TOKENS].clone())

    batches = domain_batches(model, domain, tokenizer, TOKENS)
    read_inputs(model, plan, islice(batches, BATCHES), take)
    found = [torch.cat(parts) for parts in kept if parts]
    if not found or not len(found[0]):
        raise DataError(f"The domain {domain.name} gave no token.")
    return found


def row_of(
    layer: MoELayer,
    number: int,
    seen: Sequence[list[Tensor] | None],
    embedding: Tensor | None,
    rows: str,
) -> Tensor | None:
    """The added expert's row or embedding in a router; None where all rows are drawn anew.

    Args:
        rows: how it is found, see `FITS`; `reset` draws all anew.
    """
    router = layer.router
    if router.spec.of_domains:
        return embedding
    if rows == "reset":
        return None
    own_TD, other_TD = (of_domain[number] for of_domain in seen)
    own_TE, other_TE = (router(x_TD).logits_TE for x_TD in (own_TD, other_TD))
    # Where weights need not sum to one, outputs grow with the router's confidence: the added
    # expert's probability on its tokens shall equal the others' on theirs.
    sure = 1.0 if router.spec.sums_to_one else other_TE.softmax(-1).amax(-1).mean().item()
    row_D = FITS[rows](own_TD, own_TE, other_TD, other_TE, wanted=sure)
    return row_D * router.spec.temperature


def share_of(layers: Sequence[MoELayer], seen: list[Tensor] | None) -> float | None:
    """The last expert's share of the routing weights, mean over tokens and layers."""
    if seen is None:
        return None
    shares = []
    for layer, x_TD in zip(layers, seen, strict=True):
        weights_TE = layer.router(x_TD).weights_TE()
        # A token without experts, as ReLU routing may leave it, gives the last one nothing.
        sums_T = weights_TE.sum(-1).clamp_min(torch.finfo(weights_TE.dtype).tiny)
        shares.append((weights_TE[:, -1] / sums_T).mean().item())
    return sum(shares) / len(shares)
