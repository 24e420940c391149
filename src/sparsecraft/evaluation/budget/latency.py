"""How long one forward pass takes at several budgets, in one run and in turn.

A causal model predicts one token for each of B sequences, whose tokens before are in its cache, as
`generate` does. Another model reads a batch of B rows. Passes are eager: no graph, no compilation.

Shapes: B sequences, S tokens before.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsecraft.dense.loading import objective_of
from sparsecraft.dense.tokens import CACHES, is_encoder_decoder, positions_of
from sparsecraft.errors import DataError
from sparsecraft.evaluation.budget.loads import NOT_READ, Batch
from sparsecraft.moe.outputs import decoder_ids, evaluation_mode

CONTEXT, ROUNDS = 128, 20


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one pass: median and quartiles; and the median over that of the first
    setting, which is the dense function."""

    median: float
    low: float
    high: float
    relative: float


def latencies(
    model: nn.Module,
    settings: Sequence[Callable[[], None]],
    batches: Sequence[Batch],
    *,
    batch_size: int,
    context: int = CONTEXT,
    rounds: int = ROUNDS,
) -> list[Latency]:
    """One for each setting.

    Args:
        settings: functions that put the model into the state to be timed; the first one's is what
            the others are compared with.
        batches: where the tokens come from, repeated if there are too few.
        context: tokens in a causal model's cache.
        rounds: times that each setting is timed. Every round begins with another setting, so that
            a machine that slows down or warms up does so for all.
    """
    causal = objective_of(model) == "causal"
    times: list[list[float]] = [[] for _ in settings]
    with evaluation_mode(model), torch.no_grad():
        steps = []
        for use in settings:
            use()
            steps.append(
                _next_token(model, batches, batch_size, context)
                if causal
                else _whole(model, batches, batch_size)
            )
        for turn in range(rounds):
            for place in range(len(settings)):
                number = (turn + place) % len(settings)
                settings[number]()
                _timed(model, steps[number])  # what the setting before left in caches
                times[number].append(_timed(model, steps[number]))
    dense = statistics.median(times[0])
    found = []
    for own in times:
        quartiles = statistics.quantiles(own, n=4) if len(own) > 1 else own * 3
        median = statistics.median(own)
        found.append(Latency(median, quartiles[0], quartiles[2], median / dense))
    return found


Step = Callable[[], Callable[[], object]]


def _timed(model: nn.Module, prepare: Step) -> float:
    """Milliseconds of what `prepare` gives, its preparation left out."""
    step = prepare()
    _wait(model)
    start = time.perf_counter()
    step()
    _wait(model)
    return 1e3 * (time.perf_counter() - start)


def _wait(model: nn.Module) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _next_token(model: nn.Module, batches: Sequence[Batch], size: int, context: int) -> Step:
    positions = positions_of(model)
    context = min(context, positions - 1) if positions else context
    ids_BS = _tokens(batches, size * (context + 1)).view(size, context + 1).to(model.device)
    read = model(input_ids=ids_BS[:, :-1], use_cache=True)
    name = next(name for name in CACHES if name in read)

    def prepare() -> Callable[[], object]:
        own = {name: copy.deepcopy(read[name])}  # a pass adds to it
        return lambda: model(input_ids=ids_BS[:, -1:], use_cache=True, **own)

    return prepare


def _tokens(batches: Sequence[Batch], count: int) -> Tensor:
    """Real tokens of the data, in order."""
    found, have = [], 0
    for batch in batches:
        ids, mask = batch["input_ids"].flatten(), batch.get("attention_mask")
        found.append(ids if mask is None else ids[mask.flatten().bool()])
        have += len(found[-1])
        if have >= count:
            break
    if not have:
        raise DataError("The data holds no token to time a pass with.")
    return torch.cat(found).repeat(-(-count // have))[:count]


def _whole(model: nn.Module, batches: Sequence[Batch], size: int) -> Step:
    batch = max(batches, key=lambda b: len(next(iter(b.values()))))
    inputs = {key: value for key, value in batch.items() if key not in NOT_READ}
    rows = torch.arange(size) % len(next(iter(inputs.values())))
    inputs = {key: value[rows.to(value.device)].to(model.device) for key, value in inputs.items()}
    if is_encoder_decoder(model) and "labels" in batch:
        labels = batch["labels"][rows].to(model.device)
        inputs["decoder_input_ids"] = decoder_ids(model, labels)
    return lambda: lambda: model(**inputs)
