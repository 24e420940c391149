"""Regressions of many small modules on captured inputs, all layers of one form in one product.

Alone each module is too small to keep a device busy; stacked, one step fits all of them, and since
every layer has its own loss and Adam looks at each weight alone, none disturbs another.

Shapes: L layers of one form, T tokens, B tokens of a step, D width, E experts, R = E less the
shared experts, O output features, F neurons of an imitation.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsecraft.errors import DataError, SparsecraftError
from sparsecraft.moe.layer import MoELayer
from sparsecraft.recipe.stages import Fit
from sparsecraft.training.watch import checked_losses

# Tokens of a held-out step.
CHUNK_TOKENS = 4096

Report = dict[str, dict[str, Any]]
# (weights, inputs, wanted, how far the run is from 0 to 1, or None: held out) -> loss of one layer
Loss = Callable[[dict[str, Tensor], Tensor, Tensor, float | None], Tensor]


def first_held(tokens: int, spec: Fit) -> int:
    """Where the held-out tokens begin."""
    held = max(1, round(tokens * spec.holdout))
    if tokens - held < 1:
        raise DataError(
            f"{tokens} tokens are too few to fit anything and hold some out; give more data, or "
            "more --fit-tokens."
        )
    return tokens - held


def fit_routers(
    layers: dict[str, MoELayer],
    inputs: dict[str, Tensor],
    wanted: dict[str, Tensor],
    spec: Fit,
) -> Report:
    """Fit the scorers to their targets, (T, E) for each layer; see `GateSpec.target`."""
    scorers = {name: layer.router.scorer for name, layer in layers.items()}
    for name, scorer in scorers.items():
        if not any(True for _ in scorer.parameters()):
            raise SparsecraftError(
                f"The {layers[name].router.spec.scorer.kind} scorer of {name!r} has no weights to "
                "fit; set loss='none' in its stage."
            )
    measure = F.binary_cross_entropy_with_logits if spec.loss == "bce" else F.mse_loss
    report: Report = {}
    for names in _alike(scorers):
        form = copy.deepcopy(scorers[names[0]]).to("meta").train()

        def loss(weights, x_BD, y_BR, progress, form=form):
            return measure(torch.func.functional_call(form, weights, (x_BD,)), y_BR)

        aims = [
            _scaled(
                inputs[n], wanted[n][:, layers[n].router.spec.shared :], spec, degree_of(layers[n])
            )
            for n in names
        ]
        modules = [scorers[name] for name in names]
        found = _descend(names, modules, loss, [inputs[n] for n in names], aims, spec)
        report |= dict(zip(names, found, strict=True))
    return report


def fit_imitations(layers: dict[str, MoELayer], inputs: dict[str, Tensor], spec: Fit) -> Report:
    """Fit each layer's network to what its base makes of the same inputs (D2DMoE, section 3.4)."""
    report: Report = {}
    banks = {name: layer.experts for name, layer in layers.items()}

    def loss(weights, x_BD, y_BO, progress):
        first_BF = F.linear(x_BD, weights["first"].flatten(0, 1), weights["first_bias"].flatten())
        hidden_BF = first_BF.relu()
        down_FO = weights["down"].flatten(0, 1)
        if progress is None:
            return F.mse_loss(hidden_BF @ down_FO + weights["down_bias"], y_BO)
        y = F.dropout(hidden_BF, spec.dropout) @ down_FO + weights["down_bias"]
        square = hidden_BF.sum(-1).square() / (hidden_BF.square().sum(-1) + 1e-15)
        return F.mse_loss(y, y_BO) + spec.sparsity * progress * square.mean()

    for names in _alike(banks):
        aims = [_outputs(layers[name].base, inputs[name]) for name in names]
        modules = [banks[name] for name in names]
        dtype = modules[0].down.dtype
        found = _descend(names, modules, loss, [inputs[n] for n in names], aims, spec)
        for bank in modules:  # routers stay float32, networks are of the model
            bank.to(dtype)
        report |= dict(zip(names, found, strict=True))
    return report


@torch.no_grad()
def _outputs(base: nn.Module, x_TD: Tensor) -> Tensor:
    device = next(base.parameters()).device
    chunks = [base(x_CD.to(device)).to(x_TD.device) for x_CD in x_TD.split(CHUNK_TOKENS)]
    return torch.cat(chunks)


def _alike(modules: dict[str, nn.Module]) -> list[list[str]]:
    """Names of modules of the same form on the same device."""
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name, module in modules.items():
        shapes = tuple((key, tuple(p.shape)) for key, p in module.named_parameters())
        groups[type(module), shapes, next(module.parameters()).device].append(name)
    return list(groups.values())


def _descend(
    layers: list[str],
    modules: list[nn.Module],
    loss: Loss,
    inputs: list[Tensor],
    aims: list[Tensor],
    spec: Fit,
) -> list[dict[str, float]]:
    """Adam on all modules at once; each keeps the epoch that was best on the held-out tokens.

    Raises:
        TrainingError: the loss of one of the layers is not finite; its modules are as they were.
    """
    device = next(modules[0].parameters()).device
    names = [name for name, _ in modules[0].named_parameters()]
    weights = {
        name: torch.stack([m.get_parameter(name).detach().float() for m in modules])
        .to(device)
        .requires_grad_()
        for name in names
    }
    tokens = min(map(len, inputs))
    held = first_held(tokens, spec)
    optimizer = torch.optim.Adam(weights.values(), lr=spec.learning_rate)
    loss_of = torch.vmap(loss, in_dims=(0, 0, 0, None), randomness="different")

    def rows(tensors: list[Tensor], index: Tensor) -> Tensor:
        return torch.stack([t[index.to(t.device)].to(device) for t in tensors]).float()

    @torch.no_grad()
    def held_out() -> Tensor:
        parts = torch.arange(held, tokens).split(CHUNK_TOKENS)
        losses = [loss_of(weights, rows(inputs, p), rows(aims, p), None) for p in parts]
        sizes = torch.tensor([len(p) for p in parts], device=device)
        found_L = (torch.stack(losses) * sizes[:, None]).sum(0) / sizes.sum()
        return checked_losses(spec.name, layers, found_L)

    steps = spec.epochs * -(-held // spec.batch_tokens)
    step, start_L = 0, held_out()
    best_L = start_L if spec.sparsity == 0 else torch.full_like(start_L, torch.inf)
    best = {name: value.detach().clone() for name, value in weights.items()}
    with torch.autocast(device.type, enabled=False):
        for _ in range(spec.epochs):
            for index in torch.randperm(held).split(spec.batch_tokens):
                optimizer.zero_grad()
                x, y = rows(inputs, index), rows(aims, index)
                loss_of(weights, x, y, step / steps).sum().backward()
                optimizer.step()
                step += 1
            found_L = held_out()
            # A sparsity loss rises with time: the last epoch counts then.
            better_L = found_L < best_L if spec.sparsity == 0 else torch.ones_like(best_L).bool()
            best_L = torch.where(better_L, found_L, best_L)
            for name, value in weights.items():
                best[name][better_L] = value.detach()[better_L]
    for number, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            parameter.data = best[name][number].to(parameter.device).clone()
    pairs = zip(start_L.tolist(), best_L.tolist(), strict=True)
    return [{"loss_before": before, "loss": after} for before, after in pairs]


def degree_of(layer: MoELayer) -> int:
    """n of target(s x) = s^n target(x), s > 0, where the activation is ReLU and there is no bias:
    a gate is a second factor of x, and a squared target has twice as many."""
    factors = layer.experts.parts
    return 2 * factors if layer.router.spec.target == "squared_deviation" else factors


def _scaled(x_TD: Tensor, y_TE: Tensor, spec: Fit, degree: int = 1) -> Tensor:
    """Targets in a range that a regression likes; ranks within a token stay as they are.

    `bce`: divided by the token's length to the power `degree`, as a router sees directions only
    (for ReLU without biases that equals MoEfication's targets, which are of the direction), and by
    their maximum, here of the layer, there of a batch. `mse`: divided by their mean over the layer,
    because the rules are relative; D2DMoE regresses on the norms as they are.
    """
    if spec.loss == "bce":
        lengths_T1 = x_TD.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
        y_TE = y_TE / lengths_T1**degree
        return y_TE / y_TE.max().clamp_min(1e-12)
    return y_TE / y_TE.mean().clamp_min(1e-12)
