"""Whether a module computes a donor's formula: both run on random tokens and must agree.

The module's own code runs on twins (`sparsecraft.dense.twins`) in float32: on tokens that are
small, and on such as reach any clamp; in evaluation, and in training with the same random numbers,
so that every dropout, of a module or of a function, must fall on the same values at the same rate.

A network that shares its module with other things is proven by what will be done to it: with the
formula in the first part's place and Identity in the others', the module must compute the same.
What else the module has, such as attention, is stood for by a stub.

Shapes: D width, F hidden width.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsecraft.dense.donors import FFN, view_ffn
from sparsecraft.dense.forms import FFNForm, features, join
from sparsecraft.dense.twins import HERE, Sizes, Stub, problem, twin

# Largest relative error of a formula that is the module's own, in float32.
TOLERANCE = 1e-5
# Tokens that are small, usual, large, and beyond any clamp.
SCALES = (2.0**-6, 1.0, 2.0**6, 2.0**20)

Run = Callable[[bool, Tensor], Tensor]
"""What a module gives, by whether it trains and the tokens that it reads."""


@dataclass(frozen=True, slots=True)
class Proof:
    """Attributes:
    form: the form that was compared, with the dropouts that were found.
    error: of the formula, relative to the larger of both outputs.
    why: what is wrong; None where the module computes the formula.
    """

    form: FFNForm
    error: float
    why: str | None


def prove(owner: nn.Module, form: FFNForm, whole: bool) -> Proof:
    """Compare a module with the formula that `form`, as yet without dropouts, reads from it.

    Args:
        whole: the module is to be the network and nothing else; otherwise its parts are a span.
    """
    return (_Whole if whole else _Span)(owner, form).result()


def is_attention(path: str, module: nn.Module) -> bool:
    words = f"{path} {type(module).__name__}".lower()
    return "attention" in words or "attn" in words


def outside_attention(owner: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules below, by their paths."""
    for name, child in owner.named_children():
        path = join(prefix, name)
        if not is_attention(name, child):
            yield path, child
            yield from outside_attention(child, path)


class _Formula(nn.Module):
    def __init__(self, ffn: FFN):
        super().__init__()
        self.ffn, self.calls = ffn, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.ffn.compute(x, self.training)


class _Whole:
    """The comparison of an owner that is the network and nothing else."""

    def __init__(self, owner: nn.Module, form: FFNForm):
        self.owner, self.form = owner, form
        self.hidden, self.width = features(owner.get_submodule(form.down))

    def result(self) -> Proof:
        reason = ""
        # A size that the code has somewhere else lets it fail on a small twin only.
        for sizes in (_small(self.width, self.hidden), {}):
            try:
                return self._result(sizes)
            except Exception as error:  # of whatever code the module has
                reason = f"its code does not run on tokens alone ({problem(error)})"
        return Proof(self.form, float("inf"), reason)

    def _result(self, sizes: Sizes) -> Proof:
        tokens = _tokens(sizes.get(self.width, self.width))
        dense = self.dense(sizes)
        error = _difference(dense, self.ours(sizes, self.form), tokens, training=False)
        if error > TOLERANCE:
            return Proof(self.form, error, f"a relative error of {error:.1e} on random tokens")
        nearest = float("inf")
        for form in self.with_dropouts():
            error = _difference(dense, self.ours(sizes, form), tokens[1:2], training=True)
            if error <= TOLERANCE:
                return Proof(form, error, None)
            nearest = min(nearest, error)
        return Proof(self.form, nearest, "in training it drops what experts would not drop")

    def dense(self, sizes: Sizes) -> Run:
        module = twin(self.owner, sizes)
        return lambda training, x: module.train(training).forward(x)

    def ours(self, sizes: Sizes, form: FFNForm) -> Run:
        ffn = view_ffn(twin(self.owner, sizes), form)
        return lambda training, x: ffn.compute(x, training)

    def with_dropouts(self) -> Iterator[FFNForm]:
        rates = sorted({0.0, *(rate for _, rate in _rates(self.owner))})
        for hidden, output in itertools.product(rates, rates):
            yield replace(self.form, hidden_dropout=hidden, output_dropout=output)


class _Span(_Whole):
    """The comparison of an owner whose parts are one after the other, among other things."""

    def __init__(self, owner: nn.Module, form: FFNForm):
        super().__init__(owner, form)
        self.stubs = _strangers(owner, form)

    def dense(self, sizes: Sizes) -> Run:
        self.convention = self._convention(sizes)
        return self._runner(twin(self.owner, sizes, self.stubs), *self.convention)

    def ours(self, sizes: Sizes, form: FFNForm) -> Run:
        module = twin(self.owner, sizes, self.stubs)
        first, *others = span(form).values()
        formula = _Formula(view_ffn(module, form))
        for name in others:
            module.set_submodule(name, nn.Identity())
        module.set_submodule(first, formula)
        if form.silenced:
            setattr(module, form.silenced, 0.0)
        run = self._runner(module, *self.convention)

        def seen(training: bool, x: Tensor) -> Tensor:
            formula.calls = 0
            y = run(training, x)
            if not formula.calls:
                raise RuntimeError("it does not call its own parts")
            return y

        return seen

    def with_dropouts(self) -> Iterator[FFNForm]:
        yield self.form
        for name, rate in _rates(self.owner):
            if name:
                yield replace(self.form, hidden_dropout=rate, silenced=name)

    def _convention(self, sizes: Sizes) -> tuple[str, bool]:
        """How the owner is called: what the parts that are not the network's return, and whether
        what else it asks for is a tensor such as its input, or None."""
        x = _tokens(sizes.get(self.width, self.width))[1]
        failure = None
        for returns, tensors in itertools.product(("pair", "tensor", "triple"), (True, False)):
            try:
                self._runner(twin(self.owner, sizes, self.stubs), returns, tensors)(False, x)
            except Exception as error:  # of whatever code the module has
                failure = error
            else:
                return returns, tensors
        raise failure

    @staticmethod
    def _runner(module: nn.Module, returns: str, tensors: bool) -> Run:
        for stub in module.modules():
            if isinstance(stub, Stub):
                stub.returns = returns
        asked = [
            p
            for p in inspect.signature(module.forward).parameters.values()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]

        def run(training: bool, x: Tensor) -> Tensor:
            others = [x.flip(0) if tensors else None for _ in asked[1:]]
            y = module.train(training).forward(x, *others)
            return y[0] if isinstance(y, tuple) else y

        return run


def span(form: FFNForm) -> dict[str, str]:
    """The siblings that a span covers: what each is called in an `FFNSpan`, and its path below the
    owner. A function has no module of its own, and belongs to the one that the Linear is in."""
    if form.activation is None:
        first = form.up.rpartition(".")[0] or form.up
        return {"first": first, "second": form.down}
    return {"first": form.up, "activation": form.activation, "second": form.down}


def _small(width: int, hidden: int) -> Sizes:
    """D, F and 2 F of a twin, which keep what is equal among them equal."""
    if width == hidden:
        return {width: 8, 2 * width: 16}
    if width == 2 * hidden:
        return {hidden: 6, width: 12}
    return {width: 8, hidden: 12, 2 * hidden: 24}


def _tokens(width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, width)
    return [torch.randn(shape, generator=generator, **HERE) * scale for scale in SCALES]


def _rates(owner: nn.Module) -> list[tuple[str, float]]:
    """(the owner's attribute, rate) of every dropout that is on; of a Dropout no attribute."""
    modules = [m for _, m in outside_attention(owner)]
    found = [("", m.p) for m in modules if isinstance(m, nn.Dropout)]
    found += [(n, v) for n, v in vars(owner).items() if "drop" in n and isinstance(v, float)]
    return [(name, rate) for name, rate in found if 0 < rate < 1]


def _strangers(owner: nn.Module, form: FFNForm) -> list[nn.Module]:
    """Modules below that hold matrices, and none of the network's parts."""
    parts = {owner.get_submodule(name) for name in (form.up, form.down)}

    def below(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if parts.intersection(child.modules()):
                yield from below(child)
            elif any(p.ndim > 1 for p in child.parameters()) or is_attention("", child):
                yield child

    return [*below(owner)]


def _difference(
    dense: Run,
    ours: Run,
    tokens: list[Tensor],
    training: bool,
) -> float:
    """The largest relative error, with the same dropout masks on both sides."""
    worst = 0.0
    with torch.no_grad(), _own_random_state(), torch.autocast("cpu", enabled=False):
        for x in tokens:
            outputs = []
            for run in (dense, ours):
                torch.default_generator.manual_seed(0)
                outputs.append(run(training, x.clone()).double())
            wanted, found = outputs
            if wanted.shape != found.shape or not (wanted.isfinite() & found.isfinite()).all():
                return float("inf")
            if not torch.equal(wanted, found):
                scale = max(wanted.norm(), found.norm())
                worst = max(worst, ((found - wanted).norm() / scale).item())
    return worst


@contextmanager
def _own_random_state() -> Iterator[None]:
    """The CPU's random state is afterwards what it was; torch.manual_seed would seed GPUs too."""
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
