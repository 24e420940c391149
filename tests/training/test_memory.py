"""What training says of memory is what its tensors take, and micro-batches fit into it."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import pytest
import torch

import sparsecraft as sc
from sparsecraft.dense.live import LiveTensors
from sparsecraft.evaluation import held_out
from sparsecraft.training import descend, memory
from sparsecraft.training.memory import StepMemory, largest_that_fits, longest_row, step_memory
from tests import tiny
from tests.cases import RECIPES
from tests.training import cut
from tests.training.test_cut import assert_same_run, trainer_of

# ------------------------------------------------------------------ said and counted


def equal_rows(task: str, count: int = 8) -> list[dict]:
    return cut.rows(task)[:1] * count


def counted(trainer, steps: int = 2) -> int:
    """The most bytes of tensors that live at a time in a training beside what there was before."""
    trainer.args.max_steps, trainer.args.save_strategy = steps, "no"
    gc.collect()
    with LiveTensors() as live:
        trainer.train()
    return live.most


def said(trainer) -> int:
    rows = trainer.args.per_device_train_batch_size
    length, row = longest_row(trainer.train_dataset)
    found = step_memory(trainer, length, row, rows)
    accumulates = trainer.args.gradient_accumulation_steps > 1
    return round(found.peak(rows, accumulates) / found.kept)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("task", ["causal", "seq2seq", "classification"])
def test_what_is_said_is_what_lives_in_every_task(tmp_path, task, accumulation):
    path = Path(tiny.write_rows(tmp_path / "rows.jsonl", equal_rows(task, 12)))
    trainer = trainer_of(cut.converted(task), path, micro=4, accumulation=accumulation)
    wanted = said(trainer)
    assert counted(trainer) == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize("task", ["causal", "seq2seq", "classification"])
def test_and_under_autocast(tmp_path, monkeypatch, task):
    """As on a GPU, where accelerate makes the model's outputs float32 too."""
    arguments = descend.training_arguments
    monkeypatch.setattr(descend, "training_arguments", lambda *a: arguments(*a) | {"bf16": True})
    path = Path(tiny.write_rows(tmp_path / "rows.jsonl", equal_rows(task, 12)))
    trainer = trainer_of(cut.converted(task), path, micro=4, accumulation=2)
    own = dict(vars(trainer.model))
    wanted = said(trainer)
    assert vars(trainer.model) == own and trainer.accelerator.native_amp
    assert counted(trainer) == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize("recipe", ["upcycling", "camelidae", "molora", "mov", "mixlora", "bam"])
def test_and_by_every_kind_of_experts(tmp_path, recipe):
    path = Path(tiny.write_rows(tmp_path / "rows.jsonl", equal_rows("causal", 12)))
    model = tiny.llama()
    sc.convert(model, RECIPES[recipe].make(), certify=False)
    trainer = trainer_of(model, path, micro=4, accumulation=2)
    wanted = said(trainer)
    assert counted(trainer) == pytest.approx(wanted, rel=0.25)


def test_a_large_vocabulary_and_checkpointing_count(tmp_path):
    path = Path(tiny.write_rows(tmp_path / "rows.jsonl", equal_rows("seq2seq")))
    sizes = {}
    for rows in (1, 8):
        trainer = trainer_of(cut.converted("seq2seq"), path, micro=rows)
        sizes[rows] = said(trainer)
        _, row = longest_row(trainer.train_dataset)
    logits = len(row["labels"]) * len(tiny.tokenizer()) * 4
    assert sizes[8] - sizes[1] > 7 * logits


def test_measuring_leaves_nothing_changed(tmp_path):
    path = Path(tiny.write_rows(tmp_path / "rows.jsonl", cut.rows("causal")))
    trainer = trainer_of(cut.converted("causal"), path, micro=4)
    model = trainer.model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    said(trainer)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert trainer.tally.pop(torch.clone) == {}


def test_tensors_are_counted_while_they_live():
    old = torch.zeros(1000)
    with LiveTensors() as live:
        old.view(10, 100).add_(1)
        assert live.most == 0
        kept = old + 1
        for _ in range(3):
            kept.exp().sum()
    assert live.most == pytest.approx(8000, abs=64)


# ------------------------------------------------------------------ the choice


def test_the_largest_divisor_that_fits_is_chosen(monkeypatch):
    step = StepMemory(first=(100, 50), later=(100, 50), gradients=30, moments=60, update=0)
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "USABLE", 1.0)
    for free, wanted in ((10**6, 8), (100 + 60 + 30 + 4 * 50, 4), (400, 4), (250, 1), (0, 1)):
        monkeypatch.setattr(memory, "free_here", lambda device, free=free: free)
        assert largest_that_fits(step, 8, 8, cpu) == wanted
    monkeypatch.setattr(memory, "free_here", lambda device: 10**6)
    assert largest_that_fits(step, 12, 8, cpu) == 6


def test_the_smallest_choice_of_all_processes_counts(monkeypatch):
    step = StepMemory(first=(0, 1), later=(0, 1), gradients=0, moments=0, update=0)
    monkeypatch.setattr(memory, "free_here", lambda device: 10**6)
    monkeypatch.setattr(memory, "gather_object", lambda own: [*own, 2, 4])
    assert largest_that_fits(step, 8, 8, torch.device("cpu")) == 2


def test_memory_on_one_machine_is_shared_by_its_processes(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    assert memory.free_here(torch.device("cpu")) == 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_here(torch.device("cpu")) == 500
    assert memory.free_here(torch.device("cuda")) == 1000


OPEN = {"micro_batch": None, "batch_size": 4}


def test_an_open_micro_batch_follows_the_free_memory(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="sparsecraft")
    data = equal_rows("causal")
    model = cut.converted("causal")
    roomy = cut.train("causal", tmp_path, data, **OPEN, model=model)
    assert chosen(model) == 4
    assert "Training by micro-batches of 4 x " in caplog.text
    monkeypatch.setattr(descend, "free_here", lambda device: 0)
    monkeypatch.setattr(memory, "free_here", lambda device: 0)
    model = cut.converted("causal")
    scarce = cut.train("causal", tmp_path, data, **OPEN, model=model, overwrite=True)
    assert chosen(model) == 1 and "MEMORY MAY NOT SUFFICE" in caplog.text
    assert_same_run(roomy, scarce)


def chosen(model) -> int:
    return model.sparsecraft.report["training"][-1]["settings"]["micro_batch"]


def test_a_run_that_is_resumed_keeps_its_choice(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Killed

    data, options = equal_rows("causal"), {**OPEN, "save_every": 2, "overwrite": True}
    for module in (descend, memory):
        monkeypatch.setattr(module, "free_here", lambda device: 0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(descend.ProgressBar, "on_step_end", kill)
        cut.train("causal", tmp_path, data, **options, model=cut.converted("causal"))
    for module in (descend, memory):
        monkeypatch.setattr(module, "free_here", lambda device: 10**12)
    model = cut.converted("causal")
    resumed = cut.train("causal", tmp_path, data, **options, model=model, resume=True)
    assert chosen(model) == 1
    whole = cut.train(
        "causal", tmp_path, data, **{**options, "micro_batch": 1}, model=cut.converted("causal")
    )
    for name, tensor in whole["tensors"].items():
        assert torch.equal(resumed["tensors"][name], tensor), name


def test_evaluation_says_what_it_takes(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="sparsecraft")
    path = tiny.write_rows(tmp_path / "rows.jsonl", equal_rows("causal", 8))
    said = []
    monkeypatch.setattr(held_out, "gigabytes", lambda size: said.append(size) or "")
    with LiveTensors() as live:
        sc.evaluate(tiny.llama(), path, tokenizer=tiny.tokenizer())
    assert "Evaluation by batches of up to 8 x " in caplog.text
    assert said[0] == pytest.approx(1.2 * live.most, rel=0.25)
