"""What a training run does with what was left open: the user's values, the recipe's, a CPU's."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

from torch import nn

from sparsecraft.dense import loading
from sparsecraft.dense.tokens import positions_of
from sparsecraft.errors import SparsecraftError, check_seed, did_you_mean
from sparsecraft.moe.names import dense_name
from sparsecraft.recipe.recipe import Recipe
from sparsecraft.recipe.stages import Fit, Stage
from sparsecraft.training.arguments import on_cpu
from sparsecraft.training.options import TrainOptions

log = logging.getLogger("sparsecraft")

# On a CPU the papers' batches would take hours a step.
CPU_BATCH_SIZE, CPU_MAX_LENGTH = 8, 512
CPU_FIT_TOKENS = 16_384
MICRO_BATCH_TOKENS = 16_384


def checked(options: dict[str, Any]) -> TrainOptions:
    """The options of a run, checked."""
    known = {field.name for field in dataclasses.fields(TrainOptions)}
    for name in options:
        if name not in known:
            raise SparsecraftError(f"train has no option {name!r}." + did_you_mean(name, known))
    asked = TrainOptions(**options)
    whole = (
        "steps",
        "batch_size",
        "micro_batch",
        "max_length",
        "save_every",
        "log_every",
        "fit_tokens",
    )
    for name in (*whole, "epochs", "learning_rate", "router_learning_rate"):
        value = getattr(asked, name)
        kinds = int if name in whole else (int, float)
        if value is not None and not (isinstance(value, kinds) and 0 < value < math.inf):
            raise SparsecraftError(
                f"{name} is {value!r}; it must be a positive "
                f"{'whole number' if name in whole else 'number'}."
            )
    check_seed(asked.seed)
    if isinstance(asked.trackers, str):
        asked = dataclasses.replace(asked, trackers=(asked.trackers,))
    _check_trackers(asked.trackers)
    return asked


def _check_trackers(names: tuple[str, ...]) -> None:
    from transformers.integrations import integration_utils as known

    for name in names:
        if name not in known.INTEGRATION_TO_CALLBACK:
            what = f"trackers holds {name!r}, which transformers does not know."
            raise SparsecraftError(what + did_you_mean(name, known.INTEGRATION_TO_CALLBACK))
        if name not in known.get_available_reporting_integrations():
            raise SparsecraftError(
                f"trackers holds {name!r}, whose package is not installed; run "
                f"`pip install {name}`, or leave it out."
            )


def fill(model: nn.Module, stage: Stage | Fit, asked: TrainOptions) -> TrainOptions:
    """The user's values, and the recipe's for what was left open."""
    longest = positions_of(model)
    length = CPU_MAX_LENGTH if on_cpu() else stage.max_length
    defaults = {
        "batch_size": CPU_BATCH_SIZE if on_cpu() else stage.batch_size,
        "max_length": min(length, longest) if longest else length,
        "learning_rate": stage.learning_rate,
        "schedule": "constant" if isinstance(stage, Fit) else stage.schedule,
        "epochs": 1.0 if stage.epochs is None else float(stage.epochs),
    }
    if on_cpu():
        _say_smaller(stage, asked)
    filled = {key: value for key, value in defaults.items() if getattr(asked, key) is None}
    settings = dataclasses.replace(asked, **filled)
    router = settings.router_learning_rate
    if router is None and asked.learning_rate is None and isinstance(stage, Stage):
        router = stage.router_learning_rate
    fits = max(1, MICRO_BATCH_TOKENS // settings.max_length)
    if longest and settings.max_length > longest:
        raise SparsecraftError(
            f"max_length is {settings.max_length} and the model has {longest} positions."
        )
    return dataclasses.replace(
        settings,
        packing=settings.packing and objective_of(model) == "causal",
        router_learning_rate=settings.learning_rate if router is None else router,
        micro_batch=settings.micro_batch or min(settings.batch_size, fits),
    )


def objective_of(model: nn.Module) -> str:
    """What a model is trained for: causal, seq2seq or classification."""
    if (found := loading.objective_of(model)) is not None:
        return found
    raise SparsecraftError(
        f"{loading.without_objective(model, 'sc.train')} Train others in a loop or trainer of your "
        "own, where the model's own loss holds the recipe's auxiliary losses."
    )


def _say_smaller(stage: Stage | Fit, asked: TrainOptions) -> None:
    """Say which of the recipe's values a CPU has others for."""
    smaller = []
    if asked.batch_size is None:
        smaller.append(f"{CPU_BATCH_SIZE} sequences a step, and not {stage.batch_size}")
    if asked.max_length is None:
        smaller.append(f"at most {CPU_MAX_LENGTH} tokens a sequence, and not {stage.max_length}")
    if smaller:
        log.info(f"On a CPU, by default: {'; '.join(smaller)} as the recipe says.")


def stages_of(recipe: Recipe, asked: tuple[str, ...]) -> list[tuple[int, Stage | Fit]]:
    """The stages to run, with their numbers; all of them unless some are named.

    Raises:
        SparsecraftError: no stage has that name.
    """
    names = [stage.name for stage in recipe.stages]
    for name in asked:
        if name not in names:
            raise SparsecraftError(
                f"Recipe {recipe.name!r} has no stage {name!r}." + did_you_mean(name, names)
            )
    return [(n, s) for n, s in enumerate(recipe.stages) if not asked or s.name in asked]


def fit_tokens(stage: Fit, settings: TrainOptions) -> int:
    """Inputs of each network that a stage captures."""
    if settings.fit_tokens is not None:
        return settings.fit_tokens
    if on_cpu() and stage.tokens > CPU_FIT_TOKENS:
        log.info(
            f"On a CPU, by default: routers are fitted to {CPU_FIT_TOKENS} tokens; the recipe "
            f"says {stage.tokens} (--fit-tokens)."
        )
        return CPU_FIT_TOKENS
    return stage.tokens


def disk_of(model: nn.Module) -> int:
    """Bytes that a run writes: the checkpoint's, and of a state for resume weights and moments."""
    return 4 * sum(
        p.nbytes
        for n, p in model.named_parameters()
        if p.requires_grad or dense_name(model, n) is None
    )
