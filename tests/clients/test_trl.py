"""TRL's trainers on our folders, by path and by model."""

from __future__ import annotations

import math

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

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


@recipes
def test_a_reference_of_a_trained_lora_has_the_lora(recipe, tmp_path):
    """TRL copies it; without it the reference would be another model than the policy."""
    model = sc.load(checkpoint(tmp_path, recipe))
    without = logits(model)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    targets = [n for n in linears if n.removesuffix(".base").endswith(("v_proj", "o_proj"))]
    lora = LoraConfig(target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    assert (logits(model) - without).abs().max() > 1e-3
    args = DPOConfig(str(tmp_path / "out"), learning_rate=0.0, **QUIET)
    trainer = DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tiny.tokenizer())
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([math.log(2)] * 2, abs=1e-4)


def labeled() -> datasets.Dataset:
    rows = [{"prompt": "say ", "completion": w, "label": w < "n"} for w in tiny.WORDS]
    return datasets.Dataset.from_list(rows)


@recipes
@pytest.mark.parametrize("by", ["path", "model"])
def test_kto_starts_with_policy_and_reference_alike(recipe, by, tmp_path):
    folder = checkpoint(tmp_path, recipe)
    args = KTOConfig(str(tmp_path / "out"), learning_rate=0.0, **QUIET)
    model = folder if by == "path" else sc.load(folder)
    trainer = KTOTrainer(
        model, args=args, train_dataset=labeled(), processing_class=tiny.tokenizer()
    )
    assert torch.equal(logits(trainer.ref_model), logits(trainer.model))
    trainer.train()
    assert logged(trainer, "kl") == [0.0] * 2
    assert logged(trainer, "loss") == pytest.approx([0.5] * 2, abs=1e-6)  # 1 - sigmoid(0)


def words() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": word} for word in tiny.WORDS])


def variety(completions, **_) -> list[float]:
    return [float(len(set(text))) for text in completions]


# Both sample completions, and compare with a reference that they load by the policy's name.
SAMPLING = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
FEW = {"num_generations": 2, "max_completion_length": 4}


@recipes
@pytest.mark.parametrize("by", ["path", "model"])
@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_trainers_start_without_divergence(recipe, by, name, tmp_path):
    folder, (cls, config) = checkpoint(tmp_path, recipe), SAMPLING[name]
    own = {"beta": 0.1, "disable_dropout": True, **FEW}
    args = config(str(tmp_path / "out"), learning_rate=0.0, **own, **QUIET)
    model, data = folder if by == "path" else sc.load(folder), {"train_dataset": words()}
    trainer = cls(model, variety, args=args, processing_class=tiny.tokenizer(), **data)
    assert torch.equal(logits(trainer.ref_model), logits(trainer.model))
    trainer.train()
    assert logged(trainer, "kl") == pytest.approx([0.0] * 2, abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "kto", *SAMPLING])
def test_of_a_model_that_is_not_saved_a_reference_is_refused(name, tmp_path):
    named = {"dpo": (DPOTrainer, DPOConfig, pairs), "kto": (KTOTrainer, KTOConfig, labeled)}
    cls, config, rows = named.get(name) or (*SAMPLING[name], words)
    own = {"beta": 0.1, **FEW} if name in SAMPLING else {}
    given = {"args": config(str(tmp_path / "out"), **own, **QUIET), "train_dataset": rows()}
    given |= {"reward_funcs": variety} if name in SAMPLING else {}
    with pytest.raises(Exception, match=r"not saved yet: call sc\.save"):
        cls(converted(tmp_path, "molora"), processing_class=tiny.tokenizer(), **given)


@recipes
def test_a_reward_model_is_trained_and_asked(recipe, tmp_path):
    policy = checkpoint(tmp_path, recipe)
    scores = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    scores.save_pretrained(tmp_path / "scores")
    tiny.tokenizer().save_pretrained(tmp_path / "scores")
    scores = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scores")
    sc.convert(scores, RECIPES[recipe]())
    folder = str(sc.save(scores, tmp_path / "moe scores"))
    args = RewardConfig(str(tmp_path / "out"), learning_rate=0.01, **QUIET)
    given = {"train_dataset": pairs(), "processing_class": tiny.tokenizer()}
    with pytest.raises(
        sc.SparsecraftError, match="holds a LlamaForCausalLM, which AutoModelForSeq"
    ):
        RewardTrainer(policy, args=args, **given)
    trainer = RewardTrainer(folder, args=args, **given)
    before = logits(trainer.model)
    assert torch.equal(before, logits(sc.load(folder)))
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    trained = logits(sc.load(tmp_path / "trained"))
    assert torch.equal(trained, logits(trainer.model)) and not torch.equal(trained, before)
    args = GRPOConfig(str(tmp_path / "grpo"), **FEW, **QUIET)
    given["train_dataset"] = words()
    trainer = GRPOTrainer(policy, str(tmp_path / "trained"), args=args, **given)
    assert torch.equal(logits(trainer.reward_funcs[0]), trained)
    trainer.train()


@recipes
@pytest.mark.parametrize("student", ["moe", "base"])
def test_a_converted_model_teaches(recipe, student, tmp_path):
    teacher = checkpoint(tmp_path, recipe)
    rows = [{"prompt": m[:1], "completion": m[1:]} for m in chats()["messages"]]
    own = {"learning_rate": 0.0, "max_completion_length": 4, "disable_dropout": True}
    trainer = DistillationTrainer(
        str(tmp_path / student),
        teacher,
        args=DistillationConfig(str(tmp_path / "out"), **own, **QUIET),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    assert torch.equal(logits(trainer.teacher_model), logits(sc.load(teacher)))
    trainer.train()
    far = max(logged(trainer, "loss"))
    assert far < 1e-6 if student == "moe" else far > 1e-3
