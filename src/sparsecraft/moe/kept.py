"""Kept: what follows from a module's tensors alone, computed once in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsecraft.kernels.device import needs_grad


class Kept:
    """A tensor that is kept while those that it follows from are the same and unchanged.

    Only an edit in place through `.data`, which counts no version, is not seen; training and `drop`
    forget. Copies start anew, and threads may share it.
    """

    def __init__(self):
        self._known: tuple[list[tuple[Tensor, int]], Tensor] | None = None

    def __reduce__(self) -> tuple:
        return Kept, ()

    def drop(self) -> None:
        self._known = None

    def value(
        self, tensors: Sequence[Tensor], compute: Callable[[], Tensor], *, training: bool
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return compute()
        if training:
            self.drop()
        if training or not _counts_changes(tensors):
            return compute()
        known = self._known  # another thread may drop or replace it
        # Old tensors are held: memory of theirs that is freed may hold the next ones.
        if known is None or any(
            (old.data_ptr(), old.dtype, version) != (t.data_ptr(), t.dtype, t._version)
            for t, (old, version) in zip(tensors, known[0], strict=True)
        ):
            if captures(tensors[0]):  # what is computed now has the graph's memory
                return compute()
            with torch.inference_mode(False), torch.no_grad():  # kept beyond an inference_mode
                self._known = known = [(t.detach(), t._version) for t in tensors], compute()
        return known[1]


def _counts_changes(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing trains, and a change of the tensors would be seen."""
    # Tensors made in inference_mode count no versions.
    return not (needs_grad(*tensors) or any(t.is_inference() for t in tensors))


def captures(tensor: Tensor) -> bool:
    """Whether what is computed on a tensor's device becomes a part of a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
