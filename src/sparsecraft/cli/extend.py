"""`sparsecraft extend`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsecraft.cli.console import Command, Say
from sparsecraft.cli.options import Folder, Paths
from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.training.options import TrainOptions

# Of the training after an extension.
STEPS = 100


@dataclass(frozen=True, kw_only=True)
class ExtendCommand(Command, TrainOptions):
    """Add a dense model as one more expert of every layer, and train shortly on new and old data.

    It trains the recipe's last stage, unless --stages says otherwise; both kinds of data give equal
    parts of the rows, unless --weights does.
    """

    folder: Folder
    """Checkpoint of a converted model whose experts are whole networks."""
    expert: str
    """Dense model of one ancestor with the base: folder, hub id, or folder of a PEFT LoRA."""
    data: Paths
    """Files of the new domain."""
    old_data: Paths = ()
    """Files of the domains that the model knows."""
    out: Path
    """Checkpoint folder to write."""
    rows: Literal["calibrated", "ridge", "reset"] = "calibrated"
    """Of linear routers: the new row is fitted to new against old data, by logistic regression or
    in closed form by ridge regression; or all are drawn anew."""
    mix: float | None = None
    """Share of the dense model in all tensors that are no expert's; None is 1 / (n + 1)."""
    unrelated: bool = False
    """Take a model without a common ancestor, too."""
    base: str | None = None
    """The base, if it has moved; of a checkpoint that holds all tensors the one that embedded the
    domains (encoder `self`)."""
    train: bool = True
    """Train after the expert was added: 100 steps, unless --steps or --epochs says otherwise."""
    resume: bool = False
    """Continue an interrupted training exactly."""
    overwrite: bool = False
    """Replace an existing folder once the new one is complete."""


def run(command: ExtendCommand, say: Say) -> None:
    """Load, add the expert, train if asked, save."""
    from sparsecraft.checkpoint.load import is_self_contained, load_any
    from sparsecraft.checkpoint.replacing import claimed
    from sparsecraft.checkpoint.save import save
    from sparsecraft.conversion.domains.domain import Domain
    from sparsecraft.conversion.extension.extend import extend
    from sparsecraft.surgery.record import conversion_of
    from sparsecraft.training.train import train

    with claimed(command.out, command.overwrite):
        if command.train and not command.old_data:
            raise DataError(
                "Training on the new data alone forgets the old; give --old-data, or --no-train."
            )
        _check_untrained(command)
        alone = is_self_contained(command.folder)
        model, tokenizer = load_any(command.folder, None if alone else command.base)
        new, old = (
            Domain.joined([Domain.of(path) for path in paths]) if paths else None
            for paths in (command.data, command.old_data)
        )
        extension = extend(
            model,
            command.expert,
            new,
            old,
            tokenizer=tokenizer,
            base=command.base,
            rows=command.rows,
            mix=command.mix,
            unrelated=command.unrelated,
            seed=command.seed,
        )
        say(str(extension))
        if not command.train:
            save(model, command.out, overwrite=command.overwrite)
            return say(f"Saved and read back: {command.out}")
        report = train(
            model,
            (*command.data, *command.old_data),
            command.out,
            resume=command.resume,
            overwrite=command.overwrite,
            **command.of_training()
            | _defaults(command, conversion_of(model).recipe.stages[-1].name),
        )
        say(f"{report}\nSaved and read back: {command.out}")


def _defaults(command: ExtendCommand, stage: str) -> dict[str, Any]:
    """What the training after an extension does where the command leaves it open."""
    steps = STEPS if command.steps is None and command.epochs is None else command.steps
    return {
        "stages": command.stages or (stage,),
        "weights": command.weights or _equal_parts(command.data, command.old_data),
        "steps": steps,
    }


def _check_untrained(command: ExtendCommand) -> None:
    """Refuse options of a training that is not wanted; the seed is of `--rows reset`, too."""
    plain = TrainOptions()
    options = command.of_training()
    asked = [name for name in options if options[name] != getattr(plain, name) and name != "seed"]
    asked += ["resume"] if command.resume else []
    if not command.train and asked:
        raise SparsecraftError(
            f"--{asked[0].replace('_', '-')} is for training, and --no-train asks for none; leave "
            "one of them out."
        )


def _equal_parts(*kinds: Paths) -> tuple[float, ...]:
    """Sampling rates that give each kind of files as many rows."""
    return tuple(1 / len(files) for files in kinds for _ in files)
