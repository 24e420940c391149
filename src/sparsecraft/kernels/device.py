"""What device, dtype and autograd allow the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

try:  # absent from CPU builds of torch
    import triton
except ImportError:
    triton = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret
# Up to this many tokens, a launch costs more than reading the weights once per token from cache.
FEW_TOKENS = 16
STEP = False  # see `compiled_step`


@contextmanager
def compiled_step() -> Iterator[None]:
    """What is compiled in the block is a decoding step of one shape, without gradients."""
    global STEP
    before, STEP = STEP, True
    try:
        yield
    finally:
        STEP = before


def in_compiled_step() -> bool:
    """Whether a decoding step is being compiled: for one shape, not for any, as an export is."""
    return STEP and torch.compiler.is_compiling()


def as_sums(x_TD: Tensor) -> bool:
    """Whether a product with a low-rank matrix is to be written as a sum. The compiler fuses that
    with what stands around it, which it does with no matrix product, and a handful of tokens reads
    the matrix from the cache."""
    return in_compiled_step() and len(x_TD) <= FEW_TOKENS


def runs(x: Tensor) -> bool:
    """Whether Triton kernels run on this tensor, or on what a compiler puts in its place."""
    return triton is not None and (x.is_cuda or INTERPRETED)


def usable(x: Tensor) -> bool:
    """Whether the Triton kernels run on this tensor."""
    if triton is None or torch.compiler.is_compiling() or x.dtype == torch.float64:
        return False
    # Triton launches on the current device, which need not be the tensor's.
    here = x.is_cuda and x.device.index == torch.cuda.current_device()
    return here or triton.knobs.runtime.interpret


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that F.linear would compute in; grouped_mm itself ignores autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def is_transformed() -> bool:
    """Whether a transform of torch.func runs, which takes no function that writes in place."""
    return torch._C._are_functorch_transforms_active()


def is_followed(*tensors: Tensor) -> bool:
    """Whether the operations on them are noted, or done on stand-ins without memory: by a compiler,
    a trace, a transform of torch.func, or a subclass of Tensor."""
    notes = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed()
    return notes or any(type(tensor) not in (Tensor, Parameter) for tensor in tensors)


def version(tensor: Tensor) -> int:
    """How often the tensor has been written to; torch does not count what inference mode makes."""
    return 0 if tensor.is_inference() else tensor._version


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_few(x: Tensor) -> bool:
    """Whether the kernels for a handful of tokens run on these, (..., D)."""
    return 0 < x.numel() <= FEW_TOKENS * x.shape[-1] and usable(x)


def is_launched(x: Tensor) -> bool:
    """Whether each kernel on this tensor is launched by Python as it comes, one from Triton for the
    time of three of torch's own: neither captured in a graph nor interpreted."""
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


def is_handful(x_TD: Tensor, *others: Tensor | None) -> bool:
    """Whether operators for a handful of tokens without gradients run on these, or on what a
    compiler puts in their place."""
    return (
        runs(x_TD)
        and (in_compiled_step() or not torch.compiler.is_compiling())
        and x_TD.dtype != torch.float64
        and 0 < len(x_TD) <= FEW_TOKENS
        and not needs_grad(x_TD, *others)
        and not is_transformed()
    )
