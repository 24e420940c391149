"""What a layer becomes once its routing is constant: new dense weights, or one dense adapter.

With constant weights w_E a mixture of updates is one update and a mixture of vectors is one vector,
and both commute with the Linear they stand on:

    LoRA      W + s sum_e w_e B_e A_e        (Hu et al. 2022, section 4.1)
    vectors   diag(l) W or W diag(l), with l = sum_e w_e L_e        (Liu et al. 2022)
    adapters  x + s sum_e w_e U_e act(D_e x) = x + s [w_1 U_1 ... w_E U_E] act([D_1; ...; D_E] x)

The parts of a split network are its neurons: with all of them on they go back where they were.

Shapes: E experts, I input features, O output features, R rank, D width, H adapter width, F hidden
width of the network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsecraft.dense.donors import FFN, Linear
from sparsecraft.dense.forms import join
from sparsecraft.errors import MergeError
from sparsecraft.moe.experts.base import Experts
from sparsecraft.moe.experts.split import SplitExperts
from sparsecraft.recipe.experts import AdapterSpec, AttentionSpec, FFNLoRASpec, FFNSpec, LoRASpec
from sparsecraft.surgery.build import reference_tensor
from sparsecraft.surgery.plan import PlannedEdit
from sparsecraft.surgery.rectify import activation_of, is_rectified

Rows = tuple[int, int] | None


@dataclass(slots=True)
class Ledger:
    """What a merge has changed of the dense model, and what stood there.

    Attributes:
        old: parameter -> its value before the first write.
        shared: parameters that several modules of the model have in common.
        settings: (owner, attribute, value before) of modules and configurations, in order.
    """

    old: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    shared: dict[nn.Parameter, list[str]] = field(default_factory=dict)
    settings: list[tuple[Any, str, Any]] = field(default_factory=list)

    def guard(self, model: nn.Module) -> None:
        """Refuse to write what more than one module of the dense `model` reads."""
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        self.shared = {p: own for p, own in names.items() if len(own) > 1}

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        if parameter in self.shared:
            raise MergeError(
                f"{' and '.join(self.shared[parameter])} are one tensor, and a merge would change "
                "all of them; untie them first."
            )
        self.old.setdefault(parameter, parameter.data)
        # Memory of its own: a part of a bank would keep the whole bank, and share it.
        data = torch.empty_like(value, dtype=parameter.dtype, memory_format=torch.contiguous_format)
        parameter.data = data.copy_(value)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Change an attribute of a module, or of a configuration."""
        self.settings.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        for parameter, value in self.old.items():
            parameter.data = value
        for owner, name, value in reversed(self.settings):
            setattr(owner, name, value)


def has_dense_form(item: PlannedEdit, single: bool) -> str | None:
    """Why the layer of `item` is no change of dense weights under constant routing, if it is not.

    Args:
        single: the routing gives one expert weight one, or the bank is averaged to one.
    """
    spec, place, at = item.edit.experts, item.edit.place, item.site.kind
    if isinstance(spec, AdapterSpec):
        return "an adapter has an activation inside, and no dense Linear computes that"
    if isinstance(spec, LoRASpec) and (not isinstance(item.donor, Linear) or item.site.chain):
        return "a LoRA beside a network with an activation has no Linear to be added to"
    if isinstance(spec, AttentionSpec):
        return "a sum of several attentions is none with as many heads"
    if isinstance(spec, (FFNSpec, FFNLoRASpec)) and not single:
        return (
            "a sum of several feed-forward networks is none of the same width; use how='average', "
            "or fixed weights that name one expert"
        )
    if isinstance(spec, FFNSpec) and spec.granularity > 1:
        return "its experts are shards of networks, and no one of them has the dense one's width"
    if isinstance(spec, FFNSpec) and place != "replace":
        return f"feed-forward experts {place} the dense network cannot take its place"
    if place == "before" and at == "activation":
        return "a vector before the activation does not commute with it"
    if not reference_tensor(item.donor).is_floating_point():
        return (
            "its dense weights are quantized and cannot take the update; load the checkpoint with "
            "override={'base_quantization': None}"
        )
    return None


def written(item: PlannedEdit) -> list[str]:
    """Paths of the dense modules that folding the layer of `item` changes."""
    site, form = item.site, item.site.form
    match item.edit.experts.kind:
        case "split" if item.edit.place == "imitate":
            return []
        case "ffn" | "ffn_lora" | "split":
            return [join(site.owner, part) for part in (form.gate, form.up, form.down) if part]
        case "vector":
            return [path for path, _, _ in _scaled(item)]
    return [site.path]


def scales_the_next(item: PlannedEdit) -> bool:
    """Whether folding goes into the columns of the module behind, whatever else is added to it."""
    at = item.site.kind == "activation" or (item.site.chain and item.site.kind == "intermediate")
    return item.edit.experts.kind == "vector" and item.edit.place == "after" and bool(at)


def averaged(bank: Experts) -> dict[str, Tensor]:
    """The bank's parameters with the mean of its experts as the only one (AdaMix, Wang 2022)."""
    return {name: p.detach().double().mean(0, keepdim=True) for name, p in parameters(bank).items()}


def parameters(bank: Experts) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in bank.named_parameters()}


def fold(
    model: nn.Module,
    item: PlannedEdit,
    bank: Experts,
    tensors: dict[str, Tensor],
    weights_E: Tensor,
    ledger: Ledger,
) -> None:
    """Write what the layer of `item` does into the weights of the dense `model`.

    Args:
        bank: the layer's experts, for their settings.
        tensors: their parameters, or the averaged ones; E may be smaller than the bank's then.
        weights_E: of the constant routing, float64.
    """
    site = item.site
    match item.edit.experts.kind:
        case "lora":
            delta_OI = _update(tensors, "", bank.scale, weights_E)
            _change(ledger, model, site.path, site.rows, lambda w_OI: w_OI + delta_OI)
        case "vector":
            l_O = torch.einsum("e,eo->o", weights_E, tensors["vectors"].double())
            for path, rows, columns in _scaled(item):
                if columns:
                    _change(ledger, model, path, None, lambda w_OI: w_OI * l_O)
                else:
                    _change(ledger, model, path, rows, lambda w_OI: w_OI * l_O[:, None])
                    _change_bias(ledger, model, path, rows, l_O)
        case "ffn_lora":
            e = int(weights_E.argmax())
            for part in ("gate", "up", "down"):
                own = getattr(bank, part, None)
                if own is not None:
                    delta_OI = _update(tensors, f"{part}.", own.scale, weights_E[e, None], e)
                    path = join(site.owner, getattr(site.form, part))
                    _change(ledger, model, path, None, lambda w_OI, d=delta_OI: w_OI + d)
        case "ffn":
            _replace_network(model, item, tensors, int(weights_E.argmax()), ledger)
        case "split" if item.edit.place == "replace":
            _join_parts(model, item, bank, ledger)


def one_adapter(tensors: dict[str, Tensor], weights_E: Tensor) -> dict[str, Tensor]:
    """E adapters of width H with constant weights -> the parameters of one of width E*H."""
    down_EHD, up_EDH = tensors["down"], tensors["up"]
    up_EDH = up_EDH.double() * weights_E[:, None, None]
    return {"down": down_EHD.flatten(0, 1)[None], "up": up_EDH.permute(1, 0, 2).flatten(1)[None]}


def _update(
    tensors: dict[str, Tensor], prefix: str, scale: float, weights_E: Tensor, first: int = 0
) -> Tensor:
    """scale * sum_e w_e B_e A_e for the experts from `first` on, (O, I), float64."""
    a_ERI, b_EOR = tensors[f"{prefix}lora_A"], tensors[f"{prefix}lora_B"]
    total = 0
    for e, weight in enumerate(weights_E.tolist(), first):
        total = total + scale * weight * (b_EOR[e].double() @ a_ERI[e % len(a_ERI)].double())
    return total


def _scaled(item: PlannedEdit) -> list[tuple[str, Rows, bool]]:
    """(path, rows, whether columns) of the Linears that the vector of `item` scales."""
    site, form = item.site, item.site.form
    if item.edit.place == "before":
        parts = [form.gate, form.up] if site.kind == "ffn" else []
        paths = [join(site.owner, part) for part in parts if part] or [site.path]
        return [(path, None, True) for path in paths]
    if scales_the_next(item):
        return [(join(site.owner, form.down), None, True)]
    if site.kind == "ffn":
        return [(join(site.owner, form.down), None, False)]
    return [(site.path, site.rows, False)]


def _change(ledger: Ledger, model: nn.Module, path: str, rows: Rows, change) -> None:
    """Apply `change` to a Linear's weight, (O, I) in float64, or to some of its rows."""
    module = model.get_submodule(path)
    transposed = isinstance(module, Conv1D)
    weight = module.weight.detach()
    w_OI = (weight.t() if transposed else weight).to(torch.float64, copy=True)
    start, length = rows or (0, len(w_OI))
    part = slice(start, start + length)
    w_OI[part] = change(w_OI[part])
    ledger.write(module.weight, w_OI.t() if transposed else w_OI)


def _change_bias(ledger: Ledger, model: nn.Module, path: str, rows: Rows, l_O: Tensor) -> None:
    bias = model.get_submodule(path).bias
    if bias is None:
        return
    b_O = bias.detach().to(torch.float64, copy=True)
    start, length = rows or (0, len(b_O))
    b_O[start : start + length] *= l_O
    ledger.write(bias, b_O)


def _replace_network(
    model: nn.Module, item: PlannedEdit, tensors: dict[str, Tensor], e: int, ledger: Ledger
) -> None:
    """Let expert `e`, a whole feed-forward network, be the dense one."""
    first = "gate_up" if item.donor.gated else "up"
    own = {
        ours: tensors[name][e] if name in tensors else None
        for ours, name in (
            ("first", first), ("first_bias", f"{first}_bias"), ("down", "down"),
            ("down_bias", "down_bias"),
        )
    }  # fmt: skip
    _write_network(model, item.donor, own, ledger)


def _join_parts(model: nn.Module, item: PlannedEdit, bank: SplitExperts, ledger: Ledger) -> None:
    """Put the neurons of a split network back in their order, with the activation they have now."""
    _write_network(model, item.donor, bank.dense(), ledger)
    if is_rectified(item, bank):
        owner, _, name = activation_of(item).rpartition(".")
        ledger.set(model.get_submodule(owner), name, nn.ReLU())


def _write_network(
    model: nn.Module, donor: FFN, tensors: dict[str, Tensor | None], ledger: Ledger
) -> None:
    """Write a network's `first` (G F, D) and `down` (D, F), and their biases."""
    first = [donor.gate, donor.up] if donor.gate else [donor.up]
    for name, linears in (("first", first), ("down", [donor.down])):
        modules = [model.get_submodule(linear.path) for linear in linears]
        for module, w_OI in zip(modules, tensors[name].chunk(len(modules)), strict=True):
            ledger.write(module.weight, w_OI.t() if isinstance(module, Conv1D) else w_OI)
        bias = tensors[f"{name}_bias"]
        if bias is not None:
            for module, b_O in zip(modules, bias.chunk(len(modules)), strict=True):
                ledger.write(module.bias, b_O)
