"""What every bank of experts answers; which way it runs is chosen in `dispatch`.

Shapes: T tokens, K slots per token, E experts, I input features, O output features,
M first-layer features, H hidden features after the activation (M = 2H when gated).
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from sparsecraft.dense.donors import Donor
from sparsecraft.dense.sites import Site
from sparsecraft.errors import SparsecraftError
from sparsecraft.kernels.two_layer import TwoLayer
from sparsecraft.moe.experts.dispatch import PATHS, WAYS, choose_path
from sparsecraft.moe.experts.folded import Network, Scale, Update
from sparsecraft.moe.experts.own_activation import OwnActivation
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.edits import Edit, Place
from sparsecraft.recipe.experts import ExpertsSpec


class Rate:
    """The rate of a dropout that a bank applies by itself, held in an `nn.Dropout`: what turns
    dropout off in a model, as TRL's trainers do, looks for those."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"{name}_rate"

    def __get__(self, bank: nn.Module, owner: type) -> float:
        return bank._modules[self.name].p

    def __set__(self, bank: nn.Module, rate: float) -> None:
        bank.add_module(self.name, nn.Dropout(rate))


class Experts(nn.Module, ABC):
    """E experts in stacked tensors. A kind writes `build` and `expert`; dispatch is inherited.

    All that other code may ask of experts stands here, so that it need not ask for their kind.

    Attributes:
        num_experts: E.
        out_features: O.
        dispatch: `auto`, `loop`, `grouped`, `dense` or `merged`; see
            `sparsecraft.moe.experts.dispatch`.
        residual: every expert is x plus something; see its `loop`.
        merges: the bank can mix its experts' parameters before they meet a token, which is then
            always the cheapest way; see `sparsecraft.moe.experts.dispatch.merged`.
        dense_tokens: up to this many tokens, `auto` computes all experts at once; small banks
            set it, because fewer launches are worth more there than fewer multiplications.
        whole: the bank takes whole sequences and all that the dense module is called with.
        imitates: of place `imitate`: the bank has been fitted, and runs instead of the base.
        of_dense: its parameters are the dense module's own, in another order, and no new ones.
        rectified: its activation is ReLU, and the dense module's another.
        folds: what `fold` gives, where it gives anything.
        one_for_all: names of tensors that are not stacked, because all experts share them.
        adds_all_biases: a token meets all biases, however few experts it goes to.
    """

    num_experts: int
    out_features: int
    dispatch: str = "auto"
    residual: bool = False
    merges: bool = False
    dense_tokens: int = 0
    whole: bool = False
    imitates: bool = False
    of_dense: bool = False
    rectified: bool = False
    folds: ClassVar[type[Update] | type[Scale] | type[Network] | None] = None
    one_for_all: ClassVar[tuple[str, ...]] = ()
    adds_all_biases: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def build(
        cls,
        spec: ExpertsSpec,
        donor: Donor,
        site: Site,
        place: Place,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        """The bank that `spec` describes, for the place where `donor` stands.

        Args:
            device: `meta` for a bank whose values a checkpoint brings.
            dtype: of new tensors.
        """

    # -------------------------------------------------------------------------------- computation

    @property
    def runs_merged(self) -> bool:
        """Whether `dispatch` mixes the parameters first, in a bank that can."""
        return self.merges and self.dispatch in ("auto", "merged")

    @abstractmethod
    def expert(self, e: int, x: Tensor) -> Tensor:
        """Expert `e` on tokens x (n, I) -> (n, O)."""

    def all_experts(self) -> list[Callable[[Tensor], Tensor]]:
        """`expert` of each e. A bank may make for all at once what they are computed with."""
        return [functools.partial(self.expert, e) for e in range(self.num_experts)]

    def two_layer(self, dtype: torch.dtype) -> TwoLayer | None:
        """The bank's tensors in `dtype` for the fast paths; None if it has no such form."""
        return None

    def forward(self, *args, way: Callable | None = None, **kwargs) -> Tensor | tuple:
        """`mixed`, or another function of the bank, with these arguments.

        Its tensors are read nowhere but in here, so that hooks of a bank hold whatever is computed:
        those of offloading and sharding give it its memory. Only the ways of
        `sparsecraft.moe.fusions` read them elsewhere, and they leave a bank with hooks alone.
        """
        return self.mixed(*args, **kwargs) if way is None else way(self, *args, **kwargs)

    def mixed(self, x_TI: Tensor, routing: Routing | None = None) -> Tensor:
        """Mix the experts' outputs, y_TO = sum_k w_k expert_k(x).

        Args:
            routing: None for a single expert that needs no router.
        """
        if routing is None:
            return self.expert(0, x_TI)
        return WAYS[choose_path(self, x_TI, routing)](self, x_TI, routing)

    def merged(self, x_TI: Tensor, routing: Routing) -> Tensor:
        """The mixture, of parameters that are mixed before they meet a token.

        Raises:
            SparsecraftError: the experts are not linear in their parameters.
        """
        raise SparsecraftError(
            f"{type(self).__name__} are not linear and cannot be merged before they meet a token; "
            "use dispatch 'auto'."
        )

    def each(self, x_TI: Tensor, **kwargs) -> Tensor:
        """Every expert on every token, (T, E, O).

        Args:
            kwargs: what else `expert` takes, such as the dense module that experts work inside.
        """
        return torch.stack([self.expert(e, x_TI, **kwargs) for e in range(self.num_experts)], dim=1)

    def recorded(self, x_TI: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """`mixed`, and the routing with what losses read of the bank itself."""
        return self.mixed(x_TI, routing), routing

    # ----------------------------------------------------------------------------------- training

    def at_step(self, step: int, seed: int) -> None:
        """Note how many steps of training there were, before each pass of one.

        Args:
            seed: of the training, one in all processes.
        """

    def before_update(self) -> None:
        """Take gradients away from what this step leaves as it is, before the optimizer's step."""

    # --------------------------------------------------------------------------------------- cost

    def active(self, slots: float) -> int:
        """Parameters that a token meets which goes to `slots` of the E experts, their mean number
        where it differs by token."""
        return self._met(sum(p.numel() for p in self.parameters()), slots)

    def biases(self, slots: float) -> int:
        """Those of them that no matrix product reads: biases, and those of an activation."""
        held = self.named_parameters()
        apart = [p for n, p in held if n.endswith("bias") or n.startswith("activation.")]
        total = sum(p.numel() for p in apart)
        return total if self.adds_all_biases else self._met(total, slots)

    def _met(self, total: int, slots: float) -> int:
        idle = 0 if self.merges else total * (self.num_experts - slots) // self.num_experts
        return total - int(idle)

    def repeated(self, slots: float) -> int:
        """Multiplications for a token beyond one for each of these parameters."""
        return 0

    # -------------------------------------------------------------------- where experts come from

    def take(self, donors: Iterable[Donor], count: int) -> None:
        """Let the experts be the networks of `count` donors, expert e that of donor e N // E of N.

        Raises:
            SparsecraftError: the experts are no whole networks.
        """
        raise SparsecraftError(
            f"{type(self).__name__} are no networks that other models could give."
        )

    def copied(self, donor: Donor) -> Mapping[str, Tensor | None] | None:
        """The bank's name of each tensor of one expert that is a plain copy of the donor; None
        where experts are none."""
        return None

    def diversify(self) -> None:
        """Draw at random what the spec says experts shall differ by, from torch's global state."""

    def shared_parts(self) -> dict[str, nn.Parameter]:
        """Parameters of whole networks that all experts share, by their name in the donor."""
        return {}

    def misfit(self, donor: Donor) -> str | None:
        """Why a network like the donor cannot be appended; None if it can."""
        return None

    def append(self, donor: Donor) -> None:
        """One more expert, the last: the donor's module.

        Raises:
            SparsecraftError: the experts are no whole networks.
        """
        raise SparsecraftError(
            f"{type(self).__name__} are no networks; no dense model is one of them."
        )

    def remove(self, e: int) -> None:
        """Take expert `e` away.

        Raises:
            SparsecraftError: the experts are no whole networks.
        """
        raise SparsecraftError(f"{type(self).__name__} are no networks of which one could leave.")

    def materialized(self, donor: Donor) -> Experts | None:
        """A bank of full networks that computes the same, of those that
        `ExpertsSpec.materializes`; None of others."""
        return None

    # ------------------------------------------------------------------------ fewer experts of them

    def only(self, e: int) -> Self:
        """A bank of expert `e` alone, with tensors of its own."""
        return self._remade(lambda stacked: stacked[e % len(stacked)].clone()[None])

    def averaged(self) -> Self:
        """A bank whose only expert is the mean of these, in float64 (AdaMix, Wang et al. 2022)."""
        return self._remade(lambda stacked: stacked.double().mean(0, keepdim=True))

    def joined(self, weights_E: Tensor) -> dict[str, Tensor]:
        """The tensors of the one expert that these with constant weights are; see
        `ExpertsSpec.joins`.

        Raises:
            SparsecraftError: they are no single expert.
        """
        raise SparsecraftError(f"{type(self).__name__} with constant weights are no single expert.")

    def why_no_fold(self, edit: Edit, site: Site, single: bool) -> str | None:
        """Why the experts with constant weights are no change of dense weights; None if they are.

        Args:
            single: one expert has weight one and the others none.
        """
        return "nothing is known of what its experts with constant weights are as dense weights"

    def fold(self, weights_E: Tensor) -> Update | Scale | Network | None:
        """What the experts with constant weights (E,), float64, make of the dense weights."""
        return None

    def _remade(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A bank of one expert whose stacked tensors are these, changed."""
        bank = copy.copy(self)
        for store in ("_parameters", "_buffers"):
            tensors = getattr(self, store).items()
            setattr(bank, store, {name: self._changed(name, t, change) for name, t in tensors})
        bank._modules = {
            name: module._remade(change) if isinstance(module, Experts | OwnActivation) else module
            for name, module in self._modules.items()
        }
        bank.num_experts = 1
        return bank

    def _changed(
        self, name: str, tensor: Tensor | None, change: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        if tensor is None:
            return None
        value = tensor.detach().clone() if name in self.one_for_all else change(tensor.detach())
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(value, tensor.requires_grad) if is_parameter else value


class CopiedExperts(Experts):
    """A bank of copies of the dense module, each with memory of its own."""

    @abstractmethod
    def put(self, e: int, donor: Donor) -> None:
        """Let expert `e` be the module of `donor`."""

    def take(self, donors: Iterable[Donor], count: int) -> None:
        each = self.num_experts // count
        for number, donor in enumerate(donors):
            for e in range(number * each, (number + 1) * each):
                self.put(e, donor)


def set_dispatch(model: nn.Module, path: str) -> None:
    """Make every bank of experts in `model` run by one path, such as loop, or auto. By the loop, no
    layer goes a way of `sparsecraft.moe.fusions` either."""
    if path not in ("auto", "gather", *PATHS):
        raise SparsecraftError(
            f"Unknown dispatch {path!r}; known: auto, {', '.join((*PATHS, 'gather'))}."
        )
    for module in model.modules():
        if isinstance(module, Experts):
            module.dispatch = path
