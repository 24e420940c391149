"""Every feed-forward network of a model, found by its structure and proven by running it.

A candidate is a module with two or three Linears, D -> F (-> F) -> D, and an activation. It counts
as a network only if its code computes what a donor's formula computes (`FFN.compute`), on random
tokens (`sparsecraft.dense.proof`). Every layer is looked at on its own, because settings can differ
by layer, and each time that a recipe is planned. No class and no name is listed here.

The module is a network *as a whole* if it computes the formula and nothing else. Otherwise its
parts may be one *span*: first Linear, activation, second Linear, one after the other, whatever the
module does before and after (attention, norms, residuals).

Shapes: D width, F hidden width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from sparsecraft.dense.forms import FFNForm, features, is_linear, join
from sparsecraft.dense.once import once
from sparsecraft.dense.proof import is_attention, outside_attention, prove
from sparsecraft.dense.twins import HERE, twin

# Where a module's code calls a function: what it may be, by its name in transformers.
FUNCTIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "mish", "tanh")


@dataclass(frozen=True, slots=True)
class Network:
    """A feed-forward network, or what looks like one and computes something else.

    Attributes:
        owner: path of the module that `form` is relative to.
        whole: the owner is the network and nothing else; otherwise its parts are a span.
        error: of the formula, relative to the module's output; more than `TOLERANCE` where it is
            refused.
        why: what is wrong where it is refused.
    """

    owner: str
    form: FFNForm
    whole: bool
    error: float = 0.0
    why: str | None = None


def find_networks(model: nn.Module) -> tuple[list[Network], list[Network]]:
    """The networks in the model's order, with those among them that are to be refused; and modules
    that are perhaps no networks at all, for an error's sake."""
    return once(("networks", id(model)), lambda: _find_networks(model))


def _find_networks(model: nn.Module) -> tuple[list[Network], list[Network]]:
    order = {path: n for n, (path, _) in enumerate(model.named_modules())}
    claimed: set[str] = set()
    found, doubtful = [], []
    for path, owner in reversed([*model.named_modules()]):
        if not _in_block(path) or is_attention(path, owner):
            continue
        linears = _linears(owner, path, claimed)
        if len(linears) not in (2, 3):
            continue
        network = _judge(path, owner, linears)
        if network is None:
            continue
        if network.why is None or _is_nothing_else(owner, len(linears)):
            claimed |= {join(path, name) for name in linears}
            found.append(network)
        else:
            doubtful.append(network)
    return sorted(found, key=lambda network: order[network.owner]), doubtful[::-1]


def _in_block(path: str) -> bool:
    """Whether the module belongs to one of the repeated blocks, and not to a head or projector."""
    return any(name.isdigit() for name in path.split("."))


def _linears(owner: nn.Module, path: str, claimed: set[str]) -> list[str]:
    """Its Linears outside of attention and of networks inside, by their paths below it; no more
    than four."""
    names = (
        name
        for name, module in outside_attention(owner)
        if is_linear(module) and join(path, name) not in claimed
    )
    return [*itertools.islice(names, 4)]


def _is_nothing_else(owner: nn.Module, count: int) -> bool:
    """Whether there is an activation, and beside it and `count` Linears nothing but dropout and
    norms: a network by all appearance, which must not be passed over."""
    if sum(map(is_linear, owner.modules())) != count:
        return False
    leaves = [m for m in owner.modules() if not any(m.children()) and not is_linear(m)]
    inert = ("norm", "drop", "identity")
    active = [m for m in leaves if not any(word in type(m).__name__.lower() for word in inert)]
    return bool(active) and all(map(is_activation, active))


def is_activation(module: nn.Module) -> bool:
    """Whether a module maps every number on its own, and not to itself."""
    x = torch.linspace(-2, 2, 8, **HERE)
    with suppress(Exception), torch.no_grad():  # whatever a module raises that takes no such input
        copied = twin(module, {}).eval()
        y, part = copied(x), copied(x[:3])
        return y.shape == x.shape and torch.allclose(y[:3], part) and not torch.equal(y, x)
    return False


def _judge(path: str, owner: nn.Module, linears: list[str]) -> Network | None:
    """The first form that the module computes; else the one that comes nearest, refused."""
    nearest = None
    for form in _forms(owner, linears):
        for whole in (True,) if form.gated else (True, False):
            proof = prove(owner, form, whole)
            network = Network(path, proof.form, whole, proof.error, proof.why)
            if network.why is None:
                return network
            if nearest is None or network.error < nearest.error:
                nearest = network
    return nearest


def _forms(owner: nn.Module, linears: list[str]) -> Iterator[FFNForm]:
    """What the parts may be, without dropout."""
    modules = dict(outside_attention(owner))
    sizes = {name: features(modules[name]) for name in linears}
    leaves = (n for n, m in modules.items() if not any(m.children()) and not is_linear(m))
    acts = [name for name in leaves if is_activation(modules[name])]
    kinds = [(name, None) for name in acts] or [(None, name) for name in FUNCTIONS]
    for order in itertools.permutations(linears):
        *gate, up, down = order
        (width, out), (hidden, back) = sizes[up], sizes[down]
        fused = not gate and out == 2 * hidden
        alike = all(sizes[name] == sizes[up] for name in gate)
        if back != width or not (fused or out == hidden) or not alike:
            continue
        for act, function in kinds:
            yield FFNForm(
                gate=gate[0] if gate else None, up=up, down=down, activation=act,
                function=function, fused=fused,
            )  # fmt: skip
