"""The certificate of a model that does not fit into memory.

It runs with its weights read when a module is called and dropped when it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from sparsecraft.dense.probes import UNREADABLE, candidates
from sparsecraft.errors import SparsecraftError, first_line
from sparsecraft.evaluation.certificate import Certificate
from sparsecraft.evaluation.layerwise import Comparison
from sparsecraft.moe.lending import Lender
from sparsecraft.moe.names import dense_name, unique_tensors
from sparsecraft.surgery.record import conversion_of
from sparsecraft.surgery.revert import replaced_tensors


class CannotCompareError(SparsecraftError):
    """A model whose layers cannot be compared one by one."""


def certify_files(
    model: nn.Module,
    dense: Callable[[str], Tensor],
    written: Mapping[str, Callable[[], Tensor]],
    seed: int = 0,
    *,
    claims: bool = True,
) -> Certificate:
    """`layerwise.certify` for a model without memory (on the meta device), without its outputs. The
    model cannot be used for anything else afterwards.

    Args:
        dense: gives the dense model's tensor of a name there.
        written: name of each new or changed tensor -> what reads it.

    Raises:
        CannotCompareError: the model runs on no probe, as where the family's modules use other
            weights than their own.
    """
    sources = {}
    for name, tensor in unique_tensors(model).items():
        read = written.get(name) or partial(dense, dense_name(model, name))
        sources[id(tensor)] = partial(_read, read, tensor.dtype)
    for name, tensor in replaced_tensors(conversion_of(model)).items():
        sources[id(tensor)] = partial(_read, partial(dense, name), tensor.dtype)
    probes = candidates(model, seed)
    _fill_buffers(model)
    why = ""
    for probe in probes:
        comparison = Comparison(model, Lender(sources), claims)
        try:
            comparison.run([probe])
        except UNREADABLE as error:
            why = first_line(error)
            continue
        comparison.run_alone()
        return comparison.certificate(1)
    raise CannotCompareError(f"{type(model).__name__} failed on it: {why}")


def _read(read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    """A tensor from a file in the type that it has in the model."""
    return read().to(dtype)


def _fill_buffers(model: nn.Module) -> None:
    """Compute the buffers that are in no file, such as rotary frequencies, as transformers does
    when it loads a model."""
    for module in model.modules():
        hidden = [n for n in module._non_persistent_buffers_set if module._buffers[n] is not None]
        for name in hidden:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if hidden:
            model._init_weights(module)
