"""Our configurations, as the rows of PEFT's tables of methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest

import sparsecraft as sc

Kwargs = dict[str, Any]


def _recipe(recipe: sc.Recipe) -> tuple[type, Kwargs]:
    return sc.SparsecraftConfig, {"recipe": recipe}


PESC = {"num_experts": 4, "top_k": 2, "adapter_dim": 4}
CONFIGURATIONS: dict[str, tuple[type, Kwargs]] = {
    "pesc": (sc.PescConfig, PESC),
    "pesc_lora": (sc.PescConfig, PESC | {"lora_r": 2}),
    "mov": (sc.MovConfig, {"num_experts": 3}),
    "mov_top1": (sc.MovConfig, {"num_experts": 3, "top_k": 1}),
    "molora": (sc.MoloraConfig, {"num_experts": 3, "r": 2}),
    "molora_top1": (sc.MoloraConfig, {"num_experts": 3, "r": 2, "top_k": 1}),
    "lora": _recipe(sc.recipes.lora(rank=2)),
    "camel": _recipe(sc.recipes.camel(lora_rank=2)),
    "ia3": _recipe(sc.recipes.ia3()),
    "adapter": _recipe(sc.recipes.adapter(adapter_dim=4, lora_rank=2)),
    "hydralora": _recipe(sc.recipes.hydralora(num_experts=3, rank=2)),
    "mixlora": _recipe(sc.recipes.mixlora(num_experts=4, top_k=2, rank=2)),
    "smola": _recipe(sc.recipes.smola(num_experts=4, rank=2)),
}
"""Every recipe that can be an adapter, under a name without a dash; dashes part it off in an id."""

AT_LINEARS = ("molora", "molora_top1", "lora", "camel", "hydralora", "smola")
"""Those that stand at the Linears of any block, and not at attention or feed-forward networks."""

TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
    "TestTokenClassificationModels": "TOKEN_CLS",
    "TestQuestionAnsweringModels": "QUESTION_ANS",
}


def of_task(owner: str) -> list:
    """Rows `config_cls, config_kwargs` for a module or class of tests."""
    task = {"task_type": TASKS[owner]} if owner in TASKS else {}
    return [
        pytest.param(kind, kwargs | task, id=name)
        for name, (kind, kwargs) in CONFIGURATIONS.items()
    ]


def of_configs() -> list:
    """Rows `config_class, mandatory_kwargs`."""
    return of_task("test_config")


def of_custom_models() -> list:
    """Rows `test_name, model_id, config_cls, config_kwargs`: blocks of Linears, and a bare MLP."""
    rows = [("Blocks", name) for name in (*AT_LINEARS, "pesc", "pesc_lora", "adapter")]
    rows += [("MLP", name) for name in ("pesc", "mov", "lora")]
    return [
        pytest.param(f"{name} {model}", model, *CONFIGURATIONS[name], id=f"{name}-{model}")
        for model, name in rows
    ]


def of_classes() -> list:
    """Rows `config_cls`, each called with PEFT's `target_modules`."""
    return [pytest.param(_targeted(name), id=name) for name in AT_LINEARS]


def _targeted(name: str) -> Callable[..., peft.PeftConfig]:
    kind, kwargs = CONFIGURATIONS[name]

    def configuration(target_modules: list[str], **further: Any) -> peft.PeftConfig:
        recipe = kind(**kwargs).checked_recipe()
        paths = _glob(target_modules)
        edits = tuple(dataclasses.replace(edit, paths=paths) for edit in recipe.edits)
        return kind(recipe=dataclasses.replace(recipe, edits=edits), **further)

    configuration.__name__ = kind.__name__
    return configuration


def _glob(paths: list[str]) -> str:
    """One glob for paths of the same length that differ in digits."""
    columns: Iterator[tuple[str, ...]] = zip(*paths, strict=True)
    return "".join(c[0] if len(set(c)) == 1 else f"[{''.join(c)}]" for c in columns)
