"""A dense feed-forward network split into experts: the same neurons, in another order.

    dense    first (G F, D)    ┌ gate ┐ F     down (D, F)
                               └ up   ┘ F

    split    first (E, G m, D)    ┌ gate_1 ┐ m    ┌ gate_2 ┐      down (E, m, D), neuron-major
                                  └ up_1   ┘ m    └ up_2   ┘ ...

    y = sum_e w_e (act(gate_e x) * up_e x) down_e + b,    w_e = 1 for every e: the dense network

Any partition keeps the function: F(x) = sum_e E_e(x) + b, with b the bias of the down projection,
added once (MoEfication, Zhang et al. 2022; D2DMoE, Szatkowski et al. 2024). Weights are stored
neuron-major, so that an expert's neurons lie in one piece and the way back is a permutation.

Shapes: T tokens, E experts, m neurons of each, F = E m neurons, D width, G = 2 parts of the first
matrix where it has a gate (its rows come first), else 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.dense.donors import FFN, Linear
from sparsecraft.dense.sites import Site
from sparsecraft.errors import RecipeError, SparsecraftError
from sparsecraft.kernels import split
from sparsecraft.kernels.device import usable
from sparsecraft.kernels.selection import Active
from sparsecraft.kernels.split import SplitNet
from sparsecraft.moe.experts.base import Experts, Rate
from sparsecraft.moe.experts.dispatch import loop
from sparsecraft.moe.experts.folded import Network
from sparsecraft.moe.experts.imitation import imitation
from sparsecraft.moe.experts.neuron_major import by_expert, by_part, owned
from sparsecraft.moe.experts.own_activation import own_activation, own_tensors
from sparsecraft.moe.extra_state import is_bool, is_left_out, pack, unpack
from sparsecraft.moe.kept import Kept
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.edits import Edit, Place
from sparsecraft.recipe.experts import SplitSpec


class SplitExperts(Experts):
    """E groups of a dense network's neurons.

    Without a routing every expert runs, which is the dense network. With one, an expert that a
    token leaves out adds nothing, or, if the bank compensates, its mean.

    Attributes:
        neurons: (E, m), which neuron of the dense network stands at each place.
        mean: (E, m), the mean activation of each neuron, if the bank compensates.
    """

    hidden_dropout, output_dropout = Rate(), Rate()
    of_dense = True
    folds = Network
    one_for_all = ("down_bias",)
    adds_all_biases = True

    def __init__(self, spec: SplitSpec, donor: FFN, *, device: torch.device | str | None = None):
        super().__init__()
        width, E = donor.hidden_width, spec.num_experts
        if width % E:
            near = [n for n in range(1, width + 1) if width % n == 0]
            near = sorted(sorted(near, key=lambda n: abs(n - E))[:4])
            raise RecipeError(
                f"num_experts is {E} and the network at {donor.path!r} has {width} neurons, which "
                f"{E} experts of one size cannot share; use {', '.join(map(str, near))}."
            )
        self.spec = spec
        self.num_experts, self.out_features = E, donor.width
        self.activation = own_activation(donor, None)
        self._own_activation = (self.activation,)  # in a tuple, so that it is no part of the bank
        self.hidden_dropout, self.output_dropout = donor.hidden_dropout, donor.output_dropout
        self.compensates = (
            not is_relu(donor.activation) if spec.compensate is None else spec.compensate
        )
        meta = device is not None and torch.device(device).type == "meta"
        parts, m = 2 if donor.gated else 1, width // E
        rows = {"first": donor.first_weight(), "first_bias": donor.first_bias()}
        for name, tensor in rows.items():
            stacked = None if tensor is None else by_expert(tensor.unflatten(0, (parts, width)), E)
            self.register_parameter(name, owned(stacked, meta))
        self.down = owned(donor.down_weight().t().reshape(E, m, -1), meta)
        self.register_parameter("down_bias", owned(donor.down_bias(), meta))
        self.register_buffer("neurons", torch.arange(width, device=self.down.device).view(E, m))
        self.register_buffer("mean", self.down.new_zeros(E, m) if self.compensates else None)
        self._kept = Kept()

    @classmethod
    def build(
        cls,
        spec: SplitSpec,
        donor: FFN | Linear,
        site: Site,
        place: Place,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        if place != "imitate":
            return cls(spec, donor, device=device)
        bank = cls(spec, imitation(spec, donor, device=device, dtype=dtype), device=device)
        bank.of_dense = False
        return bank

    @property
    def in_features(self) -> int:
        return self.first.shape[-1]

    @property
    def parts(self) -> int:
        return self.first.shape[1] // self.down.shape[1]

    @property
    def neurons_per_expert(self) -> int:
        return self.down.shape[1]

    @property
    def products(self) -> int:
        """Multiplications for one token where every expert runs."""
        return self.first.numel() + self.down.numel()

    # -------------------------------------------------------------------------------- computation

    def expert(self, e: int, x: Tensor) -> Tensor:
        """What expert `e` adds to what is there without it, (n, D)."""
        bias = None if self.first_bias is None else self.first_bias[e].to(x.dtype)
        hidden = self._drop(self._activate(F.linear(x, self.first[e].to(x.dtype), bias)))
        if self.mean is not None:
            hidden = hidden - self.mean[e].to(x.dtype)
        return hidden @ self.down[e].to(x.dtype)

    def mixed(self, x_TD: Tensor, routing: Routing | None = None) -> Tensor:
        """y_TD; every expert with weight one where there is no routing."""
        if routing is None or routing.every:
            return F.dropout(self._every(x_TD), self.output_dropout, self.training)
        if self.dispatch == "loop":
            y_TD, constant_D = loop(self, x_TD, routing), self._constant()
            y_TD = y_TD if constant_D is None else y_TD + constant_D.to(y_TD.dtype)
            return F.dropout(y_TD, self.output_dropout, self.training)
        return self.weighed(x_TD, routing.weights_TE())

    def routed(
        self, x_TD: Tensor, weigh: Callable[[Tensor], tuple[Tensor, Active | None]]
    ) -> Tensor:
        """`weighed` by what `weigh` makes of x_TD, at the same time where that is faster."""
        if split.overlaps(x_TD) and self.dispatch in ("auto", "dense") and not self._is_plain():
            net = self.net(x_TD.dtype)
            if split.weighs_at_once(net, x_TD):
                y_TD = split.masked_beside(net, x_TD, lambda: weigh(x_TD)[0])
                return F.dropout(y_TD, self.output_dropout, self.training)
        return self.weighed(x_TD, *weigh(x_TD))

    def weighed(self, x_TD: Tensor, weights_TE: Tensor, used: Active | None = None) -> Tensor:
        """y_TD by weights that are zero where an expert does not run.

        Args:
            used: the experts that any token uses, where a kernel has listed them.
        """
        if self.dispatch == "loop":
            return self.mixed(x_TD, Routing.of_weights(weights_TE))
        if self._is_plain():
            y_TD = self._weighed(x_TD, weights_TE)
        else:
            net, path = self.net(x_TD.dtype), self.dispatch
            if path == "auto":
                path = split.choose(net, x_TD, weights_TE)
            match path:
                case "dense" | "masked":
                    y_TD = split.masked(net, x_TD, weights_TE)
                case "gather":
                    y_TD = split.gather(net, x_TD, weights_TE, used)
                case "grouped":
                    y_TD = split.grouped(net, x_TD, weights_TE)
                case _:
                    raise SparsecraftError(
                        f"Split experts do not run by the {path!r} path; use auto, loop, dense, "
                        "gather or grouped."
                    )
        return F.dropout(y_TD, self.output_dropout, self.training)

    def active(self, slots: float) -> int:
        idle = round((1 - slots / self.num_experts) * self.products)
        return sum(p.numel() for p in self.parameters()) - idle

    def recorded(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """Every expert with weight one, and the routing with the input of the activation (of the
        gate where there is one), neurons in the bank's order."""
        pre_TEm, hidden_TEm = self.hidden(x_TD)
        y_TD = F.dropout(self._dense(hidden_TEm, x_TD), self.output_dropout, self.training)
        return y_TD, replace(routing, pre_TF=pre_TEm.flatten(1))

    def net(self, dtype: torch.dtype, whole: bool = False) -> SplitNet:
        """The bank's tensors in `dtype`, for `sparsecraft.kernels.split`.

        Args:
            whole: for the dense network, which has no means and the dense bias.
        """

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        return SplitNet(
            first_EMD=cast(self.first),
            down_EHD=cast(self.down),
            activation=self.activation,
            first_bias_EM=cast(self.first_bias),
            mean_EH=None if whole else cast(self.mean),
            bias_D=cast(self.down_bias if whole else self._constant()),
        )

    def hidden(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Input of the activation (of the gate where there is one) and what the second matrix
        reads but for dropout, both (T, E, m)."""
        bias = None if self.first_bias is None else self.first_bias.flatten().to(x_TD.dtype)
        first_TF = F.linear(x_TD, self.first.flatten(0, 1).to(x_TD.dtype), bias)
        first_TEM = first_TF.unflatten(-1, (self.num_experts, -1))
        return first_TEM[..., : self.neurons_per_expert], self._activate(first_TEM)

    def _every(self, x_TD: Tensor) -> Tensor:
        if usable(x_TD) and not self._is_plain():
            net = self.net(x_TD.dtype, whole=True)
            if split.weighs_at_once(net, x_TD):
                return split.every(net, x_TD, net.bias_D)
        return self._dense(self.hidden(x_TD)[1], x_TD)

    def _dense(self, hidden_TEm: Tensor, x_TD: Tensor) -> Tensor:
        """What the dense network's second matrix makes of its activations."""
        y_TD = self._drop(hidden_TEm).flatten(1) @ self.down.flatten(0, 1).to(x_TD.dtype)
        return y_TD if self.down_bias is None else y_TD + self.down_bias.to(x_TD.dtype)

    def _is_plain(self) -> bool:
        """Whether no kernel knows this network: dropout inside (T5), or another width behind."""
        drops = self.training and self.hidden_dropout > 0
        return drops or self.in_features != self.out_features

    def _weighed(self, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
        """Every expert on every token, times its weight."""
        hidden_TEm = self._drop(self.hidden(x_TD)[1])
        if self.mean is not None:
            hidden_TEm = hidden_TEm - self.mean.to(x_TD.dtype)
        hidden_TEm = hidden_TEm * weights_TE.to(x_TD.dtype)[..., None]
        y_TD = hidden_TEm.flatten(1) @ self.down.flatten(0, 1).to(x_TD.dtype)
        constant_D = self._constant()
        return y_TD if constant_D is None else y_TD + constant_D.to(x_TD.dtype)

    def _activate(self, first: Tensor) -> Tensor:
        """(..., M) -> (..., m)."""
        if self.parts == 1:
            return self.activation(first)
        gate, up = first.chunk(2, dim=-1)
        return self.activation(gate) * up

    def _drop(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, self.hidden_dropout, self.training)

    def _constant(self) -> Tensor | None:
        """What a token gets of which no expert runs, (D,): the bias, and all the means.

        Kept in evaluation while nothing changes and no gradient is wanted: it reads the whole
        second matrix. After an edit through `.data`, which no version counts, call `eval()`.
        """
        if self.mean is None:
            return self.down_bias
        tensors = [t for t in (self.mean, self.down, self.down_bias) if t is not None]
        return self._kept.value(tensors, self._summed, training=self.training)

    def train(self, mode: bool = True) -> SplitExperts:
        self._kept.drop()
        return super().train(mode)

    def _summed(self) -> Tensor:
        wide = torch.promote_types(self.down.dtype, torch.float32)
        with torch.autocast(self.down.device.type, enabled=False):
            constant_D = self.mean.flatten().to(wide) @ self.down.flatten(0, 1).to(wide)
        constant_D = constant_D if self.down_bias is None else constant_D + self.down_bias
        return constant_D.to(self.down.dtype)  # once, and not at every call

    # ---------------------------------------------------------------------------- the arrangement

    @torch.no_grad()
    def arrange(self, neurons_EM: Tensor) -> None:
        """Let the experts have other neurons; the sum of all experts stays what it is.

        Args:
            neurons_EM: (E, m), each neuron of the dense network once.
        """
        E, m = self.neurons.shape
        order_F = neurons_EM.to(self.neurons.device).flatten()
        if neurons_EM.shape != (E, m) or not torch.equal(
            order_F.sort().values, torch.arange(E * m, device=order_F.device)
        ):
            raise SparsecraftError(
                f"A partition of {E * m} neurons must name each of them once, as ({E}, {m}); this "
                f"one is {tuple(neurons_EM.shape)}."
            )
        place_F = torch.empty_like(order_F)
        place_F[self.neurons.flatten()] = torch.arange(E * m, device=order_F.device)
        take_F = place_F[order_F]  # where each neuron of the new order stands now
        for parameter in (self.first, self.first_bias):
            if parameter is None:
                continue
            arranged = by_expert(by_part(parameter, self.parts)[:, take_F], E)
            parameter.data = arranged.contiguous()
        self.down.data = self.down.flatten(0, 1)[take_F].view_as(self.down)
        if self.mean is not None:
            self.mean.data = self.mean.flatten()[take_F].view_as(self.mean)
        self.neurons.data = order_F.view(E, m).clone()

    @torch.no_grad()
    def dense(self) -> dict[str, Tensor | None]:
        """The dense network's tensors, in its own order: `first` (G F, D), `first_bias`, `down`
        (D, F) and `down_bias`, as `donor.FFN` gives them."""
        place_F = self.neurons.flatten().argsort()

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else by_part(tensor, self.parts)[:, place_F].flatten(0, 1)

        return {
            "first": rows(self.first),
            "first_bias": rows(self.first_bias),
            "down": self.down.flatten(0, 1)[place_F].t(),
            "down_bias": self.down_bias,
        }

    def why_no_fold(self, edit: Edit, site: Site, single: bool) -> str | None:
        if self.has_own_activation or is_relu(self.activation):
            return None
        own = self._own_activation[0]
        return f"its activation is {self.activation!r} and the dense network's {own!r}"

    def fold(self, weights_E: Tensor) -> Network:
        """The dense network again: all parts with weight one, whatever the weights."""
        dense, activation = self.dense(), own_tensors(self.activation)
        return Network(**dense, rectified=self.rectified, activation=activation)

    def _remade(self, change: Callable[[Tensor], Tensor]) -> Self:
        bank = super()._remade(change)
        bank.spec, bank._kept = replace(self.spec, num_experts=1), Kept()
        if self.has_own_activation:
            bank._own_activation = (bank.activation,)
        return bank

    @property
    def rectified(self) -> bool:
        return is_relu(self.activation) and not is_relu(self._own_activation[0])

    @property
    def has_own_activation(self) -> bool:
        """Whether its activation is the dense network's."""
        return self.activation is self._own_activation[0]

    def rectify(self, undo: bool = False) -> None:
        """Let ReLU be the activation, or the dense network's own again."""
        # While ReLU stands there, the other does not follow the bank.
        self.activation = self._own_activation[0].to(self.down.device) if undo else nn.ReLU()

    def get_extra_state(self) -> Tensor:
        """The activation, whether ReLU was put in, and whether the bank imitates."""
        own = {"rectified": is_relu(self.activation) and not self.has_own_activation}
        return pack(own | {"imitates": self.imitates, "activation": repr(self.activation)})

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what another bank runs.

        Raises:
            SparsecraftError: the state is no such bank's, or of another activation.
        """
        if is_left_out(state):
            return
        own, now = repr(self._own_activation[0]), repr(self.activation)
        checks = {
            "rectified": is_bool,
            "imitates": lambda found: is_bool(found) and not (found and self.of_dense),
            "activation": lambda found: isinstance(found, str),
        }
        found = unpack(state, "split network", checks)
        if not found["rectified"] and found["activation"] not in (own, now):
            raise SparsecraftError(
                f"The state dict is of a split network with activation {found['activation']:.80}, "
                f"and this one has {now}; put that into the bank's `activation` first, or load the "
                "state_dict() of a model that the same recipe has converted."
            )
        if found["rectified"] or found["activation"] == own:
            self.rectify(undo=not found["rectified"])
        self.imitates = found["imitates"]


def is_relu(activation: nn.Module) -> bool:
    return isinstance(activation, nn.ReLU)
