"""Activations that have tensors (xIELU's alphas, PReLU's slope), held by a bank as its own.

The dense module's activation stays as it is, so that it comes back bit for bit. Where every expert
is a whole network (BTX, Sukhbaatar et al. 2024) each has an activation of its own, stacked as its
matrices are; the parts of a split network share one, as the neurons of the dense network do.

Shapes: E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsecraft.dense.activations import placed, saved_tensors, tensors_of
from sparsecraft.dense.donors import FFN
from sparsecraft.moe.experts.stacked import with_one_more, without
from sparsecraft.moe.scopes import PerThread


class OwnActivation(nn.Module):
    """An elementwise activation with copies of its parameters and buffers: one for all experts, or
    stacked, (E, ...), under the names that they have in it, with `_` for a dot.

    They are read nowhere but in `forward`, so that hooks of offloading and sharding hold.

    Attributes:
        count: E; None where all experts share one.
        function: the activation without these tensors.
        names: a tensor's name here -> its name in the activation.
    """

    def __init__(self, activation: nn.Module, count: int | None = None):
        super().__init__()
        tensors, saved = tensors_of(activation), saved_tensors(activation)
        self.count, self.function = count, placed(activation, dict.fromkeys(tensors))
        self._functions = PerThread(partial(copy.deepcopy, self.function))
        self.names = {own_name(name): name for name in tensors}
        for own, name in self.names.items():
            tensor, value = tensors[name], tensors[name].detach().clone()
            if count is not None:
                value = value.repeat(count, *[1] * value.ndim)
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(own, nn.Parameter(value, tensor.requires_grad))
            else:
                self.register_buffer(own, value, persistent=name in saved)

    def forward(self, x: Tensor, e: int | None = None) -> Tensor:
        """activation(x) with the tensors of expert `e`, in the type of the tokens."""
        mixes = torch.is_autocast_enabled(x.device.type)
        tensors = {}
        for name, tensor in self._of(e).items():
            tensors[name] = tensor if mixes or not tensor.is_floating_point() else tensor.to(x)
        return functional_call(self._function(), tensors, (x,))

    def _function(self) -> nn.Module:
        """`function` for this thread alone: while it runs, it is lent the tensors."""
        if torch.compiler.is_dynamo_compiling():  # which lends it nothing
            return self.function
        return self._functions.own.train(self.function.training)

    def _of(self, e: int | None) -> dict[str, Tensor]:
        held = {name: getattr(self, own) for own, name in self.names.items()}
        return held if self.count is None else {name: t[e] for name, t in held.items()}

    def of(self, e: int = 0) -> dict[str, Tensor]:
        """Copies of the tensors of expert `e` by their names in the activation."""
        return {name: tensor.detach().clone() for name, tensor in self._of(e).items()}

    @torch.no_grad()
    def put(self, e: int, activations: Sequence[nn.Module]) -> None:
        """Let expert `e` have an activation's tensors; of several activations, their means."""
        for name, tensor in self._of(e).items():
            theirs = [tensors_of(activation)[name].detach() for activation in activations]
            # In float64 equal tensors have exactly themselves as their mean.
            mean = torch.stack([t.double() for t in theirs]).mean(0)
            tensor.copy_(theirs[0] if len(theirs) == 1 else mean)

    def append(self, activation: nn.Module) -> None:
        """One more expert, the last, with these tensors."""
        theirs = tensors_of(activation)
        self._change(self.count + 1, lambda name, t: with_one_more(t, theirs[name]))

    def remove(self, e: int) -> None:
        """Take those of expert `e` away."""
        self._change(self.count - 1, lambda name, t: without(t, e))

    def _remade(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The activation of one expert, whose stacked tensors are these, changed."""
        other = copy.deepcopy(self)
        if self.count is not None:
            other._change(1, lambda name, t: nn.Parameter(change(t.detach()), t.requires_grad))
        return other

    def _change(self, count: int, change: Callable[[str, Tensor], nn.Parameter]) -> None:
        changed = {own: change(name, getattr(self, own)) for own, name in self.names.items()}
        for own, tensor in changed.items():  # all of them, or none
            setattr(self, own, tensor if own in self._parameters else tensor.data)
        self.count = count

    def __repr__(self) -> str:
        return repr(self.function)


def activated(
    activation: nn.Module, hidden: Tensor, up: Tensor | None = None, *, e: int | None = None
) -> Tensor:
    """activation(hidden), times `up` where the network is gated; by the tensors of expert `e` where
    each has an activation of its own."""
    own = () if e is None or not isinstance(activation, OwnActivation) else (e,)
    hidden = activation(hidden, *own)
    return hidden if up is None else hidden * up


def own_name(name: str) -> str:
    """What an activation's tensor is called where it is stacked: names of tensors have no dot."""
    return name.replace(".", "_")


def own_activation(donor: FFN, count: int | None) -> nn.Module:
    """The donor's activation; where a file holds tensors of it, copies of them that are ours.

    Args:
        count: E, of experts that have one each; None for one that all share.
    """
    activation = donor.activation
    return OwnActivation(activation, count) if saved_tensors(activation) else activation


def own_tensors(activation: nn.Module, e: int = 0) -> Mapping[str, Tensor]:
    """What of a bank's activation is its own: of expert `e`, by the names in the activation."""
    return activation.of(e) if isinstance(activation, OwnActivation) else {}
