"""The state that a training run can go on from: what trains, the optimizer's moments, Trainer's own
files. A model that several processes share (FSDP2) leaves what one process would, so that any
number of them goes on, by whichever engine.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType

import torch
from transformers import TrainerState, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from sparsecraft.checkpoint import tensorfile
from sparsecraft.checkpoint.jsonfile import read_json
from sparsecraft.checkpoint.space import writing
from sparsecraft.checkpoint.tensors import WEIGHTS, read_tensors
from sparsecraft.dense.jsonfile import MEASURED, check_regular, read_bytes
from sparsecraft.dense.sharing import gathered
from sparsecraft.errors import CheckpointError, SparsecraftError, first_line
from sparsecraft.moe.names import unique_tensors
from sparsecraft.moe.routers.moving import moving_tensors
from sparsecraft.training.engine import load_state, whole_state
from sparsecraft.training.resume import keep_alone

log = logging.getLogger("sparsecraft")


class StatesMixin:
    """Put before a Trainer class; its states are read by `training.resume` too."""

    def save_model(self, output_dir=None, _internal_call=False):
        """Only what trains, and what moves with it: a state holds these tensors and Trainer's own
        files."""
        model = self.accelerator.unwrap_model(self.model)
        known, moving = unique_tensors(model).items(), moving_tensors(model)
        kept = {name: p for name, p in known if p.requires_grad or name in moving}
        trained = {name: gathered(p.detach()) for name, p in kept.items()}
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "digest").write_text(tensorfile.write(folder / WEIGHTS, trained))

    def keep_state(self) -> None:
        """Write a state for resuming now."""
        self._save_checkpoint(self.model, trial=None)

    def restore(self, state: Path) -> None:
        """Take the trained tensors and the log of a state that is already at its last step."""
        self._load_from_checkpoint(str(state))
        self.state = TrainerState.load_from_json(str(state / TRAINER_STATE_NAME))

    # ------------------------------------------------------------------ Private hooks of Trainer

    def _save_checkpoint(self, model, trial):
        """A state for resuming, whole or not at all; an older one goes once all of the new one is
        on the disk, and its digests are."""
        state = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with writing(state, "free some disk and resume from the state before it, if any"):
                super()._save_checkpoint(model, trial)
        except CheckpointError:
            shutil.rmtree(state, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            keep_alone(state)

    def _save_optimizer_and_scheduler(self, output_dir):
        """FSDP2's are written as one process's: accelerate's own hold the whole model once more,
        for this number of processes alone."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """By every engine in one way. Trainer's own asks for the device of DDP's processes, which
        torch 2.11 does not know where that is cpu:0."""
        if checkpoint is None:
            return
        folder, options = Path(checkpoint), {"map_location": "cpu", "weights_only": True}
        with _reading(folder):
            load_state(self.optimizer, torch.load(folder / OPTIMIZER_NAME, mmap=True, **options))
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, **options))

    def _save_rng_state(self, output_dir):
        """Trainer writes the state's last file behind this: no process's numbers may lack then."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint):
        """Random numbers go on where they were, unless another number of processes draws them."""
        kept = len([*Path(checkpoint).glob("rng_state*")]) if checkpoint else None
        if kept in (None, self.args.world_size):
            with _reading(checkpoint):
                super()._load_rng_state(checkpoint)
            return
        set_seed(self.args.seed + self.state.global_step)
        log.warning(
            f"{kept} processes began this run and {self.args.world_size} go on with it: its rows, "
            "their order and its steps are the same, and dropout and routers that sample draw "
            "other numbers than they would have."
        )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        with _reading(folder):
            for path in folder.iterdir():
                check_regular(path, CheckpointError)
            _check_history(folder / TRAINER_STATE_NAME)
            digest = read_bytes(folder / "digest", CheckpointError, most=1 << 10).decode()
            read_tensors(model, folder / WEIGHTS, digest, in_place=True)


@contextmanager
def _reading(state: str | Path | None) -> Iterator[None]:
    """Say in one sentence what a state lacks that has no digests, of a version before they were
    kept: transformers and torch raise a dozen kinds of errors."""
    try:
        yield
    except SparsecraftError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{state} is no state to go on from ({first_line(error)}); delete it to go on from the "
            f"one before it, or {Path(state).parent} to train the stage anew."
        ) from error


def _check_history(path: Path) -> None:
    """Refuse what transformers would trip over: it takes the fields of this file as they are.

    Raises:
        CheckpointError: it is no JSON of ours.
        TypeError, ValueError: a field is unknown, or of another type.
    """
    plain, state = TrainerState(), TrainerState(**read_json(path, MEASURED))
    types = {f.name: type(getattr(plain, f.name)) for f in dataclasses.fields(plain)}
    types |= {"train_batch_size": int}
    for name, kind in types.items():
        value, number = getattr(state, name), kind in (int, float)
        if not (kind is NoneType or isinstance(value, (int, float) if number else kind)):
            raise TypeError(f"{name} in {path.name} is {value!r}")
    if not all(isinstance(entry, dict) for entry in state.log_history):
        raise TypeError(f"log_history in {path.name} is no list of objects")
    if state.global_step != int(path.parent.name.rpartition("-")[2]):
        raise ValueError(f"global_step in {path.name} is {state.global_step}")
