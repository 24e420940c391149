"""One recipe on one family of the zoo: does it give the dense model, or say why not?

Nothing here asks the certificate: outputs are compared in float32 with those of the dense model,
and the experts of each layer are moved to see whether the output follows.
"""

from __future__ import annotations

import functools
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

import sparsecraft as sc
from sparsecraft.surgery.left_out import grouped
from tests.cases.members import member_inputs, member_model, member_outputs

# Largest difference to the dense outputs, as a share of their largest, that is rounding.
ROUNDING = 1e-4

ZOO_RECIPES: dict[str, Callable[[], sc.Recipe]] = {
    "camelidae": lambda: sc.recipes.camelidae(4, 2, adapter_dim=8, lora_rank=4),
    "molora": lambda: sc.recipes.molora(num_experts=3, rank=2),
    "mov": lambda: sc.recipes.mov(num_experts=3),
    "upcycling": lambda: sc.recipes.upcycling(num_experts=2, top_k=2),
    "gmoefication": lambda: sc.recipes.gmoefication(num_experts=4),
    "btx": lambda: sc.recipes.btx(num_experts=2),
    # Its one chosen network is scaled by the router's weight; with 1 instead, it is the dense one.
    "bam": lambda: sc.override(
        sc.recipes.bam(num_experts=2), {"edits.1.router.select.renormalize": True}
    ),
}

# What the dense model computes and never reads, such as LLaVA's last vision layer.
UNREAD = "layers whose outputs the model itself does not read"

Verdict = Literal["exact", "part", "refused", "WRONG"]


@dataclass(frozen=True)
class Cell:
    """What was found.

    Attributes:
        reason: why it was refused, or all that is wrong.
        left_out: reason -> what the recipe does not reach.
    """

    verdict: Verdict
    reason: str = ""
    left_out: dict[str, list[str]] = field(default_factory=dict)


@functools.cache
def dense_outputs(family: str) -> Tensor:
    return member_outputs(member_model(family), member_inputs(family))


def examine(family: str, recipe: str) -> Cell:
    """Convert, compare, move, save, load and revert one family."""
    model, inputs, dense = member_model(family), member_inputs(family), dense_outputs(family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = sc.convert(model, ZOO_RECIPES[recipe]())
    except sc.SparsecraftError as error:
        if _is_dense(model, state, inputs, dense):
            return Cell("refused", str(error))
        return Cell("WRONG", f"refused, and the model is another: {error}")
    except Exception as error:  # no other error may reach a user
        return Cell("WRONG", f"{type(error).__name__}: {error}")
    faults, unread = [], {}
    if not (report.certificate and report.certificate.exact):
        faults.append(f"certificate: {report.certificate}")
    difference = (member_outputs(model, inputs) - dense).abs().max().item()
    if not difference <= ROUNDING * dense.abs().max().item():
        faults.append(f"outputs differ by {difference:.1e}")
    dead = _dead_layers(model, inputs)
    try:
        faults += _lost_by_saving(model, inputs)
        sc.revert(model)
    except Exception as error:
        faults.append(f"{type(error).__name__}: {error}")
    else:
        if not _is_dense(model, state, inputs, dense):
            faults.append("reverted, it is another model")
        own = [path for path in dead if not _moves(model, model.get_submodule(path), inputs)]
        unread = {UNREAD: grouped(own)} if own else {}
        dead = [path for path in dead if path not in own]
    if dead:
        faults.append(f"no output follows the experts at {', '.join(grouped(dead))}")
    if faults:
        return Cell("WRONG", "; ".join(faults))
    left_out = report.left_out | unread
    return Cell("part" if left_out else "exact", left_out=left_out)


def _is_dense(
    model: nn.Module, state: dict[str, Tensor], inputs: dict[str, Tensor], dense: Tensor
) -> bool:
    found = model.state_dict()
    same = found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)
    return same and torch.equal(member_outputs(model, inputs), dense)


def _dead_layers(model: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    """Dense paths of the layers whose experts can be anything; all experts are left moved."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, sc.MoELayer)]
    return [
        name.replace(".base.", ".").removesuffix(".base")
        for name, layer in layers
        if not _moves(model, layer.experts, inputs)
    ]


def _moves(model: nn.Module, part: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the outputs follow the parameters of a part, which are left a little moved."""
    before, generator = member_outputs(model, inputs), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    after = member_outputs(model, inputs)
    return bool(after.isfinite().all() and (after - before).abs().max() > 0)


def _lost_by_saving(model: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    before = member_outputs(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        sc.save(model, f"{folder}/saved")
        again = sc.load(f"{folder}/saved")
        difference = (member_outputs(again, inputs) - before).abs().max().item()
    return [] if difference == 0 else [f"loaded again, outputs differ by {difference:.1e}"]


def in_general(text: str, model: str) -> str:
    """A reason without numbers of layers and the name of the model's class, so that like ones are
    one."""
    return re.sub(r"(?<=\.)\d+(?=[.'\s,])", "*", text.replace(model, "The model"))
