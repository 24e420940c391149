"""Whether a model's tensors, and new ones, have values here and now, and can be trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparsecraft.errors import ResourceError, SurgeryError


def check_in_memory(model: nn.Module, task: str) -> None:
    """Refuse a model of which some tensors are on the meta device.

    Args:
        task: what their values are needed for, such as "convert it".

    Raises:
        ResourceError: so it is.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if absent := [name for name, tensor in tensors if tensor.is_meta]:
        raise ResourceError(
            f"{len(absent)} of {len(tensors)} tensors of this {type(model).__name__} are offloaded "
            f"or on the meta device, {absent[0]!r} among them, and have no values to read. Load it "
            f"whole (device_map=None, or one device), {task}, and offload it afterwards by "
            "accelerate.cpu_offload, disk_offload or dispatch_model."
        )


def check_new_in_memory(call: str) -> None:
    """Refuse to make parameters where they would come into being on the meta device.

    Args:
        call: what makes them, such as "sc.convert".

    Raises:
        ResourceError: `torch.device("meta")` or `accelerate.init_empty_weights` is in force.
    """
    probe = nn.Module()
    probe.register_parameter("weight", nn.Parameter(torch.empty(0)))
    if probe.weight.is_meta:
        raise ResourceError(
            "New parameters come into being on the meta device here, and experts would have no "
            f"values; call {call} outside of torch.device('meta') and init_empty_weights."
        )


def check_can_train(model: nn.Module) -> None:
    """Refuse a model with tensors that no gradient can ever reach.

    Raises:
        SurgeryError: some were made inside of `torch.inference_mode`.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise SurgeryError(
                f"{name!r} of this {type(model).__name__} was made inside of torch.inference_mode, "
                "so that nothing could be trained on it; load the model outside."
            )


@contextmanager
def outside_of_inference_mode() -> Iterator[None]:
    """What the block makes can be trained, wherever it is called."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            yield
    else:
        yield
