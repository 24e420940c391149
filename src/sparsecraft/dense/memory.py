"""Memory: whether a model's tensors are in it and can be trained, how much of it is free, and what
is said where it does not suffice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import nn

from sparsecraft.errors import ResourceError, SparsecraftError, SurgeryError

# How torch says that memory is out where it raises no error of that name: of the CPU, of a device
# outside of torch's own allocator, of cuBLAS.
TORCH_SAYS = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def main_memory() -> int:
    """Bytes of the main memory that are free."""
    return psutil.virtual_memory().available


def free_memory(device: torch.device) -> int:
    """Bytes that are free where tensors of this device lie, what torch keeps for new ones too."""
    if device.type != "cuda":
        return main_memory()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is out, of the CPU or of a device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in TORCH_SAYS)


def what_was_missing(error: BaseException) -> str:
    """What was asked for as memory ran out, as far as the error says, and what is free now."""
    on_device = torch.cuda.is_available() and any(s in str(error) for s in ("CUDA", "CUBLAS"))
    free = free_memory(torch.device("cuda" if on_device else "cpu"))
    where = "of the GPU's memory" if on_device else "of the main memory"
    asked = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), re.IGNORECASE)
    if asked is None or asked[2] not in UNITS:
        return f"{gigabytes(free)} {where} are free"
    size = round(float(asked[1]) * UNITS[asked[2]])
    asked = gigabytes(size) if size >= 1e7 else f"{size / 1e6:.2f} MB"
    return f"{asked} more were asked for, and {gigabytes(free)} {where} are free"


@contextmanager
def enough_memory(task: str, otherwise: str) -> Iterator[None]:
    """Say in one sentence that memory ran out in the block.

    Args:
        task: what the block does, as the beginning of the sentence.
        otherwise: what to lower.

    Raises:
        ResourceError: it did.
    """
    try:
        yield
    except SparsecraftError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"{task} ran out of memory: {what_was_missing(error)}; {otherwise}."
        ) from error


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
