"""What has moved in a converted model that no verb of ours has noted: by a user's own loop or
trainer.

`convert` and `load` keep a digest of every parameter, and `save` and `train` compare. What verbs
change stands in the report, and is taken as it is then. Of a large tensor a sample is read: a step
of an optimizer changes all of it, or whole rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsecraft.dense.digests import digest
from sparsecraft.surgery.record import Conversion, conversion_of

SAMPLE = 65_536  # numbers of a tensor
VERBS = ("training", "extensions")  # fields of the report in which they note themselves

Digests = dict[str, tuple[torch.dtype, torch.Size, str]]


@dataclass(frozen=True, slots=True)
class Seen:
    """What the parameters were, and how much the report had noted by then.

    Attributes:
        since: when that was, in words.
    """

    since: str
    noted: int
    digests: Digests


def remember(model: nn.Module, since: str, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Take a converted model as it is now."""
    record = conversion_of(model)
    record.seen = Seen(since, _noted(record), _digests(model, tensors))


def note(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write into the report how many parameters have moved since, if no verb has moved them.

    Args:
        tensors: name -> what stands for a parameter whose own values lie elsewhere.
    """
    record = conversion_of(model)
    seen = record.seen
    if seen is None:
        return
    if seen.noted != _noted(record):
        remember(model, "the last change above", tensors)
        return
    now = _digests(model, tensors)
    # Of what was cast or resized nothing can be said.
    same = [name for name in now if now[name][:2] == seen.digests.get(name, ())[:2]]
    if moved := sum(now[name] != seen.digests[name] for name in same):
        record.report["elsewhere"] = {
            "moved": moved,
            "parameters": len(same),
            "since": seen.since,
            "trainings": len(record.report.get("training", ())),
        }


def _noted(record: Conversion) -> int:
    return sum(len(record.report.get(verb) or ()) for verb in VERBS)


def _digests(model: nn.Module, tensors: Mapping[str, Tensor] | None) -> Digests:
    found = {}
    for name, parameter in model.named_parameters():
        tensor = (tensors or {}).get(name, parameter).detach()
        if tensor.is_floating_point() and not tensor.is_meta:
            sample = tensor.reshape(-1)[:: -(-tensor.numel() // SAMPLE) or 1]
            found[name] = tensor.dtype, tensor.shape, digest(sample)
    return found
