"""atomic: a change of a model that happens as a whole, or leaves no trace.

What a verb changes in place is module trees, attributes, hooks, flags and tensors. References to
all of them are kept while it works, and put back should it fail, wherever that is. A verb therefore
gives a tensor its new value by `tensor.data = value`, which leaves the memory of the old one alone,
and never by `copy_`, which would need a second copy of the model to come back from.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from sparsecraft.dense.memory import outside_of_inference_mode
from sparsecraft.surgery.record import Conversion, conversion_of, is_converted

Undo = Callable[[], None]


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Give the model back as it was, bit for bit, when the block fails, however far it came.

    Modules, parameters and buffers (by reference: what is overwritten in place stays so), their
    gradients, training flags, hooks, configurations, what the conversion remembers, and the random
    state.
    """
    undo = [_random_state()]
    record = conversion_of(model) if is_converted(model) else None
    if record is not None:
        undo += [_record(record), _attributes(record.own_loss)]
    roots = (model, *record.layers, *record.dense.values()) if record else (model,)
    modules = {id(module): module for root in roots for module in root.modules()}
    for module in modules.values():
        undo.extend(_tensors(module))
        undo.append(_attributes(module))
    configurations = {id(c): c for m in modules.values() for c in _configurations(m)}
    undo.extend(_attributes(configuration) for configuration in configurations.values())
    try:
        yield
    except BaseException:
        for step in undo:
            step()
        raise


def atomic(verb: Callable[..., Any]) -> Callable[..., Any]:
    """A verb that changes its first argument, a model, as a whole or not at all."""

    @functools.wraps(verb)
    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(model, nn.Module):  # a folder, which the verb reads itself; or nonsense
            return verb(model, *args, **kwargs)
        with outside_of_inference_mode(), all_or_nothing(model):
            return verb(model, *args, **kwargs)

    return run


def _attributes(owner: Any) -> Undo:
    """Of a module or a configuration; collections are given back as the same objects, because
    handles of hooks and other modules hold them."""
    before = dict(vars(owner))
    held = {k: copy.copy(v) for k, v in before.items() if isinstance(v, (dict, list, set))}
    # A single number that a captured CUDA graph reads is overwritten in place.
    numbers = {k: v.clone() for k, v in before.items() if isinstance(v, Tensor) and v.ndim == 0}

    def undo() -> None:
        vars(owner).clear()
        vars(owner).update(before)
        for name, content in held.items():
            _refill(before[name], content)
        for name, number in numbers.items():
            if not torch.equal(before[name], number):
                before[name].fill_(number.item())

    return undo


def _refill(collection: Any, content: Any) -> None:
    collection.clear()
    if isinstance(collection, list):
        collection.extend(content)
    else:
        collection.update(content)


def _tensors(module: nn.Module) -> list[Undo]:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return [_tensor(tensor) for tensor in own]


def _tensor(tensor: Tensor) -> Undo:
    data, wants, gradient = tensor.data, tensor.requires_grad, tensor.grad

    def undo() -> None:
        now = tensor.data
        same = (now.dtype, now.device, now.shape) == (data.dtype, data.device, data.shape)
        if not (same and (now.is_meta or now.data_ptr() == data.data_ptr())):
            tensor.data = data
        if tensor.requires_grad != wants:
            tensor.requires_grad_(wants)
        tensor.grad = gradient

    return undo


def _configurations(module: nn.Module) -> list[Any]:
    found = (getattr(module, name, None) for name in ("config", "generation_config"))
    return [c for c in found if isinstance(c, (PreTrainedConfig, GenerationConfig))]


def _record(record: Conversion) -> Undo:
    """Of what the conversion remembers, and of what the model runs, which gates share."""
    running, states = record.running, []
    for owner in (record, running):
        fields = {f.name: getattr(owner, f.name) for f in dataclasses.fields(owner)}
        held = {k: copy.copy(v) for k, v in fields.items() if isinstance(v, (dict, list))}
        states.append((owner, fields, held))
    report = copy.deepcopy(record.report)

    def undo() -> None:
        for owner, fields, held in states:
            for name, value in fields.items():
                setattr(owner, name, value)
            for name, content in held.items():
                _refill(fields[name], content)
        _refill(record.report, report)

    return undo


def _random_state() -> Undo:
    torch_state, python_state, numpy_state = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(),  # noqa: NPY002
    )
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def undo() -> None:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return undo
