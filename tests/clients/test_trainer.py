"""transformers' Trainer: the best checkpoint comes back, and a run goes on from one."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
import torch
from transformers import Trainer, TrainingArguments

import sparsecraft as sc
from tests import tiny
from tests.clients.starting import RECIPES, checkpoint, converted, logits

pytestmark = pytest.mark.slow
recipes = pytest.mark.parametrize("recipe", RECIPES)


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, len(tiny.tokenizer()), (16, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, **settings) -> TrainingArguments:
    return TrainingArguments(
        str(folder / "run"),
        max_steps=4,
        per_device_train_batch_size=4,
        save_strategy="steps",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )


def trainer(folder, name: str, **settings) -> Trainer:
    torch.manual_seed(0)
    args = arguments(folder, **settings)
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


@recipes
def test_a_run_goes_on_after_its_folder_has_moved(recipe, tmp_path):
    whole = trainer(tmp_path, recipe, save_steps=2)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run").rename(tmp_path / "moved")
    again = trainer(tmp_path, recipe, save_steps=2)
    again.args.output_dir = str(tmp_path / "moved")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    states = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@recipes
def test_what_it_saves_and_measures_is_the_model_in_memory(recipe, tmp_path):
    run = trainer(tmp_path, recipe)
    run.compute_metrics = lambda found: {"sum": float(found.predictions.sum())}
    run.train()
    inputs = torch.stack([row["input_ids"] for row in rows()])
    with torch.no_grad():
        wanted = run.model.eval()(inputs, labels=inputs)
    measured = run.evaluate()
    assert measured["eval_sum"] == pytest.approx(wanted.logits.sum().item(), abs=1e-2)
    assert measured["eval_loss"] == pytest.approx(wanted.loss.item(), abs=1e-4)
    run.save_model(tmp_path / "final")
    assert torch.equal(logits(sc.load(tmp_path / "final")), logits(run.model))


@recipes
def test_every_trial_begins_with_the_model_of_the_folder(recipe, tmp_path):
    folder, begun = checkpoint(tmp_path, recipe), []

    def model_init(trial=None):
        begun.append(sc.load(folder))
        return begun[-1]

    args = arguments(tmp_path)
    run = Trainer(args=args, model_init=model_init, train_dataset=rows())
    for _ in range(2):  # as hyperparameter_search does
        run.train()
    first, second = (model.state_dict() for model in begun[-2:])
    assert run.model is begun[-1]
    assert all(torch.equal(first[name], second[name]) for name in first)


@recipes
def test_the_last_that_it_pushes_is_our_checkpoint(recipe, tmp_path, monkeypatch):
    pushed = []

    class Done:
        def __getattr__(self, name):
            return lambda *args, **kwargs: True

    def upload_folder(self, *, folder_path, path_in_repo=None, **kwargs):
        out = tmp_path / "hub" / str(len(pushed))
        pushed.append((path_in_repo, shutil.copytree(folder_path, out)))
        return Done()

    api, repo = huggingface_hub.HfApi, huggingface_hub.RepoUrl("https://huggingface.co/u/x")
    monkeypatch.setattr(api, "create_repo", lambda *args, **kwargs: repo)
    monkeypatch.setattr(api, "upload_folder", upload_folder)
    settings = {"hub_strategy": "checkpoint", "hub_model_id": "u/x", "push_to_hub": True}
    run = trainer(tmp_path, recipe, save_steps=2, **settings)
    run.train()
    run.push_to_hub()
    assert torch.equal(logits(sc.load(pushed[-1][1])), logits(run.model))
    for place, folder in pushed[:-1]:
        if place == "last-checkpoint":
            sc.load(folder)
        else:  # Trainer copies the files that it knows, and recipe.json is none of them
            with pytest.raises(sc.SparsecraftError, match=r"has no recipe\.json"):
                sc.load(folder)
