"""Twins: the code and the settings of a dense module on small random weights, to be run.

What a module computes is its code and its settings (multipliers, clamps, dropouts), whatever the
values of its weights. A twin therefore serves for quantized weights and for weights without memory
as well, costs milliseconds, and leaves the module and torch's global random state alone.
"""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsecraft.dense.forms import features, is_linear
from sparsecraft.errors import first_line

Sizes = Mapping[int, int]
"""Feature counts of the module -> those of its twin; what is not named stays."""

PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PERIOD = 65537  # a prime
# Where twins and what they read are, whatever torch's default type and device are.
HERE = {"dtype": torch.float32, "device": "cpu"}
# What accelerate puts into a module whose weights it moves about.
HOOKED = ("_hf_hook", "_old_forward", "forward")


class Stub(nn.Module):
    """Stands for a part of a block that is none of the network's, such as its attention. It bends
    what it reads, so that one between the network's parts is noticed."""

    returns = "pair"

    def forward(self, *args: object, **kwargs: object) -> Tensor | tuple:
        found = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        x = next(v for v in found if v.is_floating_point() and v.ndim > 1)
        x = x / 2 + x.sin()
        return {"tensor": x, "pair": (x, None), "triple": (x, None, None)}[self.returns]


def twin(
    module: nn.Module, sizes: Sizes, stubs: Collection[nn.Module] = (), seed: int = 0
) -> nn.Module:
    """A copy in float32 on the CPU; two twins of a module and a seed have the same weights.

    Args:
        sizes: see `Sizes`.
        stubs: modules below that a `Stub` stands for.
    """
    return _twin(module, sizes, stubs, torch.Generator().manual_seed(seed))


def skeleton(module: nn.Module) -> nn.Module:
    """A copy without memory: its code runs on shapes alone, whatever the weights are packed in."""
    return _twin(module, {}, (), None)


def is_hooked(module: nn.Module) -> bool:
    """Whether its forward is accelerate's, which moves the weights about and calls the module's."""
    return "_hf_hook" in vars(module)


def problem(error: Exception) -> str:
    """What the code of a module raised, in one line."""
    return f"{type(error).__name__}: {first_line(error)}"


def _twin(
    module: nn.Module, sizes: Sizes, stubs: Collection[nn.Module], generator: torch.Generator | None
) -> nn.Module:
    if any(module is stub for stub in stubs):
        return Stub()
    if is_linear(module):
        found = _linear(module, sizes, generator)
        found._modules = _parts(found, sizes, stubs, generator)
        return found
    found = _shell(module)
    for store in ("_parameters", "_buffers"):
        tensors = getattr(module, store).items()
        where = "meta" if generator is None else "cpu"
        values = {n: None if t is None else _value(t, sizes, where) for n, t in tensors}
        setattr(found, store, values)
    found._modules = _parts(module, sizes, stubs, generator)
    if isinstance(found, nn.LayerNorm):
        found.normalized_shape = tuple(sizes.get(n, n) for n in found.normalized_shape)
    return found


def _parts(
    module: nn.Module, sizes: Sizes, stubs: Collection[nn.Module], generator: torch.Generator | None
) -> dict[str, nn.Module | None]:
    return {
        name: child and _twin(child, sizes, stubs, generator)
        for name, child in module._modules.items()
    }


def _shell(module: nn.Module) -> nn.Module:
    """The module without tensors, parts and hooks."""
    found = copy.copy(module)
    own = vars(found)
    for name in [n for n in own if n.endswith("_hooks")]:
        own[name] = type(own[name])()
    if is_hooked(module):
        for name in HOOKED:
            own.pop(name, None)
    forward = own.get("forward")
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        own["forward"] = types.MethodType(forward.__func__, found)
    if "gradient_checkpointing" in own:
        own["gradient_checkpointing"] = False
    return found


def _value(tensor: Tensor, sizes: Sizes, where: str) -> Tensor:
    """The tensor's own values, or others about one where it has none or another size."""
    shape = tuple(sizes.get(n, n) for n in tensor.shape)
    if where == "meta":
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        value = torch.empty(shape, dtype=dtype, device=where)
    elif not tensor.is_floating_point():
        kind = {**HERE, "dtype": tensor.dtype}
        value = torch.zeros(shape, **kind) if tensor.is_meta else tensor.detach().to(**kind)
    elif tensor.is_meta or shape != tensor.shape:
        value = torch.linspace(0.5, 1.5, math.prod(shape), **HERE).view(shape)
    else:
        value = tensor.detach().to(**HERE)
    return nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value


def _linear(module: nn.Module, sizes: Sizes, generator: torch.Generator | None) -> nn.Module:
    """A Linear of the module's class, or a plain one where its weight is in a format of its own."""
    width, height = (sizes.get(n, n) for n in features(module))
    weight, bias = module.weight, module.bias
    transposed = isinstance(module, Conv1D)
    if type(weight) is nn.Parameter and weight.dtype in PLAIN:
        found = _shell(module)
        found._parameters, found._buffers = dict(module._parameters), dict(module._buffers)
    else:
        found = nn.Linear(1, 1, bias is not None, device="meta")
    if transposed:
        found.nx, found.nf = width, height
    else:
        found.in_features, found.out_features = width, height
    shapes = {"weight": (width, height) if transposed else (height, width)}
    if bias is not None:
        shapes["bias"] = (height,)
    for name, shape in shapes.items():
        found._parameters[name] = nn.Parameter(_random(shape, generator) / width**0.5, False)
    return found


def _random(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Normal numbers; the same ones over and over in a large matrix, out of step with its rows."""
    if generator is None:
        return torch.empty(shape, dtype=torch.float32, device="meta")
    count = math.prod(shape)
    drawn = torch.randn(min(count, PERIOD), generator=generator, **HERE)
    return drawn.repeat(-(-count // PERIOD))[:count].view(shape)
