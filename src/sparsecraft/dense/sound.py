"""Whether what a file or a model calls a weight can be one: a floating number that is finite.

Parameters are asked, and not buffers: masks may hold -inf, and positions are integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from sparsecraft.dense.quantization import settings_in
from sparsecraft.dense.sharing import own_part
from sparsecraft.dense.weights import Weights
from sparsecraft.errors import SparsecraftError


def fault_of(tensor: Tensor) -> str | None:
    """What is wrong with a weight, in words that follow its name; None if nothing is."""
    if not tensor.is_floating_point():
        word = str(tensor.dtype).removeprefix("torch.")
        return f"holds numbers of type {word}, and weights are floating numbers"
    if is_finite(tensor):
        return None
    wrong = int((~tensor.detach().float().isfinite()).sum())
    return f"holds {wrong:,} of {tensor.numel():,} numbers that are not finite (NaN or infinite)"


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of a floating tensor is finite; without a copy of it."""
    tensor = own_part(tensor.detach())
    if tensor.is_meta or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # 8 bits have no order in torch
        tensor = tensor.float()
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def check_weight(name: str, tensor: Tensor, owner: object, error: type[SparsecraftError]) -> Tensor:
    """The tensor, if it can be a weight.

    Args:
        owner: the file or the model that it is of, for the sentence.

    Raises:
        SparsecraftError: of the given kind; it cannot.
    """
    if fault := fault_of(tensor):
        raise error(f"{name!r} of {owner} {fault}; save or download it again.")
    return tensor


def check_weights(
    model: nn.Module,
    error: type[SparsecraftError],
    values: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Refuse a model that has a parameter which is no weight; packed ones of a quantized base are.

    Args:
        values: name -> what stands for a parameter whose own values lie elsewhere, in other
            processes or on a disk.

    Raises:
        SparsecraftError: of the given kind; the first such parameter is named.
    """
    packed = bool(getattr(model, "is_quantized", False))
    for name, parameter in model.named_parameters():
        is_packed = packed and not (parameter.is_floating_point() and _is_plain(parameter))
        if not is_packed and (fault := fault_of(values.get(name, parameter))):
            raise error(
                f"{name!r} of this {type(model).__name__} {fault}; load a model whose weights are "
                "sound."
            )


def check_files(model: nn.Module, weights: Weights, error: type[SparsecraftError]) -> None:
    """Refuse integers where a model that was read from `weights` has parameters: transformers makes
    floating numbers of them without a word. Packed folders say how they are packed.

    Raises:
        SparsecraftError: of the given kind; the first such tensor is named.
    """
    if not weights.integers or settings_in(weights.folder):
        return
    for name, _ in model.named_parameters():
        for held in sorted(weights.names(model, name) & weights.integers):
            check_weight(held, weights.tensor(held), weights.folder, error)


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether its memory holds its numbers, and not what a quantizer made of them."""
    return type(parameter.data) is Tensor
