"""The certificate of a converted model: every layer beside the dense module that it stands for.

The model runs on a probe. Wherever a hidden state arrives at a converted layer, the dense module,
which the conversion's record keeps untouched, and the layer both compute from it, in float32
whatever the model's type is: rounding hides nothing, and the depth of a model adds nothing up.
Where a difference is as small as float32 can make it and no smaller, float64 decides.

What no hidden state of the probe reaches is counted and named: layers are called with random hidden
states; experts that no token has chosen, each with all tokens.

A model that does not fit into memory is `sparsecraft.evaluation.streamed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsecraft.dense.twins import HERE
from sparsecraft.errors import SparsecraftError
from sparsecraft.evaluation.certificate import TOLERANCE, Certificate, compare
from sparsecraft.evaluation.distance import Distance, distance, first_tensor, mean_distance, power
from sparsecraft.moe.layer import MoELayer
from sparsecraft.moe.lending import Lender, widened
from sparsecraft.moe.outputs import evaluation_mode, inputs_of, output_of, undisturbed
from sparsecraft.moe.routing import Routing
from sparsecraft.surgery.record import conversion_of

# A difference this small may be rounding, and is measured again in float64.
MAYBE_ROUNDING = 1e-2
# Of outputs in float32: coarser than of a layer, for what many layers make of rounding.
OUTPUTS_EQUAL = 1e-3
# Largest mean difference, relative to the output, of a layer in the model's own type.
NARROW = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
ALONE = (2, 16)  # random hidden states for a layer that no probe reached
FEW_TOKENS = 16  # for an expert that no token has chosen


@dataclass(slots=True)
class Measured:
    """What was found of one layer.

    Attributes:
        worst: the largest distance of all calls.
        power: the least sensitive of them.
        calls: how often it ran on the probes.
        experts: those to choose from; `chosen`, those that a token went to; `forced`, how many of
            the others were run all the same.
        lifted: whether it was computed in a wider type than the model's.
        alone: whether it was compared on random hidden states.
        narrow: how far the layer is in the model's own type, `narrow_type`, where that is narrower.
    """

    path: str
    worst: Distance | None = None
    power: float | None = None
    calls: int = 0
    experts: int = 0
    chosen: set[int] = field(default_factory=set)
    forced: int = 0
    lifted: bool = False
    alone: bool = False
    narrow: float = 0.0
    narrow_type: torch.dtype | None = None

    def add(self, found: Distance) -> None:
        if self.worst is None or found.rank > self.worst.rank:
            self.worst = found

    def note_power(self, found: float | None) -> None:
        if found is not None:
            self.power = max(found, self.power or 0.0)


def certify(
    model: nn.Module,
    batches: Sequence[dict[str, Any]],
    before: Sequence[Tensor],
    *,
    claims: bool = True,
) -> Certificate:
    """Compare a converted model with the dense one.

    Args:
        before: what the dense model gave for the batches.
        claims: whether the layers should be equal, every expert by itself.
    """
    comparison = Comparison(model, Lender(), claims)
    after = comparison.run(batches)
    comparison.run_alone()
    found = comparison.certificate(len(batches))
    if not batches:
        return found
    logits = compare(list(before), after)
    differs, wide = found.differs, before[0].dtype in (torch.float32, torch.float64)
    tolerance = OUTPUTS_EQUAL if logits.dtype == "float32" else TOLERANCE[torch.float64]
    if claims and wide and not logits.max_difference <= tolerance * max(1.0, logits.scale):
        differs += (f"the model's outputs differ by {logits.max_difference:.1e}",)
    return replace(
        found,
        logit_difference=logits.max_difference,
        logit_scale=logits.scale,
        differs=differs,
    )


class Comparison:
    """Listens to a converted model while it runs."""

    def __init__(self, model: nn.Module, lender: Lender, claims: bool):
        self.model, self.lender, self.record = model, lender, conversion_of(model)
        self.layers = dict(zip(self.record.layers, self.record.plan, strict=True))
        self.found = {layer: Measured(item.site.path) for layer, item in self.layers.items()}
        self.claims = claims
        self.within: str | None = None  # what runs: a dense module, or a layer, as a whole

    def run(self, batches: Sequence[dict[str, Any]]) -> list[Tensor]:
        """The model's outputs on each batch, all layers compared on the way."""
        wrapped = []
        with self._undisturbed():
            try:
                for module in self.model.modules():
                    wrap = self._wrapper(module)
                    if wrap is not None:
                        wrapped.append((module, vars(module).get("forward")))
                        module.forward = wrap
                inputs = (inputs_of(self.model, batch) for batch in batches)
                return [output_of(self.model(**batch)).cpu() for batch in inputs]
            finally:
                for module, forward in wrapped:
                    vars(module).pop("forward")
                    if forward is not None:
                        module.forward = forward

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Evaluation, of the dense modules too that stand in the record alone."""
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self.model))
            for module in self.record.dense.values():
                stack.enter_context(evaluation_mode(module))
            yield

    def _wrapper(self, module: nn.Module) -> Callable | None:
        if module in self.layers:
            return self._compared(module, module.forward)
        if self.lender.waits(module):
            return self._with_weights(module, module.forward)
        return None

    def _with_weights(self, module: nn.Module, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.lender.lent(module, below=False):
                return forward(*args, **kwargs)

        return run

    def _compared(self, layer: MoELayer, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.within == "layer":  # inside another layer, which is compared as a whole
                return forward(*args, **kwargs)
            self.found[layer].calls += 1
            wanted, given = self._compare(layer, forward, args, kwargs)
            # What is inside a dense module that another layer stands for has to be dense as well.
            return wanted if self.within == "dense" else given

        return run

    def _compare(
        self, layer: MoELayer, forward: Callable, args: tuple, kwargs: dict
    ) -> tuple[Any, Any]:
        """What the dense module gives, and what the layer gives in the model's own type."""
        measured, base = self.found[layer], self._dense(layer)
        dtype = self.lender.wide_type(base, layer)
        measured.lifted = dtype not in (None, self.model.dtype)

        def both(dtype: torch.dtype | None) -> tuple[Any, Any]:
            wanted = self._call("dense", base, base, dtype, args, kwargs)
            return wanted, self._call("layer", layer, forward, dtype, args, kwargs)

        with self._noted(layer):
            wanted, found = both(dtype)
        worst = distance(found, wanted)
        if dtype == torch.float32 and not worst.equal and worst.relative < MAYBE_ROUNDING:
            worst = replace(_in_double(both) or worst, dtype=dtype)
        measured.add(worst)
        if measured.calls < 2:  # what a later batch shows besides is no more than a repetition
            measured.note_power(power(found, wanted))
            if self.claims:
                self._force(layer, forward, dtype, args, kwargs, wanted)
        x = first_tensor((*args, *kwargs.values()))
        if dtype is None or self._is_all(layer, x, dtype):
            return wanted, found
        if self.lender.sources:  # one more reading of the files
            return _as(wanted, x.dtype), _as(found, x.dtype)
        given = self._call("layer", layer, forward, None, args, kwargs)
        measured.narrow = max(measured.narrow, mean_distance(given, wanted))
        measured.narrow_type = x.dtype
        return _as(wanted, x.dtype), given

    def _dense(self, layer: MoELayer) -> nn.Module:
        """The dense module that a layer stands for."""
        item = self.layers[layer]
        if not item.edit.replaces:
            return layer.base
        modules = [self.record.dense[path] for path in item.site.members]
        return modules[0] if len(modules) == 1 else nn.Sequential(*modules)

    def _call(
        self,
        within: str,
        module: nn.Module,
        forward: Callable,
        dtype: torch.dtype | None,
        args: tuple,
        kwargs: dict,
    ) -> Any:
        before, self.within = self.within, within
        try:
            with self.lender.lent(module, dtype):
                return forward(*widened(args, dtype), **widened(kwargs, dtype))
        finally:
            self.within = before

    def _is_all(self, layer: MoELayer, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether a layer computes in this type as it is."""
        return {x.dtype, *(p.dtype for p in layer.parameters())} == {dtype}

    # ------------------------------------------------------------------------------------- experts

    @contextmanager
    def _noted(self, layer: MoELayer) -> Iterator[None]:
        """Note which experts tokens go to."""
        measured = self.found[layer]

        def note(routing: Routing) -> Routing:
            measured.experts = routing.num_experts
            reached = routing.indices_TK.where(routing.weights_TK != 0, routing.num_experts)
            measured.chosen |= set(reached.unique().tolist()) - {routing.num_experts}
            return routing

        with _changed_routing(layer, note):
            yield

    def _force(
        self,
        layer: MoELayer,
        forward: Callable,
        dtype: torch.dtype | None,
        args: tuple,
        kwargs: dict,
        wanted: Any,
    ) -> None:
        """Run each expert that no token has chosen as if all tokens had."""
        measured, item = self.found[layer], self.layers[layer]
        experts = item.edit.experts
        if layer.router is None or experts.parts or experts.shards or layer.mixes_slots:
            return  # one of them alone is not the dense function
        idle = sorted(set(range(measured.experts)) - measured.chosen)
        if len(args) == 1 and not kwargs and layer.batches is None:  # tokens know of no other
            few = (slice(None),) * (args[0].ndim - 2) + (slice(FEW_TOKENS),)
            args, wanted = (args[0][few].contiguous(),), first_tensor(wanted)[few]
        for e in idle:
            with _changed_routing(layer, lambda routing, e=e: _all_at(routing, e)):
                found = self._call("layer", layer, forward, dtype, args, kwargs)
            measured.add(distance(found, wanted))
            measured.forced += 1

    # ------------------------------------------------------------------------ what no probe reached

    def run_alone(self) -> None:
        """Compare the layers that have not run, on random hidden states."""
        generator = torch.Generator().manual_seed(0)
        with self._undisturbed():
            for layer, item in self.layers.items():
                if self.found[layer].calls:
                    continue
                donor = item.donor.reference
                x = torch.randn(*ALONE, item.donor.in_features, generator=generator, **HERE)
                x = x.to("cpu" if donor.is_meta else donor.device, self.model.dtype)
                if not self._runs_alone(layer, x):
                    continue
                with suppress(SparsecraftError):  # a layer that reads masks or sentences refuses
                    self._compare(layer, layer.forward, (x,), {})
                self.found[layer].alone = self.found[layer].worst is not None

    def _runs_alone(self, layer: MoELayer, x: Tensor) -> bool:
        """Whether the dense module needs hidden states and nothing else."""
        base = self._dense(layer)
        with suppress(Exception):  # families fail in their own ways
            self._call("dense", base, base, self.lender.wide_type(base, layer), (x,), {})
            return True
        return False

    # ------------------------------------------------------------------------------------- results

    def certificate(self, probes: int) -> Certificate:
        """Of the layer that differs most, relative to what counts as equal."""
        ran = [m for m in self.found.values() if m.calls]
        others = [m for m in self.found.values() if not m.calls]
        alone = [m for m in others if m.alone]
        measured = ran or alone
        worst = max(measured, key=lambda m: m.worst.rank, default=None)
        at = worst.worst if worst else Distance(0.0, 0.0, torch.float32)
        return Certificate(
            max_difference=at.difference,
            scale=at.scale,
            tolerance=at.tolerance * at.scale,
            dtype=str(at.dtype).removeprefix("torch."),
            probes=probes,
            layers=len(self.layers),
            ran=len(ran),
            unreached=tuple(m.path for m in others),
            alone=sum(m.worst.equal for m in alone),
            experts=sum(m.experts for m in ran),
            chosen=sum(len(m.chosen) for m in ran),
            forced=sum(m.forced for m in ran),
            power=max((m.power for m in measured if m.power is not None), default=None),
            worst=worst and worst.path,
            lifted=sum(m.lifted for m in ran),
            claimed=self.claims,
            differs=tuple(self._differences(ran, alone)),
        )

    def _differences(self, ran: list[Measured], alone: list[Measured]) -> Iterator[str]:
        """In words, what of the layers that are equal in float32 is not."""
        for m in ran:
            if self.claims and m.narrow_type and not m.narrow <= NARROW[m.narrow_type]:
                own = f"in {str(m.narrow_type).removeprefix('torch.')}, the model's own type,"
                yield f"{own} {m.path} is off by {m.narrow:.1e}"
        for m in alone:
            if not m.worst.equal:
                yield f"{m.path}, on random hidden states, differs by {m.worst.difference:.1e}"


@contextmanager
def _changed_routing(layer: MoELayer, change: Callable[[Routing], Routing]) -> Iterator[None]:
    """Let `change` see every decision of a layer's router, and make another of it."""
    route = layer.route

    def changed(*args: Any, **kwargs: Any) -> Routing | None:
        routing = route(*args, **kwargs)
        return None if routing is None else change(routing)

    layer.route = changed
    try:
        yield
    finally:
        del layer.route


def _all_at(routing: Routing, e: int) -> Routing:
    """Every token at expert `e`, with weight one."""
    ones_T1 = torch.ones_like(routing.weights_TK[:, :1])
    indices_T1 = torch.full_like(ones_T1, e, dtype=torch.long)
    return replace(
        routing,
        weights_TK=ones_T1,
        indices_TK=indices_T1,
        sums_to_one=True,
        in_order=False,
        every=False,
    )


def _in_double(both: Callable) -> Distance | None:
    """The distance in float64; None where a device has none."""
    try:
        wanted, found = both(torch.float64)
    except (TypeError, RuntimeError):
        return None
    return distance(found, wanted)


def _as(output: Any, dtype: torch.dtype) -> Any:
    """A module's output in the type that the model goes on with."""
    return widened(output, dtype)
