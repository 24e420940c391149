"""What memory a training step takes, measured: forward and backward passes of the trainer's own
loss, on rows of the data, and the largest micro-batch that fits.

Nothing is estimated by formula but what the optimizer will hold. Passes are counted by the tensors
that live at a time, in the same way on every device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32, gather_object
from datasets import Dataset
from torch import Tensor, nn

from sparsecraft.dense.live import LiveTensors, taken_for
from sparsecraft.dense.memory import free_memory, is_out_of_memory
from sparsecraft.training.engine import tried

# Of a measured pass, about: fewer, and what any pass takes would hide what a row does.
TOKENS = 256
# Of the free memory: the rest is lost between tensors.
USABLE = 0.9


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes that training takes beside the model's weights.

    Attributes:
        first: of the passes of a step's first micro-batch: of any, and of each row.
        later: of those of a later one, beside the gradients that are there by then.
        gradients: of all parameters that train.
        moments: what the optimizer holds from its first step on.
        update: what it takes for a moment.
        kept: bytes that are taken for each one that lives.
    """

    first: tuple[int, int]
    later: tuple[int, int]
    gradients: int
    moments: int
    update: int
    kept: float = 1.0

    def peak(self, rows: int, accumulates: bool) -> int:
        """The largest number of bytes at a time, with `rows` in a micro-batch."""
        passes = self.first[0] + rows * self.first[1]
        if accumulates:
            later = self.later[0] + rows * self.later[1]
            passes = max(passes, self.gradients + later)
        return round(self.kept * (self.moments + max(passes, self.gradients + self.update)))


def step_memory(trainer: Any, length: int, row: dict[str, Any], most: int) -> StepMemory:
    """Measure a trainer's passes on copies of one row.

    Args:
        length: tokens of the row.
        most: rows of a micro-batch at most.
    """
    few = min(most, max(1, TOKENS // length))
    more = min(most, 2 * few)
    one = _passes(trainer, [row] * few)
    two = one if more == few else _passes(trainer, [row] * more)
    first, later = (_line((few, a), (more, b)) for a, b in zip(one, two, strict=True))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    kept = taken_for(trainer.args.device)
    return StepMemory(first, later, gradients, *_optimizer(trainer, trained), kept)


def _line(one: tuple[int, int], two: tuple[int, int]) -> tuple[int, int]:
    """What any micro-batch takes, and each row of it, from two of them: (rows, bytes)."""
    if one[0] == two[0]:
        return 0, -(-one[1] // one[0])
    each = (two[1] - one[1]) // (two[0] - one[0])
    return one[1] - one[0] * each, each


def _optimizer(trainer: Any, trained: list[Tensor]) -> tuple[int, int]:
    """Bytes that an optimizer holds, and those that it takes for a moment."""
    every, largest = sum(p.nbytes for p in trained), max((p.nbytes for p in trained), default=0)
    if trainer.stage.optimizer == "adafactor":  # sums over rows and columns
        return sum(_factored(p) for p in trained), 3 * largest
    # On a GPU AdamW steps through all tensors at once, and takes their roots for that.
    return 2 * every, every if trainer.args.device.type == "cuda" else 2 * largest


def _factored(parameter: Tensor) -> int:
    if parameter.ndim < 2:
        return parameter.nbytes
    rows, columns = parameter.shape[-2:]
    return parameter.nbytes // (rows * columns) * (rows + columns)


def _passes(trainer: Any, rows: list[dict[str, Any]]) -> tuple[int, int]:
    """The most bytes at a time of a forward and a backward pass, with the gradients that it makes
    and without; more than there are if it runs out of memory."""
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    try:
        with tried(trainer), _wide_outputs(trainer), _counted(trainer.model) as live:
            trainer.compute_loss(trainer.model, batch).backward()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        beyond = 2 * free_memory(trainer.args.device)
        return beyond, beyond
    return live.most, live.most_without


@contextmanager
def _wide_outputs(trainer: Any) -> Iterator[None]:
    """Let the model give its outputs in float32, as accelerate will where it trains in another."""
    if not trainer.accelerator.native_amp:
        yield
        return
    own = vars(trainer.model)
    before = {name: own[name] for name in ("forward",) if name in own}
    own["forward"] = convert_outputs_to_fp32(trainer.model.forward)
    try:
        yield
    finally:
        del own["forward"]
        own.update(before)


@contextmanager
def _counted(model: nn.Module) -> Iterator[LiveTensors]:
    """Count what comes to life in the block, and of it the gradients of the model's parameters."""
    live = LiveTensors()
    handles = [
        p.register_post_accumulate_grad_hook(lambda p: live.set_apart(p.grad.nbytes))
        for p in model.parameters()
        if p.requires_grad
    ]
    try:
        with live:
            yield live
    finally:
        for handle in handles:
            handle.remove()


def longest_row(dataset: Dataset) -> tuple[int, dict[str, Any]]:
    """The row with the most tokens, those of its labels included, and how many its input has."""
    names = [n for n in ("input_ids", "labels") if _is_list(dataset.features[n])]
    best, number, start = -1, 0, 0
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        columns = [table.column(name).combine_chunks() for name in names]
        lengths = sum(column.value_lengths().to_numpy(zero_copy_only=False) for column in columns)
        if lengths.max() > best:
            best, number = int(lengths.max()), start + int(lengths.argmax())
        start += len(lengths)
    row = dataset[number]
    return len(row["input_ids"]), row


def _is_list(feature: Any) -> bool:
    return getattr(feature, "feature", None) is not None


def divisors(batch: int, most: int) -> list[int]:
    """The sizes up to `most` that cut a batch into equal parts."""
    return [n for n in range(1, most + 1) if batch % n == 0]


def free_here(device: torch.device) -> int:
    """Bytes that are free for this process, where its tensors lie."""
    here = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free_memory(device) // here


def largest_that_fits(memory: StepMemory, batch: int, most: int, device: torch.device) -> int:
    """The largest micro-batch that divides a process's rows of a step and fits into the memory of
    every process; one row if none does. All processes call this.

    Args:
        batch: rows of a step in this process.
        most: rows of a micro-batch at most.
    """
    free = USABLE * free_here(device)
    fit = [n for n in divisors(batch, most) if memory.peak(n, accumulates=n < batch) <= free]
    return min(gather_object([max(fit, default=1)]))
