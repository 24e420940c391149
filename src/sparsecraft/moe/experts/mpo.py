"""Feed-forward experts whose matrices share their central core (MPOE, Gao et al. 2022).

Each matrix of expert e is a product of five cores, of which the third is one for all experts:

    W_e = T1_e T2_e C T4_e T5_e

C has about as many numbers as the matrix, the other four together a few percent of it. A matrix is
made where tokens meet it, let go, and made again in the backward pass: there is one at a time, or
one of each expert where all of them are small.

Shapes: E experts, D width, F hidden width; core k (d_{k-1}, i_k, j_k, d_k), see `kernels.mpo`.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.dense.donors import FFN
from sparsecraft.dense.sites import Site
from sparsecraft.errors import RecipeError
from sparsecraft.kernels.device import compute_dtype, is_transformed
from sparsecraft.kernels.grouped import grouped, why_no_product
from sparsecraft.kernels.mpo import (
    Kind,
    Matrices,
    compose,
    decompose,
    left_end,
    right_end,
    shapes,
)
from sparsecraft.kernels.remaking import made_again
from sparsecraft.kernels.two_layer import TwoLayer
from sparsecraft.moe.experts.base import Experts, Rate
from sparsecraft.moe.experts.ffn import SUM_OF_NETWORKS, FFNExperts
from sparsecraft.moe.experts.folded import Network
from sparsecraft.moe.experts.own_activation import (
    OwnActivation,
    activated,
    own_activation,
    own_tensors,
)
from sparsecraft.moe.experts.stacked import copies
from sparsecraft.moe.init.factors import Factors, factors
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.edits import Edit, Place
from sparsecraft.recipe.experts import FFNSpec, MPOSpec

log = logging.getLogger("sparsecraft")

OWN = (1, 2, 4, 5)  # numbers of the cores that each expert has of its own
FIRST, DOWN = ("gate", "up"), "down"
# Numbers of a matrix of all experts up to which they are made at a time, in one layer: on a GPU
# small products cost their launches. 64 MiB of them in float32.
TOGETHER = 2**24


class MPOExperts(Experts):
    """E feed-forward networks of the donor's form; biases are one for all, as in the paper's code.

    Cores are in float32 at least, whatever the donor is in: a product of rounded cores is no
    rounded matrix.

    Attributes:
        matrices: name -> its factors, those of its rows and those of its columns.
        masked: the step of training that is under way leaves the central cores as they are.

    Raises:
        RecipeError: a dimension has no five factors.
    """

    hidden_dropout, output_dropout = Rate(), Rate()
    folds = Network
    one_for_all = tuple(
        f"{matrix}_{what}" for matrix in (*FIRST, DOWN) for what in ("central", "bias")
    )

    def __init__(self, spec: MPOSpec, donor: FFN, *, device: torch.device | str | None = None):
        super().__init__()
        self.num_experts, self.out_features = spec.num_experts, donor.width
        self.mask, self.masked = spec.mask, False
        self.first = FIRST if donor.gated else FIRST[1:]
        self.hidden_dropout, self.output_dropout = donor.hidden_dropout, donor.output_dropout
        self.activation = own_activation(donor, spec.num_experts)
        hidden, width = _factors(spec, donor)
        self.matrices = dict.fromkeys(self.first, (hidden, width)) | {DOWN: (width, hidden)}
        lost = {}
        for name, (weight, bias) in _dense(donor, self.first).items():
            bias = None if bias is None else nn.Parameter(_placed(bias, device))
            self.register_parameter(f"{name}_bias", bias)
            lost[name] = self._put(name, weight, spec.bond, device)
        if spec.bond is not None and None not in lost.values():
            found = ", ".join(f"{name} by {error:.2e}" for name, error in lost.items())
            log.warning(f"{donor.path}: bonds of at most {spec.bond} change {found} (of its norm).")

    def _put(
        self, name: str, weight: Tensor, bond: int | None, device: torch.device | str | None
    ) -> float | None:
        """Let every expert's matrix be the donor's. Gives what is lost, relative to its norm; None
        where there are no values."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if weight.is_meta or torch.device(device or "cpu").type == "meta":
            sizes = shapes(*self.matrices[name], bond)
            cores = [torch.empty(size, dtype=dtype, device="meta") for size in sizes]
        else:
            cores = decompose(weight, *self.matrices[name], bond)
        for k, core in enumerate(cores, 1):
            core = core.to(dtype) if core.is_meta else core.to(device, dtype)
            if k in OWN:
                self.register_parameter(f"{name}_{k}", copies(core, self.num_experts))
            else:
                self.register_parameter(f"{name}_central", nn.Parameter(core.contiguous()))
        if cores[0].is_meta or bond is None:
            return None
        dense = weight.detach().double()
        return ((compose(cores) - dense).norm() / dense.norm()).item()

    @classmethod
    def build(
        cls,
        spec: MPOSpec,
        donor: FFN,
        site: Site,
        place: Place,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        return cls(spec, donor, device=device)

    # -------------------------------------------------------------------------------- computation

    def expert(self, e: int, x: Tensor) -> Tensor:
        ends = {name: _ends(self._outer([name], slice(e, e + 1))) for name in self.matrices}
        return self._of_expert(e, x, ends)

    def mixed(self, x_TI: Tensor, routing: Routing | None = None) -> Tensor:
        if routing is not None and self._fit_together(x_TI):
            return self._together(x_TI, routing)
        if routing is None or not torch.compiler.is_compiling():
            return super().mixed(x_TI, routing)
        # The tokens of each expert have shapes that no graph can hold: every expert takes all.
        weights_TE = routing.weights_TE().to(x_TI.dtype)
        return sum(weights_TE[:, e, None] * self.expert(e, x_TI) for e in range(self.num_experts))

    def all_experts(self) -> list[Callable[[Tensor], Tensor]]:
        ends = {n: [end.split(1, 1) for end in _ends(self._outer([n]))] for n in self.matrices}
        return [
            functools.partial(
                self._of_expert, e, ends={n: (a[e], b[e]) for n, (a, b) in ends.items()}
            )
            for e in range(self.num_experts)
        ]

    def _fit_together(self, x_TI: Tensor) -> bool:
        """Whether matrices of all experts are made at a time, for grouped products."""
        hidden, width = (prod(five) for five in self.matrices[self.first[0]])
        if self.dispatch != "auto" or self.num_experts * hidden * width > TOGETHER:
            return False
        if is_transformed() or torch.compiler.is_compiling():
            return False
        return why_no_product(x_TI, (len(self.first) * hidden, hidden, width)) is None

    def _together(self, x_TI: Tensor, routing: Routing) -> Tensor:
        x_TI = x_TI.to(compute_dtype(x_TI))
        hidden, width = self.matrices[self.first[0]]
        kinds = Kind(hidden, width, len(self.first)), Kind(width, hidden)

        def mixture(first_EMD: Tensor, down_EDF: Tensor) -> Tensor:
            net = self._two_layer(first_EMD, down_EDF)
            decided = routing.weights_TK, routing.indices_TK, routing.sums_to_one, routing.empty
            return grouped(net, x_TI, *decided)

        # Nothing but parameters waits for the backward pass, not the ends either.
        ends = functools.partial(_ends, self._outer(self.matrices))
        return self._meet(mixture, self.matrices, ends, kinds, x_TI.dtype)

    def _two_layer(self, first_EMD: Tensor, down_EDF: Tensor) -> TwoLayer:
        def activate(hidden_nM: Tensor, e: int | None = None) -> Tensor:
            return self._activate(*hidden_nM.chunk(len(self.first), dim=-1), e=e)

        firsts, down = [getattr(self, f"{name}_bias") for name in self.first], self.down_bias
        first = None if firsts[0] is None else torch.cat(firsts)
        return TwoLayer(
            first_EMI=first_EMD,
            second_EOH=down_EDF,
            activate=activate,
            activation=None if self.training and self.hidden_dropout else self.activation,
            by_expert=isinstance(self.activation, OwnActivation),
            first_bias_EM=None
            if first is None
            else first.to(first_EMD).expand(self.num_experts, -1),
            second_bias_EO=None if down is None else down.to(down_EDF).expand(self.num_experts, -1),
            output_dropout=self.output_dropout if self.training else 0.0,
        )

    def _of_expert(self, e: int, x: Tensor, ends: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Expert `e` on tokens x, given the ends of each of its matrices."""
        hidden = self._activate(*(self._product(name, x, ends) for name in self.first), e=e)
        y = self._product(DOWN, hidden, ends)
        return F.dropout(y, self.output_dropout, self.training)

    def _product(self, name: str, x: Tensor, ends: Mapping[str, Sequence[Tensor]]) -> Tensor:
        x, bias = x.to(compute_dtype(x)), getattr(self, f"{name}_bias")
        bias = None if bias is None else bias.to(x.dtype)
        kinds = (Kind(*self.matrices[name]),)
        use = lambda weight_1OI: F.linear(x, weight_1OI[0], bias)  # noqa: E731
        return self._meet(use, [name], lambda: ends[name], kinds, x.dtype)

    def _meet(
        self,
        use: Callable[..., Tensor],
        names: Collection[str],
        ends: Callable[[], Sequence[Tensor]],
        kinds: tuple[Kind, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        """`use` of the matrices that have these ends, none of which waits for the backward pass."""
        middles = [self._wide(self._middle(name)).flatten(1) for name in names]

        # A transform of torch.func differentiates plain operations, forward too.
        made = Matrices.forward if is_transformed() else Matrices.apply

        def make() -> tuple[Tensor, ...]:
            with torch.autocast(middles[0].device.type, enabled=False):
                return made(*ends(), kinds, dtype, *middles)

        cores = [getattr(self, f"{name}_{k}") for name in names for k in OWN]
        return made_again(make, use, (*cores, *middles))

    def _activate(self, *first_nH: Tensor, e: int | None = None) -> Tensor:
        hidden_nH = activated(self.activation, *first_nH, e=e)
        return F.dropout(hidden_nH, self.hidden_dropout, self.training)

    def _outer(self, names: Collection[str], experts: slice = slice(None)) -> list[list[Tensor]]:
        """The outer cores of matrices, (E, d_{k-1}, i_k j_k, d_k) each."""
        return [
            [self._wide(getattr(self, f"{name}_{k}")[experts]).flatten(2, 3) for name in names]
            for k in OWN
        ]

    def _wide(self, core: Tensor) -> Tensor:
        """In float32 at least, or what an expert's own cores are in if that is more: rounding at
        each of four products would leave less of a matrix than rounding it once."""
        return core.to(torch.promote_types(self.down_1.dtype, torch.float32))

    def _middle(self, name: str) -> Tensor:
        central = getattr(self, f"{name}_central")
        if self.masked and central.requires_grad and torch.is_grad_enabled():
            central = central.view_as(central)
            central.register_hook(torch.zeros_like)
        return central

    def matrix(self, name: str, e: int) -> Tensor:
        """One matrix of expert `e`, (out, in), in float32 at least: name is `gate`, `up` or
        `down`."""
        first, second, fourth, last = (self._wide(getattr(self, f"{name}_{k}")[e]) for k in OWN)
        middle = self._wide(getattr(self, f"{name}_central"))
        with torch.autocast(middle.device.type, enabled=False):
            return compose([first, second, middle, fourth, last])

    # ----------------------------------------------------------------------------------- training

    def at_step(self, step: int, seed: int) -> None:
        """The gradient mask: with probability `mask`, the central cores stay as they are in this
        step, in all layers and processes, and again where the run is resumed."""
        self.masked = random.Random(f"{seed} {step}").random() < self.mask

    def before_update(self) -> None:
        """Without a gradient an optimizer leaves a parameter alone; a gradient of zeros would let
        momentum and weight decay move it."""
        if self.masked:
            for name in self.matrices:
                getattr(self, f"{name}_central").grad = None
        self.masked = False

    # --------------------------------------------------------------------------------------- cost

    def active(self, slots: float) -> int:
        held = dict(self.named_parameters())
        shared = sum(p.numel() for name, p in held.items() if name in self.one_for_all)
        own = sum(p.numel() for p in held.values()) - shared
        return shared + int(own * slots / self.num_experts)

    def biases(self, slots: float) -> int:
        shared = sum(p.numel() for n, p in self.named_parameters() if n.endswith("_bias"))
        own = sum(p.numel() for n, p in self.named_parameters() if n.startswith("activation."))
        return shared + int(own * slots / self.num_experts)

    def repeated(self, slots: float) -> int:
        """A token meets whole matrices in each slot. Making them is no token's: a batch does it."""
        hidden, width = self.matrices[self.first[0]]
        matrix = torch.Size((*hidden, *width)).numel()
        met = self.active(slots) - self.biases(slots)
        return int(slots * len(self.matrices) * matrix) - met

    # -------------------------------------------------------------------------- as full networks

    @torch.no_grad()
    def materialized(self, donor: FFN) -> FFNExperts:
        bank = FFNExperts(FFNSpec(num_experts=self.num_experts), donor, device="meta")
        bank.activation = self.activation
        for name in dict(bank.named_parameters(recurse=False)):
            stacked = [self._network(e)[name] for e in range(self.num_experts)]
            setattr(bank, name, nn.Parameter(torch.stack(stacked)))
        return bank.train(self.training)

    def why_no_fold(self, edit: Edit, site: Site, single: bool) -> str | None:
        return None if single else SUM_OF_NETWORKS

    @torch.no_grad()
    def fold(self, weights_E: Tensor) -> Network:
        e = int(weights_E.argmax())
        first, first_bias, down, down_bias = self._network(e).values()
        activation = own_tensors(self.activation, e)
        return Network(first, first_bias, down, down_bias, activation=activation)

    def _network(self, e: int) -> dict[str, Tensor | None]:
        """Expert `e` by the names of full experts."""
        first = "gate_up" if len(self.first) > 1 else "up"
        biases = [getattr(self, f"{name}_bias") for name in self.first]
        return {
            first: torch.cat([self.matrix(name, e) for name in self.first]),
            f"{first}_bias": None if biases[0] is None else torch.cat(biases),
            "down": self.matrix(DOWN, e),
            "down_bias": self.down_bias,
        }


def _ends(outer: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """The outer cores of matrices, two and two joined, stacked by matrix and expert: i and j change
    places from one to another, and their product stays."""
    stacked = [torch.stack(list(cores)) for cores in outer]
    with torch.autocast(stacked[0].device.type, enabled=False):
        return left_end(*stacked[:2]), right_end(*stacked[2:])


def _factors(spec: MPOSpec, donor: FFN) -> tuple[Factors, Factors]:
    """Those of the hidden width, and of the width.

    Raises:
        RecipeError: there are none, or those that are given do not multiply to the dimensions.
    """
    sizes = donor.hidden_width, donor.width
    if spec.hidden_factors is None:
        found = factors(max(sizes), min(sizes))
        return found if sizes[0] >= sizes[1] else found[::-1]
    given = spec.hidden_factors, spec.width_factors
    products = tuple(torch.Size(five).numel() for five in given)
    if products != sizes:
        raise RecipeError(
            f"hidden_factors {given[0]} and width_factors {given[1]} multiply to {products}, and "
            f"{donor.path!r} has a hidden width of {sizes[0]} and a width of {sizes[1]}."
        )
    return given


def _dense(donor: FFN, first: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The donor's matrices and biases by their names."""
    weights = donor.first_weight().chunk(len(first))
    bias = donor.first_bias()
    biases = [None] * len(first) if bias is None else bias.chunk(len(first))
    found = {name: (w, b) for name, w, b in zip(first, weights, biases, strict=True)}
    return found | {DOWN: (donor.down_weight(), donor.down_bias())}


def _placed(bias: Tensor, device: torch.device | str | None) -> Tensor:
    bias = bias.detach()
    return bias.to("meta" if bias.is_meta else device, copy=True)
