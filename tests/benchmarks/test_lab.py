"""The lab of the benchmarks: schedules, brackets of learning rates, and both loops of a study."""

from __future__ import annotations

import importlib
import json
import math
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.lab.queue import Run, bracket, choose
from benchmarks.lab.session import Schedule
from benchmarks.lab.tables import insert

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("steps", [2, 20, 128])
def test_schedules_are_those_of_the_measured_runs(steps):
    for step in range(steps):
        warm = max(1, round(0.05 * steps))
        wanted = min(1.0, (step + 1) / warm) * min(1.0, (steps - step) / (steps - warm))
        assert Schedule("linear", 0.05).factor(step, steps) == wanted
        warm = max(1, round(0.1 * steps))
        done = max(0.0, (step - warm) / max(1, steps - warm))
        wanted = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * done))
        assert Schedule("cosine", 0.1).factor(step, steps) == wanted


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_a_warm_up_from_zero_is_that_of_transformers(shape):
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = "constant_with_warmup" if shape == "constant" else shape
    theirs = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=20)
    for step in range(20):
        assert Schedule(shape, 0.1, from_zero=True).factor(step, 20) == theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()


def test_a_bracket_goes_on_until_the_best_lies_inside():
    loss = lambda rate: abs(math.log(rate / 8e-3))  # noqa: E731
    found: dict[float, float] = {}
    while needed := bracket(found, (1e-3, 2e-3, 4e-3), 2.0, 4)[0]:
        found |= {rate: loss(rate) for rate in needed}
    assert sorted(found) == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    assert bracket(found, (1e-3, 2e-3, 4e-3), 2.0, 4) == ([], True)
    assert bracket(found, (1e-3, 2e-3, 4e-3), 2.0, 1) == ([], True)


def test_a_worker_keeps_its_model_and_leaves_those_of_others():
    a, b, c = (Run(name, "linear", 1e-3, 0) for name in "abc")
    held = Run("a", "linear", 2e-3, 0)
    assert choose([[a, b]], set(), set(), "b") is b
    assert choose([[a, b]], {held.key}, set(), None) is b
    assert choose([[a], [c]], {held.key}, set(), None) is c
    assert choose([[a]], {held.key}, set(), None) is a
    assert choose([[a]], {a.key}, set(), None) is None


def test_a_page_keeps_what_stands_around_its_tables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\nReading.\n")
    insert(page, "one")
    insert(page, "sentence", "through")
    insert(page, "two")
    text = page.read_text()
    assert text.startswith("# Title\n\nReading.\n") and "one" not in text
    assert text.count("two") == text.count("sentence") == 1


@pytest.mark.parametrize("study", ["pesc", "cohere", "nexus", "splitting"])
def test_the_loop_of_a_study_and_ours_agree(study, tmp_path):
    """One arm on a tiny model, by `sc.train` and by the study's own loop, on the same batches."""
    page = tmp_path / "README.md"
    results = ROOT / "benchmarks" / study / "results.jsonl"
    through = importlib.import_module(f"benchmarks.{study}.through_train").through_train
    through(Namespace(tiny=True, page=page, results=results))
    found = json.loads(page.with_name("through_train.json").read_text())["tiny"]
    assert len(found["lab"]) == found["steps"] and found["lab"][-1] < found["lab"][0]
    assert found["largest_difference"] < 1e-5
    assert found["weights_apart"] < 1e-3
    assert found["arm"] in page.read_text()


def test_a_text_session_takes_full_packs():
    """The studies' own batches have no padding, so no mask, and the losses still count."""
    import torch

    import sparsecraft as sc
    from benchmarks.lab.models import dense_model
    from benchmarks.lab.text import text_batch
    from benchmarks.nexus.run import SCHEDULE, session_of

    model = dense_model("tiny_wide", "cpu", 64)
    sc.convert(model, sc.recipes.upcycling(3), certify=False, seed=0)
    batch = text_batch(torch.arange(3, 35).view(2, 16), torch.arange(16).expand(2, -1))
    session = session_of(model, 1e-3)
    losses = session.descend([batch, batch, batch], SCHEDULE, 3)
    assert losses[-1] < losses[0]
    assert set(session.parts) == {"total", "task", *session.coefficients} and session.coefficients
