"""Did it train? Which of the tensors that a stage should move it has moved, and why not the others.

Only digests are kept of what stood there before. A tensor of stacked experts counts once for each
expert, as `NAME[e]`: a whole bank moves where one of its experts does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.dense.digests import digest
from sparsecraft.dense.sharing import whole
from sparsecraft.errors import TrainingError
from sparsecraft.evaluation.history import moved_lines
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.names import pattern_of
from sparsecraft.moe.routing import Routing

log = logging.getLogger("sparsecraft")

# Names of tensors that did not move which are listed one by one; more are counted by pattern.
LISTED = 20

# Above it a second moment has seen a gradient: Adafactor adds 1e-30 to every square.
SEEN = 1e-29

# Of an expert in a bank: (name of the stacked tensor, number), or (name of a tensor, None).
Unit = tuple[str, int | None]


class Before:
    """What the tensors of a model are before a stage.

    Args:
        should: names of the parameters that the stage trains.
        free: names of those that it may change without training them: what is put in another
            order.
    """

    def __init__(self, model: nn.Module, should: Iterable[str], free: Iterable[str] = ()):
        self.should, self.free = set(should), set(free)
        self.digests = _digests(model)

    def changed(self, model: nn.Module) -> dict[Unit, bool]:
        """Of every unit that should move, whether it is another now.

        Raises:
            TrainingError: something else has changed.
        """
        now = _digests(model)
        moved = {unit for unit, value in now.items() if self.digests.get(unit) != value}
        known = self.should | self.free
        if wrong := sorted({name for name, _ in moved} - known):
            raise TrainingError(
                f"{len(wrong)} tensors changed that the stage does not train, {wrong[0]!r} among "
                "them; nothing was saved. Look for what writes to them beside the optimizer (a "
                "callback, a hook), or name them in the stage's `trains`."
            )
        return {unit: unit in moved for unit in now if unit[0] in self.should}


@dataclass(slots=True)
class Evidence:
    """What a stage's steps have shown of every parameter, collected while it runs.

    Attributes:
        highest: of every group of the optimizer, the largest learning rate of a step.
        rates: parameter's name -> that of its group; none of one that no optimizer has.
        reached: path of a layer -> which of its experts any token went to, (E,) bool.
        squares: name -> the mean square of its gradients, as the optimizer keeps it; None where
            it has met none.
        knows: whether the optimizer's state could be read.
        otherwise: why a tensor did not move that nothing else kept from it.
    """

    highest: list[float] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    reached: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor | None] = field(default_factory=dict)
    knows: bool = False
    otherwise: str = "its steps were lost in rounding"

    def note_rates(self, optimizer: Any) -> None:
        """Remember this step's learning rates, if it is a step of one."""
        if optimizer is None:
            return
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.highest = [max(pair) for pair in zip(rates, self.highest or rates, strict=True)]

    def note_optimizer(self, model: nn.Module, optimizer: Any) -> None:
        """Take what the optimizer knows of gradients, at the end of a stage."""
        self.knows = True
        names = {parameter: name for name, parameter in model.named_parameters()}
        for group, rate in zip(optimizer.param_groups, self.highest, strict=False):
            self.rates |= {names[p]: rate for p in group["params"] if p in names}
        for parameter, name in names.items():
            state = optimizer.state.get(parameter, {})
            kinds = ("exp_avg_sq", "exp_avg_sq_row")
            self.squares[name] = next((state[kind] for kind in kinds if kind in state), None)

    def why_not(self, unit: Unit, parameter: nn.Parameter, changed: bool) -> str | None:
        """Why a tensor was not trained; None if it was."""
        name, e = unit
        square = self.squares.get(name)
        if e is not None and square is not None:
            square = square[e]
        has_gradient = square is not None and bool(whole(square).max() > SEEN)
        if changed and (has_gradient or not self.knows):
            return None
        beside = ", and weight decay alone changed it" if changed else ""
        layer = self.reached.get(name.rpartition(".experts.")[0]) if e is not None else None
        if not parameter.requires_grad:
            return f"it was frozen by something else than the stage (requires_grad=False){beside}"
        if self.rates and name not in self.rates:
            return f"no optimizer has it{beside}"
        if layer is not None and not layer[e]:
            return f"no token reached it{beside}"
        if self.rates.get(name) == 0:
            return f"its learning rate is zero in every step{beside}"
        if self.knows and square is None:
            return f"it got no gradient{beside}"
        if self.knows and not has_gradient:
            return f"its gradient is zero{beside}"
        return self.otherwise


def found(before: Before, model: nn.Module, evidence: Evidence) -> dict[str, Any]:
    """What report.json says: `should` and `moved` are numbers of tensors, `unmoved` is name ->
    reason, and where these are many pattern -> reason and number.

    Raises:
        TrainingError: something has changed that the stage does not train.
    """
    parameters = dict(model.named_parameters())
    reasons = {}
    for unit, changed in before.changed(model).items():
        if reason := evidence.why_not(unit, parameters[unit[0]], changed):
            reasons[_written(unit)] = reason
    should = sum(unit[0] in before.should for unit in before.digests)
    return {"should": should, "moved": should - len(reasons), "unmoved": _short(reasons)}


def say(stage: str, moved: dict[str, Any]) -> None:
    """Log what a stage has moved; a warning where something did not move."""
    first, *others = moved_lines(moved)
    level = logging.WARNING if others else logging.INFO
    log.log(level, f"Stage {stage!r}: {first}{' The report says why.' if others else ''}")


@contextmanager
def watched_routers(model: nn.Module, evidence: Evidence) -> Iterator[None]:
    """Note in the block which experts of every layer any token goes to."""

    def hook(path: str, E: int):
        def note(router: nn.Module, args: Any, routing: Any) -> None:
            if not isinstance(routing, Routing):
                return
            indices = routing.indices_TK.flatten()
            if path not in evidence.reached:
                evidence.reached[path] = indices.new_zeros(E + 1, dtype=torch.bool)
            # Nothing waits for the device; the last place takes "no expert".
            evidence.reached[path].index_fill_(0, indices, True)

        return note

    layers = [(p, m) for p, m in model.named_modules() if isinstance(m, MoELayer) and m.router]
    handles = [
        layer.router.register_forward_hook(hook(path, layer.experts.num_experts))
        for path, layer in layers
        if not layer.runs_whole
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _digests(model: nn.Module) -> dict[Unit, str]:
    stacked = {
        f"{path}.experts.{name}"
        for path, layer in model.named_modules()
        if isinstance(layer, MoELayer)
        for name, parameter in layer.experts.named_parameters()
        if name not in layer.experts.one_for_all
        and parameter.shape[:1] == (layer.experts.num_experts,)
    }
    digests: dict[Unit, str] = {}
    for name, parameter in model.named_parameters():
        tensor = whole(parameter.detach()).cpu()
        if name in stacked:
            digests |= {(name, e): digest(part) for e, part in enumerate(tensor)}
        else:
            digests[name, None] = digest(tensor)
    return digests


def _written(unit: Unit) -> str:
    name, e = unit
    return name if e is None else f"{name}[{e}]"


def _short(reasons: dict[str, str]) -> dict[str, str]:
    """The reasons by name, or by pattern where the names are many."""
    if len(reasons) <= LISTED:
        return reasons
    if len(kinds := set(reasons.values())) == 1:
        return {"*": f"{kinds.pop()} ({len(reasons)} of them)"}
    counts: dict[tuple[str, str], int] = {}
    for name, reason in reasons.items():
        key = pattern_of(name), reason
        counts[key] = counts.get(key, 0) + 1
    short: dict[str, str] = {}
    for (pattern, reason), count in counts.items():
        text = f"{reason} ({count} of them)"
        short[pattern] = f"{short[pattern]}; {text}" if pattern in short else text
    return short
