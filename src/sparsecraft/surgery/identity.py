"""What a converted model answers when it is asked where it came from.

TRL makes a reference model, and PEFT the base of an adapter, by loading `name_or_path` anew. The
dense base's name there would give them the dense model without a word. So a converted model bears
the name of the checkpoint folder that holds it; before there is one, a sentence that nothing can
load. `revert` gives the dense name back.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from sparsecraft.surgery.record import conversion_of, is_converted

UNSAVED = "a converted model that is not saved yet: call sc.save(model, folder) first. Its base: "


def bears(model: nn.Module, name: str) -> None:
    """Let the model, and the models inside it, go by a name."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.name_or_path = part.config.name_or_path = name


def stands_in(model: nn.Module, folder: str | Path) -> None:
    """Let a converted model go by the folder that holds it as it is."""
    bears(model, str(Path(folder).absolute()))


def stands_nowhere(model: nn.Module) -> None:
    """Let a converted model, new or changed, go by a sentence that says to save it."""
    bears(model, UNSAVED + conversion_of(model).named)


def base_in(name: str) -> str:
    """The base's name, out of the sentence; any other name as it is."""
    return name.removeprefix(UNSAVED) if isinstance(name, str) else name


def dense_name(model: nn.Module) -> str:
    """The `name_or_path` of a dense model, or of the base of a converted one."""
    return conversion_of(model).named if is_converted(model) else model.name_or_path
