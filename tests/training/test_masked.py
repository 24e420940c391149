"""A gradient mask is the same however a step is cut, and in every process."""

from __future__ import annotations

import subprocess

import pytest
import torch

from benchmarks.scale.launching import Launch
from sparsecraft.moe.experts.mpo import MPOExperts
from tests.moe.experts.test_mpo import bank_of
from tests.training import masked
from tests.training.test_cut import assert_same_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    return masked.train(tmp_path_factory.mktemp("whole"), micro_batch=4)


def test_some_steps_are_masked_and_some_are_not():
    bank, found = bank_of("llama", mask=0.5), set()
    for step in range(masked.STEPS):
        bank.at_step(step, masked.SEED)
        found.add(bank.masked)
    assert found == {True, False}


def test_micro_batches_change_nothing(whole, tmp_path):
    assert_same_run(whole, masked.train(tmp_path))


def test_the_mask_is_what_makes_the_difference(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(MPOExperts, "at_step", lambda self, step, seed: None)
    with pytest.raises(AssertionError):
        assert_same_run(whole, masked.train(tmp_path, micro_batch=4))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_mask_the_same_steps(engine, whole, tmp_path):
    launch = Launch(engine, engine, [], processes=2)
    command = [*launch.command("tests.training.masked"), str(tmp_path)]
    done = subprocess.run(command, env=launch.variables(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(whole, torch.load(tmp_path / "found.pt"))
