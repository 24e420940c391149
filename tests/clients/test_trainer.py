"""transformers' Trainer: the best checkpoint comes back, and a run goes on from one."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

import sparsecraft as sc
from tests import tiny
from tests.clients.starting import RECIPES, converted, logits

pytestmark = pytest.mark.slow
recipes = pytest.mark.parametrize("recipe", RECIPES)


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, len(tiny.tokenizer()), (16, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder, name: str, **settings) -> Trainer:
    torch.manual_seed(0)
    args = TrainingArguments(
        str(folder / "run"),
        max_steps=4,
        per_device_train_batch_size=4,
        save_strategy="steps",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return Trainer(converted(folder, name), args, train_dataset=rows(), eval_dataset=rows())


@recipes
def test_the_best_checkpoint_comes_back(recipe, tmp_path):
    run = trainer(
        tmp_path,
        recipe,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        greater_is_better=recipe != "molora",  # the first is the best, or whichever is
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert torch.equal(logits(run.model), logits(sc.load(best)))
    others = [p for p in (tmp_path / "run").glob("checkpoint-*") if str(p) != best]
    assert others and not any(torch.equal(logits(sc.load(p)), logits(run.model)) for p in others)


@recipes
def test_a_run_goes_on_from_its_checkpoint(recipe, tmp_path):
    whole = trainer(tmp_path, recipe, save_steps=2)
    whole.train()
    again = trainer(tmp_path, recipe, save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    states = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert again.state.global_step == 4
