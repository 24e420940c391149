"""Full feed-forward experts (sparse upcycling, Komatsuzaki et al. 2023), and shards of them.

Shapes: E experts, D width, F hidden width of an expert. Gated networks store gate and up fused,
gate rows first, as transformers v5 does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ReLUSquaredActivation

from sparsecraft.dense.activations import tensors_of
from sparsecraft.dense.donors import FFN
from sparsecraft.dense.sites import Site
from sparsecraft.errors import RecipeError
from sparsecraft.kernels.two_layer import TwoLayer
from sparsecraft.moe.experts.base import CopiedExperts, Rate
from sparsecraft.moe.experts.folded import Network
from sparsecraft.moe.experts.own_activation import (
    OwnActivation,
    activated,
    own_activation,
    own_name,
    own_tensors,
)
from sparsecraft.moe.experts.stacked import copies, with_one_more, without
from sparsecraft.moe.init.neurons import diversify
from sparsecraft.recipe.edits import Edit, Place
from sparsecraft.recipe.experts import FFNSpec

SUM_OF_NETWORKS = (
    "a sum of several feed-forward networks is none of the same width; use how='average', "
    "or fixed weights that name one expert"
)


class FFNExperts(CopiedExperts):
    """E feed-forward networks of the donor's own form (gated or not, with or without biases).

    An activation with tensors is one for each expert (`OwnActivation`), in a blend of networks with
    the means of theirs.

    Args:
        device: `meta` for a bank whose values a checkpoint brings.

    Raises:
        RecipeError: the donor's neurons cannot be cut into shards alike, or experts of another
            width come without a checkpoint.
    """

    hidden_dropout, output_dropout = Rate(), Rate()
    folds = Network

    def __init__(self, spec: FFNSpec, donor: FFN, *, device: torch.device | str | None = None):
        super().__init__()
        self.spec = spec
        self.num_experts = spec.num_experts
        self.out_features = donor.width
        self.gated = donor.gated
        self.hidden_dropout = donor.hidden_dropout
        self.output_dropout = donor.output_dropout
        self.parts = spec.num_experts if spec.blend else spec.granularity
        self.activation = own_activation(donor, spec.num_experts)
        if donor.hidden_width % self.parts:
            raise RecipeError(
                f"The {donor.hidden_width} neurons of {donor.path!r} cannot be cut into "
                f"{self.parts} shards alike; choose a divisor."
            )
        donors = [donor] * (self.parts if spec.blend else 1)
        networks = [self._network(e, donors, device) for e in range(self.parts)]
        if spec.width is not None:
            networks = [_blank(spec.width, donor, networks[0])]
        for name in networks[0]:
            tensors = [network[name] for network in networks]
            bank = None if tensors[0] is None else _in_turn(tensors, self.num_experts)
            self.register_parameter(name, bank)

    @classmethod
    def build(
        cls,
        spec: FFNSpec,
        donor: FFN,
        site: Site,
        place: Place,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        return cls(spec, donor, device=device)

    def expert(self, e: int, x: Tensor) -> Tensor:
        first, first_bias = self._first()
        hidden = F.linear(x, first[e].to(x.dtype), _row(first_bias, e, x.dtype))
        y = F.linear(
            self._activate(hidden, e), self.down[e].to(x.dtype), _row(self.down_bias, e, x.dtype)
        )
        return F.dropout(y, self.output_dropout, self.training)

    def two_layer(self, dtype: torch.dtype) -> TwoLayer:
        first, first_bias = self._first()
        return TwoLayer(
            first_EMI=first.to(dtype),
            second_EOH=self.down.to(dtype),
            activate=self._activate,
            activation=None if self.training and self.hidden_dropout else self.activation,
            by_expert=isinstance(self.activation, OwnActivation),
            first_bias_EM=None if first_bias is None else first_bias.to(dtype),
            second_bias_EO=None if self.down_bias is None else self.down_bias.to(dtype),
            output_dropout=self.output_dropout if self.training else 0.0,
        )

    @torch.no_grad()
    def put(self, e: int, *donors: FFN) -> None:
        """Let expert `e` be the network of the donor, or its shard of it; where `spec.blend` says
        so, its shard of each donor, side by side."""
        for name, tensor in self._network(e, donors).items():
            if tensor is not None:
                getattr(self, name)[e].copy_(tensor)
        if isinstance(self.activation, OwnActivation):
            self.activation.put(e, [donor.activation for donor in donors])

    def take(self, donors: Iterable[FFN], count: int) -> None:
        if not self.spec.blend:
            super().take(donors, count)
            return
        donors = list(donors)
        for e in range(self.num_experts):
            self.put(e, *donors)

    def copied(self, donor: FFN) -> Mapping[str, Tensor | None]:
        own = tensors_of(donor.activation)
        activation = {f"activation.{own_name(name)}": t for name, t in own.items()}
        return _tensors(donor, None, donor.gated, None) | activation

    def diversify(self) -> None:
        diversify(self, self.spec.differ)

    def misfit(self, donor: FFN) -> str | None:
        width = self.down.shape[-1]
        if width == donor.hidden_width:
            return None
        return f"have {width} neurons and the dense network {donor.hidden_width}"

    @torch.no_grad()
    def append(self, donor: FFN) -> None:
        network = self._network(self.num_experts, [donor])
        stacked = self.named_parameters(recurse=False)
        longer = {n: with_one_more(p, network[n]) for n, p in stacked}
        for name, parameter in longer.items():  # all of them, or none
            setattr(self, name, parameter)
        if isinstance(self.activation, OwnActivation):
            self.activation.append(donor.activation)
        self._recount(self.num_experts + 1)

    @torch.no_grad()
    def remove(self, e: int) -> None:
        for name, parameter in [*self.named_parameters(recurse=False)]:
            setattr(self, name, without(parameter, e))
        if isinstance(self.activation, OwnActivation):
            self.activation.remove(e)
        self._recount(self.num_experts - 1)

    def why_no_fold(self, edit: Edit, site: Site, single: bool) -> str | None:
        if not single:
            return SUM_OF_NETWORKS
        if self.spec.granularity > 1:
            return (
                "its experts are shards of networks, and no one of them has the dense one's width"
            )
        if edit.place != "replace":
            return f"feed-forward experts {edit.place} the dense network cannot take its place"
        return None

    def fold(self, weights_E: Tensor) -> Network:
        e, (first, first_bias) = int(weights_E.argmax()), self._first()
        rows = first, first_bias, self.down, self.down_bias
        tensors = (None if stacked is None else stacked.detach()[e] for stacked in rows)
        return Network(*tensors, activation=own_tensors(self.activation, e))

    def _remade(self, change: Callable[[Tensor], Tensor]) -> Self:
        bank = super()._remade(change)
        bank.parts, width = 1, self.down.shape[-1] if self.parts > 1 else self.spec.width
        bank.spec = replace(self.spec, num_experts=1, granularity=1, blend=False, width=width)
        return bank

    def _recount(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.spec = replace(self.spec, num_experts=num_experts)

    def neurons(self, e: int) -> list[tuple[Tensor, Tensor | None]]:
        """Views of expert `e`, a row for each neuron: its gate (if any) and its up projection, each
        (F, D) and its bias (F,) or None, and the columns of down, (F, D) and None."""
        (first, bias), halves = self._first(), 2 if self.gated else 1
        biases = [None] * halves if bias is None else bias[e].chunk(halves)
        return [*zip(first[e].chunk(halves), biases, strict=True), (self.down[e].t(), None)]

    def _network(
        self, e: int, donors: Sequence[FFN], device: torch.device | str | None = None
    ) -> dict[str, Tensor | None]:
        """The bank's name of each tensor of expert `e`."""
        width = donors[0].hidden_width // self.parts
        start = width * (e % self.parts)
        neurons = slice(start, start + width) if self.parts > 1 else None
        shards = [_tensors(donor, neurons, self.gated, device) for donor in donors]
        network = shards[0] if len(shards) == 1 else _side_by_side(shards, self.gated)
        return network if self.spec.scaling == "none" else self._scaled(network)

    def _scaled(self, network: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """The network with `scale` times its output; see `scaling`."""
        scale, paper = self.spec.scale, self.spec.scaling == "paper"
        gate, up, down = factors(scale, self.gated, self.activation, paper)
        first = [gate, up] if self.gated else [up]
        # Every shard has the second bias, and one of G all else, so that this part of `scale`
        # is not for it. The paper's code leaves it as it is.
        by_name = {"down": [down], "down_bias": [1.0 if paper else scale / self.spec.granularity]}
        return {
            name: None if tensor is None else _times(tensor, by_name.get(name, first))
            for name, tensor in network.items()
        }

    def _first(self) -> tuple[Tensor, Tensor | None]:
        return (self.gate_up, self.gate_up_bias) if self.gated else (self.up, self.up_bias)

    def _activate(self, hidden: Tensor, e: int | None = None) -> Tensor:
        hidden = activated(self.activation, *hidden.chunk(1 + self.gated, dim=-1), e=e)
        return F.dropout(hidden, self.hidden_dropout, self.training)


def factors(
    scale: float, gated: bool, activation: nn.Module, paper: bool = False
) -> tuple[float, float, float]:
    """What gate, up (with their biases) and down are multiplied by, for `scale` times the output.

    Exact are up and down where the network is linear in up, because a gate has the activation, or
    where activation(s x) = s^n activation(x) for positive s; and else down alone. Up gets the power
    of two nearest to an even share and down the rest, because a power of two rounds no weight.

    Args:
        paper: one root for all: the cube root where the network is gated or of squared ReLU, where
            it is exact, else the square root (He et al. 2024 and Megatron's code).
    """
    squares = isinstance(activation, ReLUSquaredActivation)
    if paper:
        root = scale ** (1 / 3 if gated or squares else 1 / 2)
        return root, root, root
    power = 1 if gated or isinstance(activation, nn.ReLU) else 2 if squares else 0
    up = 2.0 ** round(math.log2(scale) / (power + 1)) if power else 1.0
    return 1.0, up, scale / up**power


def _tensors(
    donor: FFN, neurons: slice | None, gated: bool, device: torch.device | str | None
) -> dict[str, Tensor | None]:
    """A bank's name of each of the donor's tensors, of some neurons or all."""
    first = "gate_up" if gated else "up"
    found = {
        first: donor.first_weight(neurons),
        f"{first}_bias": donor.first_bias(neurons),
        "down": donor.down_weight(neurons),
        "down_bias": donor.down_bias(),
    }
    # A donor without memory gives shapes, wherever the bank is to be.
    return {
        name: t if t is None else t.detach().to("meta" if t.is_meta else device)
        for name, t in found.items()
    }


def _side_by_side(shards: list[dict[str, Tensor | None]], gated: bool) -> dict[str, Tensor | None]:
    """Networks as one with the neurons of all; the second bias is the mean of theirs."""

    def joined(name: str, tensors: list[Tensor]) -> Tensor:
        if name == "down":
            return torch.cat(tensors, dim=-1)
        if name == "down_bias":
            return torch.stack(tensors).mean(0)
        halves = [t.unflatten(0, (2 if gated else 1, -1)) for t in tensors]
        return torch.cat(halves, dim=1).flatten(0, 1)

    return {
        name: None if tensor is None else joined(name, [shard[name] for shard in shards])
        for name, tensor in shards[0].items()
    }


def _times(tensor: Tensor, factors: list[float]) -> Tensor:
    """Equal parts of the tensor's rows, each times its factor."""
    parts = tensor.chunk(len(factors)) if len(factors) > 1 else [tensor]
    return torch.cat([part * factor for part, factor in zip(parts, factors, strict=True)])


def _blank(width: int, donor: FFN, network: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """`network` with another width, without values."""
    if not network["down"].is_meta:
        raise RecipeError(
            f"width is {width}, and {donor.path!r} has {donor.hidden_width} neurons: experts of "
            "another width come with a checkpoint (`sparsecraft import`); leave out width."
        )
    F, D = width, donor.width
    shapes = {"gate_up": (2 * F, D), "gate_up_bias": (2 * F,), "up": (F, D), "up_bias": (F,)}
    shapes |= {"down": (D, F), "down_bias": (D,)}
    return {
        name: None if tensor is None else tensor.new_empty(shapes[name])
        for name, tensor in network.items()
    }


def _in_turn(tensors: list[Tensor], count: int) -> nn.Parameter:
    """`count` experts: copies of one tensor, or of several as many of each, all of them in turn."""
    if len(tensors) == 1:
        return copies(tensors[0], count)
    stacked = torch.stack(tensors)
    return nn.Parameter(stacked.repeat(count // len(tensors), *[1] * tensors[0].ndim))


def _row(bias: Tensor | None, e: int, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[e].to(dtype)
