"""TRL's trainers on our folders, by path and by model."""

from __future__ import annotations

import math

import datasets
import pytest
import torch
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import sparsecraft as sc
from tests import tiny
from tests.clients.starting import RECIPES, checkpoint, converted, logits

pytestmark = pytest.mark.slow
recipes = pytest.mark.parametrize("recipe", RECIPES)
QUIET = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def chats() -> datasets.Dataset:
    return datasets.Dataset.from_list(tiny.chat_rows(8))


def pairs() -> datasets.Dataset:
    words = zip(tiny.WORDS, tiny.WORDS[1:], strict=False)
    return datasets.Dataset.from_list(
        [{"prompt": "say ", "chosen": a, "rejected": b} for a, b in words]
    )


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@recipes
def test_sft_by_path_saves_what_it_trained(recipe, tmp_path):
    folder = checkpoint(tmp_path, recipe)
    args = SFTConfig(str(tmp_path / "out"), learning_rate=0.01, max_length=32, **QUIET)
    trainer = SFTTrainer(folder, args, train_dataset=chats())
    before = logits(trainer.model)
    assert torch.equal(before, logits(sc.load(folder)))
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert not torch.equal(logits(trainer.model), before)
    assert torch.equal(logits(sc.load(tmp_path / "final")), logits(trainer.model))


def test_sft_of_a_model_that_is_not_saved_takes_the_bases_tokenizer(tmp_path):
    model = converted(tmp_path, "molora")
    trainer = SFTTrainer(model, SFTConfig(str(tmp_path / "out"), **QUIET), train_dataset=chats())
    assert trainer.processing_class.get_vocab() == tiny.tokenizer().get_vocab()


@recipes
@pytest.mark.parametrize("by", ["path", "model"])
def test_dpo_starts_with_policy_and_reference_alike(recipe, by, tmp_path):
    folder = checkpoint(tmp_path, recipe)
    args = DPOConfig(str(tmp_path / "out"), learning_rate=0.0, **QUIET)
    model = folder if by == "path" else sc.load(folder)
    trainer = DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tiny.tokenizer())
    assert torch.equal(logits(trainer.ref_model), logits(trainer.model))
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([math.log(2)] * 2, abs=1e-4)


def test_dpo_of_a_model_that_is_not_saved_says_to_save_it(tmp_path):
    model = converted(tmp_path, "molora")
    args = DPOConfig(str(tmp_path / "out"), **QUIET)
    with pytest.raises(Exception, match=r"not saved yet: call sc\.save"):
        DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tiny.tokenizer())


@recipes
def test_grpo_starts_without_divergence(recipe, tmp_path):
    folder = checkpoint(tmp_path, recipe)
    own = {"beta": 0.1, "num_generations": 2, "max_completion_length": 4, "disable_dropout": True}
    args = GRPOConfig(str(tmp_path / "out"), learning_rate=0.0, **own, **QUIET)
    trainer = GRPOTrainer(
        sc.load(folder),
        lambda completions, **_: [float(len(set(text))) for text in completions],
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": word} for word in tiny.WORDS]),
        processing_class=tiny.tokenizer(),
    )
    assert torch.equal(logits(trainer.ref_model), logits(trainer.model))
    trainer.train()
    assert logged(trainer, "kl") == pytest.approx([0.0] * 2, abs=1e-6)
