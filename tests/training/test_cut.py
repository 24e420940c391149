"""How a step's batch is cut, into micro-batches and over processes, changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import sparsecraft as sc
from sparsecraft.training import descend
from sparsecraft.training.defaults import checked, fill
from sparsecraft.training.train import _dataset
from tests import tiny
from tests.training import cut

ROOT = Path(__file__).parents[2]
# Of what is logged: what a clock gives, and Trainer's count of micro-batches.
APART = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos",
         "num_tokens", "num_input_tokens_seen", "epoch")  # fmt: skip


def assert_same_run(one: dict, other: dict) -> None:
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert [sorted(entry) for entry in one["log"]] == [sorted(entry) for entry in other["log"]]
    for left, right in zip(one["log"], other["log"], strict=True):
        known = {key: value for key, value in left.items() if key not in APART}
        found = {key: right[key] for key in known}
        assert found == pytest.approx(known, rel=2e-3, abs=2e-4)
    for name, tensor in one["tensors"].items():
        assert torch.allclose(other["tensors"][name], tensor, atol=2e-4), name


@pytest.mark.parametrize("task", cut.TASKS)
def test_micro_batches_of_unequal_rows_change_nothing(tmp_path, task):
    runs = []
    for micro in (4, 2, 1):
        model = cut.converted(task, balance="none")
        runs.append(cut.train(task, tmp_path, cut.rows(task), micro, model=model, overwrite=True))
    assert runs[0]["log"][0]["grad_norm"] > 0.002
    for run in runs[1:]:
        # Loads and entropies too: they are of all tokens, not means over micro-batches.
        assert_same_run(runs[0], run)


@pytest.mark.parametrize("task", ["causal", "seq2seq", "classification"])
def test_task_and_auxiliary_losses_keep_their_balance(tmp_path, task):
    """With equal rows, every cut has the same auxiliary loss; a large one shows its share."""
    data = cut.rows(task)[:1] * 8
    runs = []
    for micro in (4, 1):
        model = cut.converted(task, balance="switch", balance_coef=20.0)
        options = {"model": model, "overwrite": True, "steps": 1, "log_every": 1}
        runs.append(cut.train(task, tmp_path, data, micro, **options))
    assert runs[0]["log"][0]["loss"] > 20  # the balance loss is at least one
    assert_same_run(*runs)


def trainer_of(model, path: Path, micro: int, accumulation: int = 1):
    batch = {"batch_size": micro * accumulation, "micro_batch": micro, "packing": False}
    stage, asked = model.sparsecraft.recipe.stages[0], checked({**cut.OPTIONS, **batch})
    settings = fill(model, stage, asked)
    run = descend.Run(model, tiny.tokenizer(), path.parent / "out")
    dataset, _ = _dataset(run, str(path), settings)
    descend.prepare_parameters(model, stage)
    return descend.make_trainer(run, stage, settings, dataset, path.parent / "state")


def plain_sum(model, batch: dict, task: str) -> tuple[torch.Tensor, int]:
    """The sum of the losses of a batch's items, from the logits, and their number."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "token_mask")}
    labels = batch["labels"]
    if task == "seq2seq":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    logits = model(**inputs).logits
    if task == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    return F.cross_entropy(logits[kept], labels[kept], reduction="sum"), int(kept.sum())


@pytest.mark.parametrize("task", ["causal", "seq2seq", "classification"])
def test_a_step_equals_a_plain_loop(tmp_path, task):
    """sum over micro-batches of (sum of losses + items * coefficient * auxiliary) / all items."""
    path = Path(tiny.write_rows(tmp_path / "rows.jsonl", cut.rows(task)))
    model = cut.converted(task, balance="switch", balance_coef=0.7)
    trainer = trainer_of(model, path, micro=2, accumulation=3)
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 3, "cpu")
    trainer.current_gradient_accumulation_steps = len(batches)
    model.train()
    total = sum(trainer.training_step(model, dict(batch), items).item() for batch in batches)
    found = gradients(model)
    wanted = 0.0
    with model.sparsecraft.own_loss.off():
        for batch in batches:
            with sc.trace(model) as routing:
                summed, count = plain_sum(model, batch, task)
            decoder = batch["labels"] != -100
            balance = [
                sc.losses.switch_balance(
                    value, decoder if name.startswith("decoder") else batch["token_mask"]
                )
                for name, value in routing.items()
            ]
            loss = (summed + count * 0.7 * torch.stack(balance).mean()) / items
            loss.backward()
            wanted += loss.item()
    assert total == pytest.approx(wanted, rel=1e-5)
    for name, gradient in gradients(model).items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert any(gradient.abs().max() > 1e-4 for gradient in found.values())
    return found


@pytest.mark.parametrize("task", ["causal", "seq2seq", "classification"])
def test_a_micro_batch_without_a_label_adds_nothing(tmp_path, task):
    path = Path(tiny.write_rows(tmp_path / "rows.jsonl", cut.rows(task)))
    model = cut.converted(task, balance="switch", balance_coef=0.7)
    trainer = trainer_of(model, path, micro=2)
    batch = next(iter(trainer.get_train_dataloader()))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    trainer.current_gradient_accumulation_steps = 2
    model.train()
    for items in (torch.tensor(7), torch.tensor(0)):  # in others of the step, or in none
        loss = trainer.training_step(model, dict(batch), items)
        assert loss == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
    logged = trainer.tally.pop(torch.clone)
    assert all(value == value for value in logged.values())


def test_two_processes_train_every_task_as_one(tmp_path):
    """Weights, every logged value, and the mean loss, also of what came after the last log line;
    rows that fill up an epoch's last batch are not trained on twice."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
              "2", "-m", "tests.training.cut", str(two), "1"]  # fmt: skip
    done = subprocess.run(launch, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    for number, member in enumerate(cut.members(one, 4)):
        found = json.loads((two / f"{number}.json").read_text())
        found["tensors"] = torch.load(two / f"{number}.pt")
        assert_same_run(member, found)
    assert number == len(cut.TASKS) and member["log"][0]["loss"] > 20
