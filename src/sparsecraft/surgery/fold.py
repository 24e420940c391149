"""What a layer becomes once its routing is constant: new dense weights.

With constant weights w_E a mixture of updates is one update and a mixture of vectors is one vector,
and both commute with the Linear they stand on:

    LoRA      W + s sum_e w_e B_e A_e        (Hu et al. 2022, section 4.1)
    vectors   diag(l) W or W diag(l), with l = sum_e w_e L_e        (Liu et al. 2022)

Of whole networks one takes the dense one's place; the parts of a split network are its neurons, and
with all of them on they go back where they were. Which of these it is, the experts say themselves
(`Experts.fold`); where it goes, their place and their site say.

Shapes: E experts, I input features, O output features, D width, F hidden width of the network.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsecraft.dense.activations import tensors_of
from sparsecraft.dense.donors import FFN, Activation
from sparsecraft.dense.forms import join
from sparsecraft.errors import MergeError
from sparsecraft.moe.experts.base import Experts
from sparsecraft.moe.experts.folded import Network, Scale, Update
from sparsecraft.moe.names import pattern_of
from sparsecraft.surgery.plan import PlannedEdit
from sparsecraft.surgery.rectify import activation_of

Rows = tuple[int, int] | None


@dataclass(slots=True)
class Ledger:
    """What a merge writes into the dense model. A failure is undone by `rollback`.

    Attributes:
        old: parameter, or an activation's buffer -> its value before the first write.
        asked: parameters of which something was to change, before it was rounded.
        shared: parameters that several modules of the model have in common.
        wide: a type in which `exact` is remembered; None for not at all.
        exact: what was written -> its value before it was rounded.
    """

    old: dict[Tensor, Tensor] = field(default_factory=dict)
    asked: set[Tensor] = field(default_factory=set)
    shared: dict[nn.Parameter, list[str]] = field(default_factory=dict)
    wide: torch.dtype | None = None
    exact: dict[Tensor, Tensor] = field(default_factory=dict)

    def guard(self, model: nn.Module) -> None:
        """Refuse to write what more than one module of the dense `model` reads."""
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        self.shared = {p: own for p, own in names.items() if len(own) > 1}

    def write(self, parameter: Tensor, value: Tensor) -> None:
        if parameter in self.shared:
            raise MergeError(
                f"{' and '.join(self.shared[parameter])} are one tensor, and a merge would change "
                "all of them; untie them first."
            )
        self.old.setdefault(parameter, parameter.data)
        if self.wide not in (None, parameter.dtype):
            self.exact[parameter] = value.to(self.wide)
        if not torch.equal(value.to(torch.float64), parameter.data.to(torch.float64)):
            self.asked.add(parameter)
        # Memory of its own: a part of a bank would keep the whole bank, and share it.
        data = torch.empty_like(value, dtype=parameter.dtype, memory_format=torch.contiguous_format)
        parameter.data = data.copy_(value)

    def value(self, parameter: Tensor) -> Tensor:
        """What stands in a parameter, or would if its type did not round it."""
        return self.exact.get(parameter, parameter.detach())

    def arrived(self, model: nn.Module) -> dict[str, Any]:
        """Of the changes that were asked for, how many are in the weights, and which are not: of
        them nothing is left once they are rounded to the weights' type.

        Raises:
            MergeError: none of them is.
        """
        tensors = (*model.named_parameters(), *model.named_buffers())
        names = {tensor: name for name, tensor in tensors}
        lost = sorted(names[p] for p in self.asked if torch.equal(self.old[p], p.data))
        if lost and len(lost) == len(self.asked):
            dtype = str(next(iter(self.asked)).dtype).removeprefix("torch.")
            raise MergeError(
                f"Nothing of the experts arrives in {', '.join(lost[:2])} ({len(lost)} tensors in "
                f"all): what they add is smaller than {dtype} can hold beside the weights. Load "
                "the model in float32 to merge it."
            )
        unused = dict(Counter(map(pattern_of, lost)))
        return {"tensors": len(self.asked), "used": len(self.asked) - len(lost), "unused": unused}


def why_no_fold(item: PlannedEdit, bank: Experts, single: bool) -> str | None:
    """Why the layer of `item` is no change of dense weights under constant routing, if it is not.

    Args:
        bank: the layer's experts.
        single: the routing gives one expert weight one, or the bank is averaged to one.
    """
    if reason := bank.why_no_fold(item.edit, item.site, single):
        return reason
    if not item.donor.reference.is_floating_point():
        return (
            "its dense weights are quantized and cannot take the update; load the checkpoint with "
            "override={'backbone': None}"
        )
    return None


def written(item: PlannedEdit, bank: Experts) -> list[str]:
    """Paths of the dense modules that folding the experts of `item` changes."""
    if bank.folds is Scale:
        return [path for path, _, _ in _scaled(item)]
    if isinstance(item.donor, FFN):
        form = item.site.form
        return [join(item.site.owner, part) for part in (form.gate, form.up, form.down) if part]
    return [item.site.path]


def scales_the_next(item: PlannedEdit, bank: Experts) -> bool:
    """Whether folding goes into the columns of the module behind, whatever else is added to it."""
    return bank.folds is Scale and _before_down(item)


def _before_down(item: PlannedEdit) -> bool:
    """Whether what the layer gives is what the down projection of a network reads."""
    return not item.edit.changes_input and (
        isinstance(item.donor, Activation) or item.site.activated
    )


def fold(
    model: nn.Module, item: PlannedEdit, bank: Experts, weights_E: Tensor, ledger: Ledger
) -> None:
    """Write what the layer of `item` does into the weights of the dense `model`.

    Args:
        bank: the layer's experts, or the one that they average to.
        weights_E: of the constant routing, float64.
    """
    site = item.site
    match bank.fold(weights_E):
        case Update(deltas):
            for part, delta_OI in deltas.items():
                path = join(site.owner, getattr(site.form, part)) if part else site.path
                rows = None if part else site.rows
                _change(ledger, model, path, rows, lambda w_OI, delta_OI=delta_OI: w_OI + delta_OI)
        case Scale(l_O):
            for path, rows, columns in _scaled(item):
                if columns:
                    _change(ledger, model, path, None, lambda w_OI: w_OI * l_O)
                else:
                    _change(ledger, model, path, rows, lambda w_OI: w_OI * l_O[:, None])
                    _change_bias(ledger, model, path, rows, l_O)
        case Network() as network:
            _replace_network(model, item, network, ledger)


def _scaled(item: PlannedEdit) -> list[tuple[str, Rows, bool]]:
    """(path, rows, whether columns) of the Linears that the vector of `item` scales."""
    site, form = item.site, item.site.form
    network = isinstance(item.donor, FFN)
    if item.edit.changes_input:
        parts = [form.gate, form.up] if network else []
        paths = [join(site.owner, part) for part in parts if part] or [site.path]
        return [(path, None, True) for path in paths]
    if _before_down(item) or network:
        return [(join(site.owner, form.down), None, not network)]
    return [(site.path, site.rows, False)]


def _change(ledger: Ledger, model: nn.Module, path: str, rows: Rows, change) -> None:
    """Apply `change` to a Linear's weight, (O, I) in float64, or to some of its rows."""
    module = model.get_submodule(path)
    transposed = isinstance(module, Conv1D)
    weight = ledger.value(module.weight)
    w_OI = (weight.t() if transposed else weight).to(torch.float64, copy=True)
    start, length = rows or (0, len(w_OI))
    part = slice(start, start + length)
    w_OI[part] = change(w_OI[part])
    ledger.write(module.weight, w_OI.t() if transposed else w_OI)


def _change_bias(ledger: Ledger, model: nn.Module, path: str, rows: Rows, l_O: Tensor) -> None:
    bias = model.get_submodule(path).bias
    if bias is None:
        return
    b_O = ledger.value(bias).to(torch.float64, copy=True)
    start, length = rows or (0, len(b_O))
    b_O[start : start + length] *= l_O
    ledger.write(bias, b_O)


def _replace_network(model: nn.Module, item: PlannedEdit, network: Network, ledger: Ledger) -> None:
    """Let a network be the dense one, with the activation that it has now."""
    _write_network(model, item.donor, network, ledger)
    if network.rectified:
        owner, _, name = activation_of(item).rpartition(".")
        setattr(model.get_submodule(owner), name, nn.ReLU())


def _write_network(model: nn.Module, donor: FFN, network: Network, ledger: Ledger) -> None:
    first = [donor.gate, donor.up] if donor.gate else [donor.up]
    for linears, weight, bias in (
        (first, network.first, network.first_bias),
        ([donor.down], network.down, network.down_bias),
    ):
        modules = [model.get_submodule(linear.path) for linear in linears]
        for module, w_OI in zip(modules, weight.chunk(len(modules)), strict=True):
            ledger.write(module.weight, w_OI.t() if isinstance(module, Conv1D) else w_OI)
        if bias is not None:
            for module, b_O in zip(modules, bias.chunk(len(modules)), strict=True):
                ledger.write(module.bias, b_O)
    if network.activation:
        held = tensors_of(model.get_submodule(donor.activation_path))
        for name, value in network.activation.items():
            ledger.write(held[name], value)
