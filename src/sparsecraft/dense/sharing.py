"""Tensors that several processes share (FSDP2, tensor parallelism): whole, or a process's part."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed import get_rank
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether tensors lie in several processes, all of which have to ask for them."""
    return any(isinstance(tensor, DTensor) for tensor in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together; every process that shares it has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """A shared tensor for the process that writes: whole on the CPU in the first one, and empty in
    the others, which call this too. Any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    found = whole(tensor)
    return found.cpu() if get_rank() == 0 else found.new_empty(0)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, which may be nothing."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor that every process has, shared as another of its shape is; no process waits
    for another."""
    if not isinstance(other, DTensor) or other.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
