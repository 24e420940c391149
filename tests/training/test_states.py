"""A state of training is what was written, or it is passed over by name."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

import sparsecraft as sc
from sparsecraft.errors import SparsecraftError
from sparsecraft.training import states as writing
from sparsecraft.training.progress import ProgressBar
from sparsecraft.training.resume import DIGESTS, check_folder, keep_alone, last_state
from tests import tiny
from tests.checkpoint.folders import edit, flips

OPTIONS = {"steps": 6, "batch_size": 4, "micro_batch": 4, "max_length": 64, "save_every": 2,
           "progress": False}  # fmt: skip


class Interrupted(Exception):
    pass


def converted() -> torch.nn.Module:
    model = tiny.llama()
    recipe = sc.recipes.camelidae(num_experts=2, adapter_dim=4, lora_rank=2)
    sc.convert(model, recipe, certify=False)
    return model


def train(root: Path, name: str, model=None, **options) -> torch.nn.Module:
    model, rows = model or converted(), root / "rows.jsonl"
    given = {"tokenizer": tiny.tokenizer(), **OPTIONS, **options}
    sc.train(model, tiny.write_rows(rows, tiny.chat_rows(20)), root / name, **given)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """What a run left that was stopped after step 5, with the states of steps 2 and 4; and the
    weights that it would have had at its end."""
    root = tmp_path_factory.mktemp("run")

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Interrupted

    def keep(state: Path) -> None:
        keep_alone(state)
        shutil.copytree(state, root / state.name)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ProgressBar, "on_step_end", stop)
        patch.setattr(writing, "keep_alone", keep)
        train(root, "out")
    whole = train(root, "whole")
    return root, {name: value.detach() for name, value in whole.named_parameters()}


@pytest.fixture
def states(run, tmp_path) -> Path:
    """A copy of the states, with that of step 4 alone."""
    return shutil.copytree(run[0] / "out.training", tmp_path / "out.training")


def resumed(tmp_path: Path) -> dict[str, torch.Tensor]:
    model = train(tmp_path, "out", resume=True)
    return {name: value.detach() for name, value in model.named_parameters()}


def test_no_flipped_bit_of_a_state_goes_unnoticed(states):
    check_folder(states, resume=True)
    for path in flips(states, 60):
        if path.name == "README.md":  # TRL's
            check_folder(states, resume=True)
            continue
        with pytest.raises(SparsecraftError, match=path.name.replace(".", r"\.")):
            check_folder(states, resume=True)
        with pytest.raises(SparsecraftError):  # nor is it lost by starting over
            check_folder(states, resume=False)
    check_folder(states, resume=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_a_damaged_state_is_refused_or_the_one_before_is_taken(name, run, states, tmp_path, caplog):
    stage = states / "0-train"
    (stage / "checkpoint-4" / name).write_bytes(b"{")
    with pytest.raises(SparsecraftError, match=rf"{name} in .*checkpoint-4 .*no other state"):
        resumed(tmp_path)
    shutil.copytree(run[0] / "checkpoint-2", stage / "checkpoint-2")
    with caplog.at_level(logging.WARNING, logger="sparsecraft"):
        found = resumed(tmp_path)
    assert f"{name} in {stage / 'checkpoint-4'}" in caplog.text
    assert f"goes on from {stage / 'checkpoint-2'}" in caplog.text
    assert all(torch.equal(found[name], value) for name, value in run[1].items())
    assert sc.load(tmp_path / "out") and not states.exists()


def test_a_state_of_an_older_version_is_taken_without_its_digests(run, states, tmp_path):
    stage = states / "0-train"
    (stage / "checkpoint-4" / DIGESTS).unlink()
    assert last_state(stage) is None, "a kill came before the digests were written"
    edit(stage / "run.json", lambda data: [data.pop(key) for key in ("digest", "digests")])
    found = resumed(tmp_path)
    assert all(torch.equal(found[name], value) for name, value in run[1].items())


def test_the_older_state_stays_until_the_digests_of_the_new_one_are_there(tmp_path, monkeypatch):
    def killed(path, data):
        if path.name == DIGESTS and "checkpoint-4" in str(path):
            raise Interrupted
        path.write_text(json.dumps(data))

    monkeypatch.setattr("sparsecraft.training.resume.write_json", killed)
    with pytest.raises(Interrupted):
        train(tmp_path, "out")
    stage = tmp_path / "out.training" / "0-train"
    assert {p.name for p in stage.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert last_state(stage) == stage / "checkpoint-2"
