"""Whether a dense attention can be an expert: its own code, run with the heads of several.

Attention experts run in one pass of the model's own attention, as if it had N times as many heads
(`sparsecraft.moe.experts.attention`). That holds only where a head knows nothing of the others: not
with a norm over all of them, or with heads in pairs. It is tried, on twins, with positions and a
causal mask, before anything is changed.

Shapes: B sequences, S positions, D width, N = 2 experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsecraft.dense.attentions import eager_twin, some_tokens, ways
from sparsecraft.dense.donors import Attention
from sparsecraft.dense.twins import HERE, problem
from sparsecraft.errors import DonorError
from sparsecraft.moe.experts.attention import AttentionExperts
from sparsecraft.moe.routing import Routing
from sparsecraft.recipe.experts import AttentionSpec

TOLERANCE = 1e-5


def prove(donor: Attention, spec: AttentionSpec) -> None:
    """Raise unless two attentions as experts are the sum of their outputs times their weights.

    Raises:
        DonorError: the attention at this place cannot be an expert.
    """
    error, reason = _error(donor, spec)
    if not error <= TOLERANCE:
        raise DonorError(
            f"The attention at {donor.path!r} ({type(donor.module).__name__}) cannot be an expert: "
            f"with the heads of two it is not the sum of both ({reason}). Use a recipe that leaves "
            "attention as it is, such as btx, or one at its Linears (molora, lora)."
        )


def _error(donor: Attention, spec: AttentionSpec) -> tuple[float, str]:
    """(relative error, what went wrong)."""
    modules = [eager_twin(donor.module, seed) for seed in (0, 1)]
    if spec.kv == "shared":
        for name in (donor.form.key, donor.form.value):
            modules[1].set_submodule(name, modules[0].get_submodule(name))
    donors = [replace(donor, module=module) for module in modules]
    x = some_tokens(modules[0], donor.in_features)
    weights = torch.rand(x.shape[1], 2, generator=torch.Generator().manual_seed(3), **HERE) + 0.1
    reason = "it does not run on its own"
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for arguments in ways(modules[0], x):
            try:
                _mixed(donors, weights, x, arguments)
            except Exception:
                continue
            try:
                return _compared(donors, spec, weights, x, arguments)
            except Exception as error:  # of the same code with more heads
                reason = problem(error)
            break
    return float("inf"), reason


def _compared(
    donors: list[Attention],
    spec: AttentionSpec,
    weights: Tensor,
    x: Tensor,
    arguments: dict[str, Any],
) -> tuple[float, str]:
    """Without a mask and with a causal one, where the attention takes one."""
    bank = AttentionExperts(replace(spec, num_experts=2), donors[0])
    bank.put(1, donors[1])
    indices = torch.arange(2, device=x.device).expand(x.shape[1], 2)
    routing = Routing(weights, indices, weights.log())
    passes = [arguments]
    if "attention_mask" in arguments:
        S = x.shape[1]
        hidden = x.new_full((S, S), torch.finfo(x.dtype).min).triu(1)
        passes.append(arguments | {"attention_mask": hidden[None, None]})
    error = 0.0
    for called_with in passes:
        wanted = _mixed(donors, weights, x, called_with)
        found = _output(bank(x, routing, **called_with))
        error = max(error, ((found - wanted).norm() / wanted.norm()).item())
    return error, f"a relative error of {error:.1e} on random tokens"


def _mixed(
    donors: list[Attention], weights: Tensor, x: Tensor, arguments: dict[str, Any]
) -> Tensor:
    """sum_j w_j attention_j(x)"""
    outputs = [_output(donor.module.forward(x, **arguments)) for donor in donors]
    return sum(weights[:, j, None] * y for j, y in enumerate(outputs))


def _output(returned: Tensor | tuple) -> Tensor:
    return returned[0] if isinstance(returned, tuple) else returned
